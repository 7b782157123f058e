"""nmcompile bench PLAN --against MODEL.onnx"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmcompile.cli import terminal

if TYPE_CHECKING:
    from nmcompile.bench import Contender

HELP = """Measure latency, throughput, memory and load time.

\b
  nmcompile bench model.plan
  nmcompile bench model.plan --against model.onnx --shape 1x128 --shape 8x128
  nmcompile bench model.plan --against model.onnx --threads 1 --seconds 10 --json

The models run in processes of their own and take turns in short rounds, so that both meet the same load on the
machine; inputs are made up, the same for both, with full masks. An ONNX file runs in onnxruntime with all of its
optimisations and as many threads. The ratio is that of the medians; the range beside it is over the rounds.
"""


class Shape(click.ParamType[tuple[int, int | None]]):
    """SEQUENCES x TOKENS, or sequences alone."""

    name = "shape"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not sequences x tokens; write for example 1x128", param, ctx)
        return int(parts[0]), int(parts[1]) if len(parts) == 2 else None


@click.command("bench", help=HELP, short_help="Measure a plan, side by side with onnxruntime.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="MODEL", help="The ONNX model (or another plan).")
@click.option("--threads", type=int, metavar="N", help="Threads for each (default: every core).")
@click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="BxS", help="Sequences x tokens, repeatable.")
@click.option("--seconds", type=click.FloatRange(min=0.01), default=3.0, show_default=True, help="Per model and shape.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    plan: Path,
    against: Path | None,
    threads: int | None,
    shapes: tuple[tuple[int, int | None], ...],
    seconds: float,
    as_json: bool,
) -> None:
    from nmcompile.bench import bench, ratios
    from nmcompile.errors import InputError

    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is not a number of threads")
    models = [plan] if against is None else [plan, against]
    with terminal.Progress() as progress:
        found = bench(models, threads=threads, shapes=shapes or ((1, None),), seconds=seconds, progress=progress)
    speedups = ratios(*found) if against is not None else []
    if as_json:
        named = [dict(zip(("median", "least", "greatest"), ratio, strict=True)) for ratio in speedups]
        terminal.say_json({"contenders": [item.to_json() for item in found], "ratios": named})
        return
    click.echo(_latencies(found))
    for latency, (ratio, low, high) in zip(found[0].latencies, speedups, strict=False):
        other = Path(found[1].model).name
        click.echo(f"{latency.shape}: {plan.name} is {ratio:.2f}x as fast as {other} "
                   f"(median; {low:.2f} to {high:.2f} over rounds)")  # fmt: skip
    click.echo()
    click.echo(_processes(found))


def _latencies(found: Sequence[Contender]) -> str:
    rows = []
    for at in range(len(found[0].latencies)):
        for item in found:
            one = item.latencies[at]
            rows.append([one.shape, Path(item.model).name, f"{one.p50:.3f}", f"{one.p90:.3f}",
                         f"{one.p99:.3f}", f"{one.sequences:.1f}", str(one.runs)])  # fmt: skip
    header = ["shape", "model", "p50 ms", "p90 ms", "p99 ms", "sequences/s", "runs"]
    return terminal.table(header, rows, right="23456")


def _processes(found: Sequence[Contender]) -> str:
    rows = [[Path(item.model).name, f"{item.runtime} {item.isa}".strip(), str(item.threads),
             f"{item.load_seconds * 1e3:.0f} ms", terminal.size(item.peak_bytes)] for item in found]  # fmt: skip
    return terminal.table(["model", "runs in", "threads", "load", "peak memory"], rows, right="234")
