"""Thousands of graphs drawn at random, each compiled and compared with onnxruntime in all its forms.

    python -m tools.property_graphs --count 2000 --seed 0 --jobs 2
    python -m tools.property_graphs --only 1234          # one graph, with its recipe

Prints how many are right on the engine, right with a part on onnxruntime (declined), wrong, or in error; the seeds of
wrong ones; and for each construct how often it was native. Exit status 1 where one is wrong or in error.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from graph_check import Outcome, check  # noqa: E402
from random_graphs import draw, labels  # noqa: E402

VERDICTS = ("native", "declined", "wrong", "error")


@click.command()
@click.option("--count", default=200, show_default=True, help="graphs to draw")
@click.option("--seed", default=0, show_default=True, help="of the first graph; the others follow")
@click.option("--jobs", default=1, show_default=True, help="processes")
@click.option("--only", type=int, help="the seed of one graph, shown in full")
def main(count: int, seed: int, jobs: int, only: int | None) -> None:
    """Draw graphs, compile and compare them, and say what came."""
    seeds = range(seed, seed + count) if only is None else [only]
    outcomes = []
    for index, outcome in enumerate(_checked(list(seeds), jobs)):
        outcomes.append(outcome)
        if outcome.verdict in ("wrong", "error") or only is not None:
            click.echo(told(outcome))
        if (index + 1) % 50 == 0:
            click.echo(f"{index + 1}/{count}: {_counted(outcomes)}", err=True)
    click.echo(summary(outcomes))
    sys.exit(any(outcome.verdict in ("wrong", "error") for outcome in outcomes))


def _checked(seeds: list[int], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(check_seed, seeds)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(check_seed, seeds, chunksize=4)


def check_seed(seed: int) -> Outcome:
    return check(draw(seed))


def told(outcome: Outcome) -> str:
    """What is to be known of one graph: its recipe, what is wrong, what runs where."""
    lines = [f"seed {outcome.recipe.seed}: {outcome.verdict}", f"  {outcome.recipe}"]
    lines += [f"  {form}: {text}" for form, text in outcome.complaints] + [f"  {outcome.error}"] * bool(outcome.error)
    lines += [f"  not native: {outcome.missing}"] * (not outcome.native and bool(outcome.missing))
    lines += [f"  {outcome.guarded} of {outcome.runs} inputs refused: {outcome.refused}"] * bool(outcome.guarded)
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    """Counts, reasons why graphs are not native, and a table of constructs."""
    lines = [_counted(outcomes), f"inputs: {sum(o.runs for o in outcomes)}, {sum(o.guarded for o in outcomes)} refused"]
    for verdict in ("wrong", "error"):
        seeds = [str(o.recipe.seed) for o in outcomes if o.verdict == verdict]
        lines += [f"{verdict}: seeds {', '.join(seeds)}"] * bool(seeds)
    reasons = Counter(_reason(o.missing) for o in outcomes if o.verdict == "declined")
    lines += ["", "declined because"] + [f"{count:6}  {reason}" for reason, count in reasons.most_common(15)]
    refusals = Counter(_reason(o.refused) for o in outcomes if o.refused)
    lines += ["", "inputs refused because"] + [f"{count:6}  {reason}" for reason, count in refusals.most_common(15)]
    return "\n".join([*lines, "", *table(outcomes)])


def table(outcomes: list[Outcome]) -> list[str]:
    """A row for each construct: graphs that have it by verdict, and with native attention and look-ups."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for label in labels(outcome.recipe):
            rows.setdefault(label, []).append(outcome)
    lines = [f"{'construct':32}" + "".join(f"{head:>10}" for head in ("graphs", *VERDICTS, "attention", "look-ups"))]
    for label in sorted(rows):
        found = rows[label]
        counts = [len(found), *(sum(o.verdict == v for o in found) for v in VERDICTS)]
        counts += [sum(o.attention for o in found), sum(o.embedding for o in found)]
        lines.append(f"{label:32}" + "".join(f"{n:10}" for n in counts))
    return lines


def _counted(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    return f"{len(outcomes)} graphs: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _reason(text: str) -> str:
    """A note without the names of one graph."""
    return re.sub(r"\b[a-z]+_\d+\b", "*", text)[:150]


if __name__ == "__main__":
    main()
