"""nmcompile compare A B"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from nmcompile.cli import terminal
from nmcompile.errors import InputError, NmcompileError

if TYPE_CHECKING:
    from nmcompile.compare import Difference
    from nmcompile.tensorinfo import TensorInfo

Arrays = dict[str, np.ndarray]
SHAPES = ((1, 8), (2, 16), (4, 33), (3, 64))  # sequences, tokens: made-up batches, with padding

HELP = """Compare the outputs of two models on the same inputs. A is the reference; each is an ONNX file, run in
onnxruntime, or a plan.

\b
  nmcompile compare model.onnx model.plan --data samples.npz
  nmcompile compare model.onnx model.plan --data texts.jsonl --tokenizer tokenizer.json --min-cosine 0.99
  nmcompile compare yesterday.plan today.plan --json

cosine: mean over vectors (last axis). SQNR: power of A's output over the power of the difference. top-1: share of
vectors whose largest element is the same, or of labels (whole numbers) that are. Single values have an SQNR only.
Padding is left out. With --min-cosine, --min-sqnr or --min-top1 the command fails (exit status 1) when an output is
below, or when no output has such a figure.
"""


@dataclass(frozen=True)
class Model:
    """Something to run, with what it takes and gives."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    run: Callable[[Arrays], Mapping[str, np.ndarray]]


@click.command("compare", help=HELP, short_help="Compare the outputs of two models or plans.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="DATA", help="Samples: .npz, .jsonl or a folder.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="PATH", help="tokenizer.json, for texts.")
@click.option("--max-length", type=int, default=128, show_default=True, metavar="N", help="Tokens per sample at most.")
@click.option("--min-cosine", type=float, metavar="X", help="Fail when an output's cosine is less.")
@click.option("--min-top1", type=float, metavar="X", help="Fail when an output's top-1, or share of labels, is less.")
@click.option("--min-sqnr", type=float, metavar="X", help="Fail when an output's SQNR in dB is less.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    a: Path,
    b: Path,
    data: Path | None,
    tokenizer: Path | None,
    max_length: int,
    min_cosine: float | None,
    min_sqnr: float | None,
    min_top1: float | None,
    as_json: bool,
) -> None:
    with terminal.Progress() as progress:
        progress("loading", 0, 2)
        one, other = open_model(a), open_model(b)
        _check_inputs(a, one, b, other)
        found, samples = differences(one, other, data, tokenizer, max_length, progress)
    if not found:
        raise InputError(f"{a} and {b} have no output in common: {_names(one.outputs)} and {_names(other.outputs)}")
    if data is None:
        terminal.warn("NO DATA: compared on made-up inputs, which say little about real ones; give samples with --data")
    silent = unmeasured(found, min_cosine, min_top1)
    failures = list(below(found, min_cosine, min_sqnr, min_top1))
    if as_json:
        outputs = {name: item.to_json() for name, item in found.items()}
        terminal.say_json({"a": str(a), "b": str(b), "samples": samples, "made_up": data is None,
                           "outputs": outputs, "below": failures})  # fmt: skip
    else:
        click.echo(terminal.differences(found))
        click.echo(f"on {samples} {'made-up ' if data is None else ''}samples")
    only = sorted({i.name for i in one.outputs} ^ {i.name for i in other.outputs})
    if only:
        click.echo(f"only one of the two has the outputs {', '.join(only)}", err=True)
    for line in silent:
        click.echo(line, err=True)
    if failures:
        raise NmcompileError("; ".join(failures))


def open_model(path: Path) -> Model:
    """A plan in its session, anything else as ONNX in onnxruntime."""
    from nmcompile.session import is_plan, load

    if is_plan(path):
        session = load(path)
        return Model(session.inputs, session.outputs, session.run)
    from nmcompile import input_roles
    from nmcompile import ir as g

    graph = g.admit(path)
    outputs = g.outputs(graph)
    return Model(input_roles.inputs(graph), outputs, g.runner(graph, [info.name for info in outputs]))


def _check_inputs(a: Path, one: Model, b: Path, other: Model) -> None:
    mine = {info.name: info.dtype for info in one.inputs}
    theirs = {info.name: info.dtype for info in other.inputs}
    if mine != theirs:
        raise InputError(f"{a} takes {_names(one.inputs)}, but {b} takes {_names(other.inputs)}; compare models alike")


