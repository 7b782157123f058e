"""The accuracy of models on a published task, next to the first of them: python -m tools.accuracy task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np

import nmcompile
from nmcompile.bench import OrtRunner
from nmcompile.cli import guarded
from nmcompile.cli.terminal import Progress, check_writable, percent
from nmcompile.errors import InputError
from nmcompile.tensorinfo import TensorInfo
from tools.accuracy.metrics import LENGTH, Arrays, Feeds, Run, evaluate
from tools.accuracy.tasks import BENCHMARKS, benchmark, load

Scores = dict[str, float]

HELP = f"""Score MODELS (ONNX files or plans) on a published task; the first is the reference of the others.

\b
  python -m tools.accuracy task model.onnx model.plan --task sst2 --data glue_data --tokenizer tokenizer.json

Tasks: {", ".join(BENCHMARKS)}. Accuracy, F1 and correlations are shares of 1, SQuAD's exact match and F1 are
percent, perplexity is per token and better when lower.
"""


@dataclass(frozen=True)
class Model:
    """A model that runs feeds of any size; `tokens` and `batch` are its own where they are fixed."""

    inputs: tuple[str, ...]
    run: Run
    tokens: int | None
    batch: int | None


@click.command("task", help=HELP, context_settings={"max_content_width": 120})
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--task", "name", required=True, metavar="NAME", help="One of those above.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER",
              help="The published files (glue_data, or a file); without it the datasets library gets them.")
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, metavar="PATH", help="tokenizer.json")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N examples (WikiText: windows).")
@click.option("--labels", metavar="A,B,...", help="Order of the models' logits, where it is not the task's.")
@click.option("--max-length", type=click.IntRange(1), metavar="TOKENS",
              help=f"Default: {LENGTH['classes']}, SQuAD {LENGTH['answers']}, WikiText {LENGTH['language']}.")
@click.option("--threads", type=click.IntRange(1), help="Default: every core.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="The figures, to keep.")
def command(
    models: tuple[Path, ...], name: str, data: Path | None, tokenizer: Path, limit: int | None, labels: str | None,
    max_length: int | None, threads: int | None, json_file: Path | None,
) -> None:  # fmt: skip
    def score() -> None:
        for path in (*models, tokenizer):
            if not path.exists():
                raise InputError(f"there is no file {path}")
        check_writable(json_file, *models, tokenizer, data)
        order = labels.split(",") if labels else ()
        found = compare(models, name, data, tokenizer, limit, order, max_length, threads)
        click.echo(markdown(found))
        if json_file is not None:
            content = {"task": benchmark(name).name, "limit": limit, "models": _finite(found)}
            json_file.write_text(json.dumps(content, indent=1) + "\n")

    guarded(score)


def compare(
    models: Sequence[Path], name: str, data: Path | None, tokenizer: Path, limit: int | None, labels: Sequence[str],
    max_length: int | None, threads: int | None,
) -> dict[str, Scores]:  # fmt: skip
    """Metrics by model, in order; progress and what was read go to stderr."""
    task = load(name, data)
    if tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    skipped = f", {task.skipped} rows without a label or broken off left out" if task.skipped else ""
    click.echo(f"{task.benchmark.name}: {len(task.examples)} examples of {task.source}{skipped}", err=True)
    found: dict[str, Scores] = {}
    for path in models:
        model = open_model(path, threads)
        length = min(max_length or LENGTH[task.benchmark.kind], model.tokens or 1 << 30)
        with Progress() as bar:
            try:
                found[str(path)] = evaluate(
                    task, model.run, tokenizer, inputs=model.inputs, labels=labels, max_length=length, limit=limit,
                    batch=model.batch, progress=partial(bar, path.name),
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    return found


def open_model(path: Path, threads: int | None = None) -> Model:
    """A plan in nmcompile, any other file in onnxruntime. Errors name the file."""
    if path.suffix == ".plan":
        session = nmcompile.load(path, threads=threads)
        return _fitted(session.inputs, session.run)
    runner = OrtRunner(str(path), threads)
    outputs = [item.name for item in runner.session.get_outputs()]
    kinds = {info.name: info.dtype for info in runner.inputs}

    def run(feeds: Feeds) -> Arrays:
        values = runner.run({name: array.astype(kinds[name]) for name, array in feeds.items()})
        return dict(zip(outputs, values, strict=True))  # type: ignore[call-overload]

    return _fitted(runner.inputs, run)


def _fitted(inputs: Sequence[TensorInfo], run: Run) -> Model:
    """The model with feeds filled up to its fixed sizes, and outputs cut back to the feeds' rows and tokens."""
    shape = [next((info.shape[axis] for info in inputs if len(info.shape) == 2), None) for axis in (0, 1)]
    batch, tokens = (size if isinstance(size, int) else None for size in shape)

    def fitted(feeds: Feeds) -> Arrays:
        rows, width = next(iter(feeds.values())).shape
        below, beside = (batch or rows) - rows, (tokens or width) - width
        if below == beside == 0:
            return run(feeds)
        wide = {name: np.pad(values, ((0, 0), (0, beside))) for name, values in feeds.items()}
        grown = {name: np.pad(values, ((0, below), (0, 0)), "edge") for name, values in wide.items()}
        return {name: _cut(values, rows, width, tokens) for name, values in run(grown).items()}

    return Model(tuple(info.name for info in inputs), fitted, tokens, batch)


def _cut(values: np.ndarray, rows: int, width: int, tokens: int | None) -> np.ndarray:
    wide = values.ndim > 1 and tokens is not None and values.shape[1] == tokens
    return values[:rows, :width] if wide else values[:rows]


def markdown(found: Mapping[str, Scores]) -> str:
    """A table: model, then each metric and its share of the first model's."""
    first = next(iter(found.values()))
    header = " | ".join(f"{name} | of the first" for name in first)
    lines = [f"| model | {header} |", "|---" + "|---:|---:" * len(first) + "|"]
    for model, scores in found.items():
        cells = [f"{scores[name]:.4f} | {_share(scores[name], first[name])}" for name in first]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(value: float, first: float) -> str:
    return percent(value / first if first and math.isfinite(first) else math.nan)


def _finite(found: Mapping[str, Scores]) -> dict[str, dict[str, float | None]]:
    """JSON has no infinity: a perplexity beyond floats is null."""
    return {
        model: {name: value if math.isfinite(value) else None for name, value in scores.items()}
        for model, scores in found.items()
    }
