"""How a plan's work would spread over more threads than this machine has: the engine's own schedule, by its cost model.

    python tools/thread_scaling.py model.plan
    python tools/thread_scaling.py model.plan --tokens 16 --tokens 512 --threads 64
    python tools/thread_scaling.py model.plan --measured 128        # steps as they take on this machine

The schedule counts panels of 64 tokens, shares of each step (16 outputs of a linear layer, a head, 16 tokens), and
barriers. What each costs are the engine's defaults (native/kernels/costs.h), or with --measured the times of one run
here. It knows nothing of memory bandwidth, clocks or sockets: an upper bound.
"""

from __future__ import annotations

from pathlib import Path

import click

import nmcompile
from nmcompile.backends.cpu.session import NativeSegment, Session
from nmcompile.made_up import made_up


def take_times(session: Session, tokens: int) -> None:
    """Let the schedules of the session's programs count with what their steps take on this machine."""
    vocabulary, _ = session.limits()
    values = made_up(session.inputs, 1, tokens, vocabulary=vocabulary)
    for segment in session._segments:
        if isinstance(segment, NativeSegment):
            arrays, mask = segment._feeds(values)
            segment.program.run_costs(arrays, mask)  # the first run warms up
            segment.program.measured(segment.program.run_costs(arrays, mask))
        values |= segment.run(values)


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--tokens", multiple=True, type=int, default=(16, 64, 128, 384, 1024, 4096), show_default=True)
@click.option("--threads", multiple=True, type=int, default=(2, 4, 8, 16, 32, 64), show_default=True)
@click.option("--measured", type=click.IntRange(1), help="Tokens of a run whose steps are timed first.")
def main(plan: Path, tokens: tuple[int, ...], threads: tuple[int, ...], measured: int | None) -> None:
    """Print a Markdown table of expected speed-ups over one thread, with the threads that are worth using."""
    session = nmcompile.load(plan)
    if not isinstance(session, Session):
        raise click.ClickException(f"{plan} is not a CPU plan")
    programs = [segment.program for segment in session._segments if isinstance(segment, NativeSegment)]
    if not programs:
        raise click.ClickException(f"{plan} has no native segment")
    if measured is not None:
        take_times(session, measured)
    click.echo("| tokens | " + " | ".join(f"{count} threads" for count in threads) + " |")
    click.echo("|---" * (len(threads) + 1) + "|")
    for length in tokens:
        cells = []
        for count in threads:
            forecasts = [program.forecast(length, count) for program in programs]
            alone, shared = (sum(item[i] for item in forecasts) for i in (1, 2))
            cells.append(f"{alone / shared:.1f}x ({max(item[0] for item in forecasts)})")
        click.echo(f"| {length} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