def _names(infos: Sequence[TensorInfo]) -> str:
    return ", ".join(map(str, infos))


def differences(
    one: Model, other: Model, data: Path | None, tokenizer: Path | None, max_length: int, progress: terminal.Progress
) -> tuple[dict[str, Difference], int]:
    """(per output, number of samples): `other` against `one` on the data, or on made-up inputs."""
    from nmcompile.compare import Comparison
    from nmcompile.roles import real_tokens

    comparison = Comparison(one.outputs)
    count = 0
    inputs = told_by_either(one.inputs, other.inputs)
    if data is None:
        batches, total = made_up_batches(inputs), sum(batch for batch, _ in SHAPES)
    else:
        from nmcompile.calibrate import open_data

        opened = open_data(data, inputs, tokenizer=tokenizer, max_length=max_length, limit=1 << 30)
        batches, total = iter(opened), opened.samples
    for feeds in batches:
        try:
            expected = one.run(feeds)
        except NmcompileError:
            if data is None and count:
                break  # longer than the model's positions; the shorter batches serve
            raise
        try:
            comparison.add(expected, other.run(feeds), real_tokens(feeds, inputs))
        except ValueError as error:
            raise InputError(f"the outputs cannot be compared: {error}") from None
        count += max((len(array) for array in feeds.values() if array.ndim), default=1)
        progress("comparing", count, total)
    return comparison.differences(), count


def told_by_either(one: Sequence[TensorInfo], other: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """The inputs of one model, with the roles that either knows: a graph does, a plan states what names do not tell."""
    more = {info.name: info.role for info in other}
    return tuple(replace(info, role=info.role or more.get(info.name)) for info in one)


def made_up_batches(infos: Sequence[TensorInfo]) -> Iterator[Arrays]:
    """Seeded batches of several sizes, with padding where there is a mask."""
    from nmcompile.made_up import made_up

    for seed, (batch, tokens) in enumerate(SHAPES):
        yield made_up(infos, batch, tokens, seed=seed, ragged=True)


def unmeasured(found: Mapping[str, Difference], min_cosine: float | None, min_top1: float | None) -> list[str]:
    """One sentence for each limit and the outputs that it says nothing of; InputError where that is all of them."""
    lines = []
    for figure, limit in (("cosine", min_cosine), ("top1", min_top1)):
        without = [name for name, item in found.items()
                   if np.isnan(getattr(item, figure)) and not np.isnan(item.sqnr)]  # fmt: skip
        if limit is None or not without:
            continue
        names, instead = ", ".join(without), _instead(figure, [found[name] for name in without])
        if len(without) == len(found):
            raise InputError(f"--min-{figure} has nothing to measure: there is no {figure} of {names}; {instead}")
        lines.append(f"--min-{figure} says nothing of {names}; {instead}")
    return lines


def _instead(figure: str, items: Sequence[Difference]) -> str:
    """What measures outputs that a figure says nothing of."""
    if figure == "cosine" and any(not np.isnan(item.top1) for item in items):
        return "they are labels: give --min-top1, the share that is the same"
    return "they are single values: give --min-sqnr"


def below(
    found: Mapping[str, Difference], min_cosine: float | None, min_sqnr: float | None, min_top1: float | None = None
) -> Iterator[str]:
    """One sentence for each output that is worse than asked for; what is not a number is worse than anything."""
    for name, item in found.items():
        if not (min_cosine is min_sqnr is min_top1 is None) and np.isnan(item.sqnr):
            yield f"{name} holds values that are not numbers"
            continue
        # an output without such a figure is told by `unmeasured`
        if min_cosine is not None and item.cosine < min_cosine:
            yield f"{name}: cosine {terminal.cosine(item.cosine)} is below {min_cosine:g}"
        if min_top1 is not None and item.top1 < min_top1:
            yield f"{name}: top-1 {terminal.percent(item.top1)} is below {min_top1:g}"
        if min_sqnr is not None and item.sqnr < min_sqnr:
            yield f"{name}: SQNR {terminal.decibel(item.sqnr)} is below {min_sqnr:g} dB"
