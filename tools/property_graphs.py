"""Thousands of graphs drawn at random, each compiled and compared with onnxruntime in all its forms.

    python -m tools.property_graphs --count 2000 --seed 0 --jobs 2
    python -m tools.property_graphs --only 1234          # one graph, with its recipe

Prints how many are right on the engine, right with a part on onnxruntime (declined), wrong, refuse usual inputs or do
not compile (error); the seeds of these; and for each construct how often it was native. Exit status 1 where one is
wrong, refused or in error.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from graph_check import Outcome, check
from random_graph_smaller import shrunk
from random_graphs import Causal, Padding, Recipe, Window, draw, parts

GOOD, BAD = ("native", "declined"), ("wrong", "refused", "error")
VERDICTS = (*GOOD, *BAD)


@click.command()
@click.option("--count", default=200, show_default=True, help="graphs to draw")
@click.option("--seed", default=0, show_default=True, help="of the first graph; the others follow")
@click.option("--jobs", default=1, show_default=True, help="processes")
@click.option("--only", type=int, help="the seed of one graph, shown in full")
@click.option("--shrink", is_flag=True, help="cut wrong graphs down to what makes them wrong")
def main(count: int, seed: int, jobs: int, only: int | None, shrink: bool) -> None:
    """Draw graphs, compile and compare them, and say what came."""
    seeds = range(seed, seed + count) if only is None else [only]
    outcomes = []
    for index, outcome in enumerate(_checked(list(seeds), jobs, smallest if shrink else check_seed)):
        outcomes.append(outcome)
        if outcome.verdict in BAD or only is not None:
            click.echo(told(outcome))
        if (index + 1) % 50 == 0:
            click.echo(f"{index + 1}/{count}: {_counted(outcomes)}", err=True)
    click.echo(summary(outcomes))
    sys.exit(any(outcome.verdict in BAD for outcome in outcomes))


def _checked(seeds: list[int], jobs: int, job: Callable[[int], Outcome]) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(job, seeds)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(job, seeds, chunksize=4)


def check_seed(seed: int) -> Outcome:
    return check(draw(seed))


def smallest(seed: int) -> Outcome:
    """Of a graph that is wrong or does not compile, the smallest of which the same is said."""
    first = check_seed(seed)
    if first.verdict in GOOD:
        return first
    return check(shrunk(first.recipe, lambda recipe: _said(check(recipe)) == _said(first)))


def _said(outcome: Outcome) -> tuple[str, str, str]:
    """The verdict, and of what is wrong first the form and the kind of inputs."""
    form, text = next(iter(outcome.complaints), ("", ""))
    masks = re.search(r"masks (\w+)", text)
    return outcome.verdict, form, masks[1] if masks else ""


def told(outcome: Outcome) -> str:
    """What is to be known of one graph: its recipe, what is wrong, what runs where."""
    lines = [f"seed {outcome.recipe.seed}: {outcome.verdict}", f"  {outcome.recipe}"]
    lines += [f"  {form}: {text}" for form, text in outcome.complaints]
    lines += [f"  {why}" for why in (outcome.barred, outcome.error) if why]
    lines += [f"  not native: {outcome.missing}"] * (not outcome.native and bool(outcome.missing))
    lines += [f"  {outcome.guarded} of {outcome.runs} inputs guarded: {outcome.refusal}"] * bool(outcome.guarded)
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    """Counts, reasons why graphs are not native, and a table of constructs."""
    tried, guarded = sum(outcome.runs for outcome in outcomes), sum(outcome.guarded for outcome in outcomes)
    lines = [_counted(outcomes), f"inputs: {tried}, of them {guarded} unusual ones refused"]
    for verdict in BAD:
        seeds = [str(o.recipe.seed) for o in outcomes if o.verdict == verdict]
        lines += [f"{verdict}: seeds {', '.join(seeds)}"] * bool(seeds)
    lines += _most("declined because", [o.missing for o in outcomes if o.verdict == "declined"])
    lines += _most("unusual inputs refused because", [o.refusal for o in outcomes if o.refusal])
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


def labels(recipe: Recipe) -> tuple[str, ...]:
    """The constructs of a recipe that are worth counting."""
    found = [f"opset {recipe.style.opset}", f"ids {recipe.ids.kind}", f"scale {recipe.factor.kind}"]
    found.append("no positions" if recipe.positions is None else f"positions {recipe.positions.kind}")
    found += [f"types {recipe.types}"] * bool(recipe.types) + [f"output {kind}" for kind in recipe.outputs]
    found += [f"input {item.name} {item.dtype} {item.shape}" for item in recipe.inputs if item.name != "segments"]
    for mask in dict.fromkeys(mask for mask in recipe.masks if mask is not None):
        found += [f"mask {mask.put}", f"mask value {mask.value}"] + ["mask before the scale"] * mask.early
        found += ["mask expanded"] * mask.spread
        found += [_word(part) for part in parts(mask.keep)]
    found += ["no mask"] * (set(recipe.masks) == {None}) + ["masks differ"] * (len(set(recipe.masks)) > 1)
    found += ["past"] * recipe.past + ["fixed length"] * bool(recipe.static)
    if recipe.constant is not None:
        found.append(f"constant {recipe.constant.op}[{','.join(recipe.constant.shape)}]")
    found += [f"fused {recipe.style.fused}"] * bool(recipe.style.fused) + ["shared heads"] * (recipe.share > 1)
    found += ["fused embedding"] * recipe.style.embed
    if recipe.decoder is not None:
        found.append(f"decoder, {'own' if recipe.decoder.own else 'the other'} positions")
    return tuple(dict.fromkeys(found))


def _word(part: object) -> str:
    if isinstance(part, Padding):
        return f"padding {part.test}{', picked' * part.picked}"
    if isinstance(part, Causal):
        return f"causal {part.form}"
    if isinstance(part, Window):
        return "window both sides" if part.both else "window"
    return {"Both": "and", "Either": "or"}.get(type(part).__name__, type(part).__name__.lower())


def _counted(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    return f"{len(outcomes)} graphs: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _most(title: str, texts: list[str]) -> list[str]:
    counts = Counter(map(_reason, texts)).most_common(20)
    return ["", title, *(f"{count:6}  {reason}" for reason, count in counts)]


def _reason(text: str) -> str:
    """A note without the names of one graph."""
    return re.sub(r"\b[a-z]+_\d+\b", "*", text)[:150]


if __name__ == "__main__":
    main()
