"""nmcompile run PLAN --input x.npz"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from nmcompile.cli import terminal
from nmcompile.errors import InputError
from nmcompile.files import replacing
from nmcompile.npz_file import FileError, load_npz

HELP = """Run a plan on inputs from a .npz file, one array per input of the model.

\b
  nmcompile run model.plan --input x.npz --output y.npz
  nmcompile run model.plan --input x.npz                   # shapes and first values

\b
Such a file is made with
  numpy.savez("x.npz", input_ids=ids, attention_mask=mask)
"""


@click.command("run", help=HELP, short_help="Run a plan on the arrays of a .npz file.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--input", "source", type=click.Path(path_type=Path), required=True, metavar="NPZ", help="The inputs.")
@click.option("--output", type=click.Path(path_type=Path), metavar="NPZ", help="Where to write the outputs.")
@click.option("--threads", type=int, metavar="N", help="Threads to use (default: every core).")
def command(plan: Path, source: Path, output: Path | None, threads: int | None) -> None:
    from nmcompile.session import load

    terminal.check_writable(output, plan, source)
    session = load(plan, threads=threads)
    results = session.run(read_npz(source))
    if output is not None:
        write_npz(output, results)
        return
    for name, values in results.items():
        few = values.ravel()[:6].tolist()
        first = " ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in few)
        more = " ..." if values.size > 6 else ""
        click.echo(f"{name}: {values.dtype}{list(values.shape)}  {first}{more}")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; InputError when it is none."""
    try:
        return load_npz(path)
    except FileError as error:
        raise InputError(f"cannot read {path}: {error}; write plain arrays with numpy.savez(path, input_ids=ids, ...)"
                         ) from None  # fmt: skip


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All of the file or nothing."""
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy has an option between the arrays
