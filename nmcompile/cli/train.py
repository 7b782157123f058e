"""nmcompile train MODEL -o SPARSE.onnx --data DATA"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nmcompile.cli import recipe, terminal
from nmcompile.cli.compile import check_model

SHIPPED = Path(__file__).parent.parent / "training" / "recipes"
NAMES = ", ".join(sorted(file.name for file in SHIPPED.glob("*.toml")))

HELP = """Prune a model and train it to compute what it computed before, on unlabelled samples.

\b
  nmcompile train model.onnx -o sparse.onnx --data texts.jsonl --tokenizer tokenizer.json --sparsity 0.8 --budget 60m
  nmcompile train model.onnx -o sparse.onnx --data samples.npz --pattern 2:4 --masks admm --budget 2h --device cuda
  nmcompile sparse.onnx -o model.plan --calibration texts.jsonl --tokenizer tokenizer.json

The dense model is the teacher; labels are not needed, and count beside it where --labels names them. Zeros are chosen
as `nmcompile --sparsity` chooses them, by a part of the same budget. Every sixteenth sample is held out, and what is
written is the best state on those: never worse than pruning alone. More samples and more time are what helps most.
Several GPUs: torchrun --nproc-per-node 4 "$(which nmcompile)" train ... --device cuda. Needs torch:
pip install 'nmcompile[train]'.
"""


def _check_plot(plot: Path, *others: Path | None) -> None:
    """One line for a picture that cannot be drawn or written, before the long part."""
    from nmcompile.files import check_outputs
    from nmcompile.profile.plot import check

    check(plot)
    check_outputs({"--plot": plot, **{f"output {i}": path for i, path in enumerate(others) if path is not None}})


def shipped(path: Path | None) -> Path | None:
    """One of the recipes that come along, where there is no file of that name."""
    if path is None or path.exists() or path.parent != Path("."):
        return path
    own = SHIPPED / path.with_suffix(".toml").name
    return own if own.exists() else path


@click.command("train", help=HELP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="OUT",
              help="The sparse model, ONNX.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), required=True, metavar="DATA",
              help="Samples, as many as there are: .jsonl, .npz, folder.")  # fmt: skip
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="PATH", help="tokenizer.json, for texts.")
@click.option("--max-length", type=int, metavar="N", help="Tokens of a sample at most.  [default: 128]")
@click.option("--sparsity", type=float, metavar="S", help="Share of weights to zero.  [default: 0.8]")
@click.option("--pattern", default="2x4", show_default=True, metavar="PATTERN", help="As in nmcompile compile.")
@click.option("--solver", type=click.Choice(["magnitude", "wanda", "obs", "admm"]), help="Default: admm.")
@click.option("--budget", default="10m", show_default=True, metavar="TIME", help="Of all of it: 90s, 10m, 1.5h.")
@click.option("--masks", default="fixed", show_default=True,
              type=click.Choice(["fixed", "gradual", "admm", "lasso", "srste"]),
              help="How zeros move while training goes on.")  # fmt: skip
@click.option("--masks-option", "masks_options", multiple=True, metavar="NAME:VALUE", help="An option of the masks.")
@click.option("--lr", type=float, default=0.0, metavar="RATE",
              help="Learning rate.  [default: by the model's width, 1e-3 for 384 features, 3e-4 for 768, less below "
                   "80 % zeros]")  # fmt: skip
@click.option("--tokens", type=int, default=1024, show_default=True, help="Tokens of a step.")
@click.option("--steps", type=int, default=0, metavar="N", help="Steps, instead of what fits into the budget.")
@click.option("--rungs", metavar="S,S,...", callback=lambda ctx, param, value: tuple(value.split(",")) if value else (),
              help="Sparsities to prune to and train at before the last, a seventh of the budget each.")  # fmt: skip
@click.option("--local", type=float, default=0.0, show_default=True, metavar="SHARE",
              help="Share of the budget that trains block by block first.")  # fmt: skip
@click.option("--embeddings/--no-embeddings", default=True, show_default=True,
              help="Train the tables of embeddings as well; nothing of them is pruned.")  # fmt: skip
@click.option("--qat", type=float, default=0.0, show_default=True, metavar="SHARE",
              help="Share of the budget, at its end, that trains with eight bits; 1: all of it.")  # fmt: skip
@click.option("--target", type=click.Choice(["cpu", "tensorrt"]), default="cpu", show_default=True,
              help="Whose eight bits --qat takes.")  # fmt: skip
@click.option("--labels", metavar="NAME",
              help="The field of the samples that holds their class, a number (of answers START,END), or their tokens' "
                   "classes, a list with -100 for none.")  # fmt: skip
@click.option("--label-weight", type=float, default=0.5, show_default=True, help="Of labels beside the dense model.")
@click.option("--temperature", type=float, default=2.0, show_default=True, help="Of logits that are distilled.")
@click.option("--relations", type=float, default=0.6, show_default=True,
              help="Weight of the similarities of embeddings to those of the latest batches.")  # fmt: skip
@click.option("--weighing", type=click.Choice(["uniform", "sensitivity"]), default="uniform", show_default=True,
              help="Of feature maps: all alike, or by what the outputs feel of an error there.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of samples.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep checkpoints here; run again, it goes on from them.")  # fmt: skip
@click.option("--history", type=click.Path(path_type=Path), metavar="OUT", help="Losses as JSON lines.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="OUT", help="The loss over time, .svg or .png.")
@click.option("--recipe", "recipe_", type=click.Path(path_type=Path), metavar="FILE", is_eager=True,
              callback=lambda ctx, param, value: recipe.as_defaults(ctx, param, shipped(value)),
              help=f"Options from a .toml file, yours or {NAMES}; the command line wins.")  # fmt: skip
def command(
    model: Path, output: Path, masks_options: tuple[str, ...], plot: Path | None, **options: Any
) -> None:  # fmt: skip
    check_model(model)
    del options["recipe_"]
    if plot is not None:
        _check_plot(plot, output, options["history"])
    with terminal.Progress() as progress:
        progress("starting", 0, 1)
        import nmcompile
        from nmcompile.trainer import first

        told = progress if first() else None
        found = nmcompile.train(model, output, masks_options=tuple(masks_options), progress=told, **options)
    if not first():
        return
    if plot is not None:
        from nmcompile.files import write
        from nmcompile.profile.curve import draw

        write(plot, draw(found.history, plot.suffix.lower().lstrip(".")))
    gain = 1 - found.loss_trained / found.loss_pruned if found.loss_pruned > 0 else 0.0
    click.echo(f"{model} -> {output}, {found.seconds:.0f} s, {found.samples} samples")
    click.echo(f"  zeros     {terminal.percent(found.zeros)} of the weights of {len(found.sparsity)} layers")
    click.echo(f"  loss      {found.loss_pruned:.4g} pruned, {found.loss_trained:.4g} trained, "
               f"{terminal.percent(gain)} less, on held-out samples")  # fmt: skip
    for note in found.notes[:10]:
        click.echo(f"  note      {note}")
    click.echo(f"  next      nmcompile {output} -o model.plan --calibration {options['data']}"
               + (f" --tokenizer {options['tokenizer']}" if options["tokenizer"] else ""))  # fmt: skip
