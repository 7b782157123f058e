"""The command: python -m tools.accuracy classify."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from nmcompile.cli import guarded
from nmcompile.files import write as write_file
from tools.accuracy import classifier as heads
from tools.accuracy import classify, labelled
from tools.accuracy.checkpoints import encoder as made
from tools.accuracy.texts import texts_of


@click.command("classify", context_settings={"max_content_width": 120})
@click.option("--task", required=True, type=click.Choice(list(labelled.TASKS)))
@click.option("--folder", "folders", type=click.Path(path_type=Path, exists=True, file_okay=False), multiple=True,
              help="Another site-packages folder that may hold the task; may be repeated.")  # fmt: skip
@click.option("--model", "model_name", default="minilm", show_default=True,
              help="minilm, mpnet or a checkpoint's FOLDER.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path, exists=True), metavar="FILE",
              help='More texts to train on, {"text": ...} a line, without labels.')  # fmt: skip
@click.option("--pattern", default="2x4", show_default=True)
@click.option("--sparsity", type=float, default=0.8, show_default=True, help="0: that of an n:m pattern.")
@click.option("--budget", "budgets", multiple=True, default=["10m"], show_default=True, help="May be repeated.")
@click.option("--labels", is_flag=True, help="Train with the labels as well; else the float model is the only teacher.")
@click.option("--lr", default=0.0, help="0: by the model's width.")
@click.option("--tokens", default=1024, show_default=True, help="Tokens of a step.")
@click.option("--qat", default=0.0, show_default=True, help="Share of the budget with eight bits.")
@click.option("--masks", default="fixed", show_default=True, help="How zeros move while training goes on.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Write TASK.md, .json, .png.")
def command(
    task: str, folders: tuple[Path, ...], data: Path | None, pattern: str, sparsity: float, budgets: tuple[str, ...],
    model_name: str, labels: bool, threads: int, output: Path | None, **training: Any,
) -> None:  # fmt: skip
    """A classifier (an encoder with a fitted head): float, dense INT8, pruned in one shot, pruned and trained."""

    def run() -> None:
        split = labelled.read(task, folders)
        texts = [] if data is None else texts_of(data)
        with TemporaryDirectory() as scratch:
            encoder, tokenizer = made(model_name, Path(scratch))
            model = Path(scratch) / "classifier.onnx"
            heads.make(encoder, tokenizer, split, model, threads)
            names = tuple(sorted({label for _, label in split[0]}))
            setting = classify.Setting(model, tokenizer, split, names, Path(scratch), threads)
            asked = {**training, **({"labels": "label"} if labels else {})}
            found = classify.rows(setting, pattern, sparsity or None, budgets, asked,
                                  lambda what: click.echo(what, err=True), texts)  # fmt: skip
        text = classify.markdown(found, setting.shapes)
        click.echo(text)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_file(output / f"{task}.md", text)
            write_file(output / f"{task}.json", classify.to_json(found))
            classify.draw(found, output / f"{task}.png", "x".join(map(str, setting.shapes[0])))

    guarded(run)
