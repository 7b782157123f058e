"""Open a plan, whatever target it is for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nmcompile.backends.tensorrt.build import read_description
from nmcompile.errors import NmcompileError, PlanError
from nmcompile.plan import MAGIC, read_plan
from nmcompile.regular_file import open_regular

if TYPE_CHECKING:
    from nmcompile.backends.cpu.session import Session
    from nmcompile.backends.tensorrt.session import EngineSession


def is_plan(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a plan, for the CPU or an engine with its description. NmcompileError: it cannot be read."""
    try:
        with open_regular(Path(path)) as stream:
            start = stream.read(2)
    except OSError as error:
        raise NmcompileError(f"cannot read {path}: {error.strerror or error}") from None
    return start == MAGIC[:2] or read_description(Path(path)) is not None


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    isa: str | None = None,
    memory: int | None = None,
    copy: bool = False,
    native_only: bool = False,
) -> Session | EngineSession:
    """Open a plan and make it ready to run: one for the CPU is mapped, a TensorRT engine goes to the GPU.

    threads: how many share the work (default: every core this process may use). isa: kernels to use ("avx512vnni",
    "avx2", "scalar"; default: the best, or the environment's NMCOMPILE_ISA). All options are the CPU's. Raises
    PlanError for a file that is damaged, of another version, or for a target this machine lacks. An engine is code:
    load only those you trust.

    memory: bytes that a run may take beside its inputs and the file; beyond them it raises InputError (default: half of
    the machine's memory, and a plan whose smallest run takes more than 384 MB is refused). onnxruntime segments share
    one allocation of that size in the process, set by the first that runs; how long they run is bounded by nothing, so
    take a plan from a stranger with native_only, which refuses those that have such segments.

    copy: read the file into memory instead of mapping it. A mapped file may be replaced by another of its name, but not
    written to: the next run raises PlanError, and one that is under way may end the process where the file was cut.
    """
    file = Path(path)
    try:
        with open_regular(file) as stream:
            start = stream.read(4)
    except OSError as error:
        raise PlanError(f"cannot read the plan {file}: {error.strerror or error}") from None
    if start.startswith(MAGIC[:2]):
        from nmcompile.backends.cpu.session import Session

        plan = read_plan(file, copy=copy)
        return Session(plan, threads=threads, isa=isa, memory=memory, native_only=native_only)
    description = read_description(file)
    if description is None:
        raise PlanError(f"{file} is not a plan; make one with: nmcompile MODEL.onnx -o {file.with_suffix('.plan')} "
                        "(an engine needs its description, NAME.plan.json, beside it)")  # fmt: skip
    from nmcompile.backends.tensorrt.session import EngineSession

    return EngineSession(file, description)


def load_cpu(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    isa: str | None = None,
    memory: int | None = None,
    copy: bool = False,
) -> Session:
    """As load, for what only plans for the CPU have, such as their steps. PlanError for an engine."""
    from nmcompile.backends.cpu.session import Session

    session = load(path, threads=threads, isa=isa, memory=memory, copy=copy)
    if not isinstance(session, Session):
        raise PlanError(f"{path} is a TensorRT engine; this is for plans for the CPU")
    return session
