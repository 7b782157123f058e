"""Open a plan, whatever target it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nmcompile.errors import PlanError
from nmcompile.plan import MAGIC, read_plan

if TYPE_CHECKING:
    from nmcompile.backends.cpu.session import Session


def load(path: str | os.PathLike[str], *, threads: int | None = None, isa: str | None = None) -> Session:
    """Map a plan and make it ready to run.

    threads: how many share the work (default: every core this process may use). isa: kernels to use ("avx512vnni",
    "avx2", "scalar"; default: the best, or the environment's NMCOMPILE_ISA). Raises PlanError for a file that is
    damaged, of another version, or for a target this machine lacks.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise PlanError(f"cannot read the plan {file}: {error.strerror or error}") from None
    if not start.startswith(MAGIC[:2]):
        raise PlanError(f"{file} is not a plan; make one with: nmcompile MODEL.onnx -o {file.with_suffix('.plan')}")
    from nmcompile.backends.cpu.session import Session

    return Session(read_plan(file), threads=threads, isa=isa)
