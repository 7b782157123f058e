"""python -m tools.accuracy retrieval | ablation | trained | training-ablation | classify | task | corpus | ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from nmcompile.cli import guarded
from nmcompile.errors import InputError
from nmcompile.files import write as write_file
from tools.accuracy import classify_cli, data_cli, task_cli
from tools.accuracy.checkpoints import encoder
from tools.accuracy.plot import draw
from tools.accuracy.study import ABLATION, PATTERNS, Recipe, Study, markdown, to_json, trained, training_ablation
from tools.accuracy.texts import texts_of

PACKAGES = "numpy,torch,onnx,onnxruntime,click,rich"


@click.group(context_settings={"max_content_width": 120})
def main() -> None:
    """How much accuracy compression costs.

    retrieval and ablation compress all-MiniLM-L6-v2 (or another --model) with 256 docstrings of the
    standard library as calibration, and find the second paragraph of other docstrings by the first, among 1,000. task
    scores any model on GLUE, SQuAD, STS-B or WikiText. trained prunes and trains. corpus collects text without
    labels to train on, classifier makes a model of a labelled set, classify prunes, trains and times it.
    """


def _options(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Write NAME.md, .json, .png."),
        click.option("--packages", default=PACKAGES, show_default=True, help="Whose docstrings are other text."),
        click.option("--sets", default=1, show_default=True, help="Sets of 1,000 pairs of each kind of text."),
        click.option("--model", default="minilm", show_default=True, help="minilm, mpnet or a checkpoint's FOLDER."),
        click.option("--only", multiple=True, metavar="ROW", help="Rows whose names hold this; may be repeated."),
    ):
        command = option(command)
    return command


@main.command()
@_options
def retrieval(output: Path | None, packages: str, sets: int, only: tuple[str, ...], model: str) -> None:
    """Every pattern and share of zeros, by the default recipe."""
    guarded(lambda: _study("retrieval", PATTERNS, output, packages, sets, only, model))


@main.command()
@_options
def ablation(output: Path | None, packages: str, sets: int, only: tuple[str, ...], model: str) -> None:
    """1x4 blocks at 50 % zeros, one step of the recipe after another."""
    guarded(lambda: _study("ablation", ABLATION, output, packages, sets, only, model))


@main.command("trained")
@_options
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, metavar="FILE",
              help='Texts to train on, {"text": ...} a line; python -m tools.accuracy corpus makes them.')  # fmt: skip
@click.option("--pattern", default="2x4", show_default=True)
@click.option("--sparsity", type=float, default=0.8, show_default=True, help="0: that of an n:m pattern.")
@click.option("--budget", "budgets", multiple=True, default=["10m"], show_default=True, help="May be repeated.")
@click.option("--masks", default="fixed", show_default=True, help="How zeros move while training goes on.")
@click.option("--lr", default=0.0, help="0: by the model's width.")
@click.option("--tokens", default=1024, show_default=True, help="Tokens of a step.")
@click.option("--rungs", metavar="S,S,...", callback=lambda ctx, param, value: tuple(value.split(",")) if value else (),
              help="Sparsities to train at before the last.")  # fmt: skip
@click.option("--qat", default=0.0, show_default=True, help="Share of the budget with eight bits.")
@click.option("--embeddings/--no-embeddings", default=True, show_default=True, help="Train embeddings too.")
@click.option("--local", default=0.0, show_default=True, help="Share of the budget that trains block by block.")
def trained_rows(
    output: Path | None, packages: str, sets: int, only: tuple[str, ...], model: str, data: Path, pattern: str,
    sparsity: float, budgets: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """One pattern, pruned in one shot and trained, a row for each time."""
    recipes = tuple(trained(pattern, sparsity or None, budgets, **options))

    def run() -> None:
        _study("trained", recipes, output, packages, sets, only, model, texts_of(data))

    guarded(run)


@main.command("training-ablation")
@_options
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, metavar="FILE",
              help='Texts to train on, {"text": ...} a line.')  # fmt: skip
@click.option("--pattern", default="2x4", show_default=True)
@click.option("--sparsity", type=float, default=0.8, show_default=True)
@click.option("--budget", default="6m", show_default=True, help="Of each row, pruning included.")
def training_rows(
    output: Path | None, packages: str, sets: int, only: tuple[str, ...], model: str, data: Path, pattern: str,
    sparsity: float, budget: str,
) -> None:  # fmt: skip
    """What each option of training does in the same time."""

    def run() -> None:
        recipes = tuple(training_ablation(pattern, sparsity, budget))
        _study("training-ablation", recipes, output, packages, sets, only, model, texts_of(data))

    guarded(run)


def _study(
    name: str, recipes: tuple[Recipe, ...], output: Path | None, packages: str, sets: int, only: tuple[str, ...],
    model: str, texts: Sequence[str] = (),
) -> None:  # fmt: skip
    chosen = [recipe for recipe in recipes if not only or any(word in recipe.name for word in only)]
    if not chosen:
        raise InputError(f"no row is named {' or '.join(only)}; the rows: {'; '.join(item.name for item in recipes)}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        words = [word for word in packages.split(",") if word]
        study = Study(*encoder(model, Path(scratch)), words, sets, texts=texts)
        rows = list(study.rows(chosen, Path(scratch), lambda what: click.echo(what, err=True)))
    text = markdown(rows, study.base)
    click.echo(text)
    if output is not None:
        write_file(output / f"{name}.md", text)
        write_file(output / f"{name}.json", to_json(rows, study.base))
        draw(rows, study.base, output / f"{name}.png")


main.add_command(task_cli.command)
main.add_command(data_cli.corpus)
main.add_command(data_cli.classifier)
main.add_command(classify_cli.command)

if __name__ == "__main__":
    main()
