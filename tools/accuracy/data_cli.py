"""Commands that make data and models of them: python -m tools.accuracy corpus | classifier."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from nmcompile.cli import guarded
from tools.accuracy import classifier as heads
from tools.accuracy import corpus as collected
from tools.accuracy import labelled
from tools.accuracy.checkpoints import encoder as made


@click.command(context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="JSON lines to write.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only N paragraphs.")
@click.option("--packages", metavar="A,B,...", help="Only these sources.")
@click.option("--exclude", default=",".join(collected.EVALUATED), show_default=True, help="Packages to leave out.")
@click.option(
    "--folder",
    "folders",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Another site-packages folder to read; may be repeated.",
)
@click.option(
    "--most", type=click.IntRange(1), default=collected.MOST_OF_ONE, show_default=True, help="Paragraphs of one source."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="tokenizer.json: count tokens too.")
def corpus(
    output: Path, limit: int | None, packages: str | None, exclude: str, folders: tuple[Path, ...], most: int,
    seed: int, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Collect English paragraphs without labels to train on, none of which the evaluations ask for."""

    def collect() -> None:
        names = [word for word in packages.split(",") if word] if packages else None
        left_out = [word for word in exclude.split(",") if word]
        found = collected.gather(names, left_out, limit, seed, collected.Roots(folders), most)
        collected.write(output, found)
        click.echo(collected.sources(found))
        if tokenizer is not None:
            click.echo(f"{collected.tokens(found, tokenizer):,} tokens")

    guarded(collect)


@click.command(context_settings={"max_content_width": 120})
@click.option("--task", required=True, type=click.Choice(list(labelled.TASKS)))
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="ONNX file to write.")
@click.option("--folder", "folders", type=click.Path(path_type=Path, exists=True, file_okay=False), multiple=True,
              help="Another site-packages folder that may hold the task; may be repeated.")
@click.option("--encoder", type=click.Path(path_type=Path, exists=True), help="ONNX file; default: all-MiniLM-L6-v2.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="tokenizer.json of --encoder.")
@click.option("--threads", type=click.IntRange(1), help="Default: every core.")
def classifier(
    task: str, output: Path, folders: tuple[Path, ...], encoder: Path | None, tokenizer: Path | None,
    threads: int | None,
) -> None:  # fmt: skip
    """Make a classifier of a labelled set (mean pooling and a fitted linear head) and print its test accuracy."""

    def build() -> None:
        split = labelled.read(task, folders)
        with TemporaryDirectory() as scratch:
            model, reader = (encoder, tokenizer) if encoder and tokenizer else made("minilm", Path(scratch))
            found = heads.make(model, reader, split, output, threads)
        click.echo(f"{task}: {found:.2%} of {len(split[1]):,} test texts right, trained on {len(split[0]):,}")

    guarded(build)
