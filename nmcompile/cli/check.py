"""nmcompile check MODEL"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nmcompile.cli import recipe, terminal
from nmcompile.errors import NmcompileError

KEPT = frozenset({
    "target", "preset", "passes", "sparsity", "pattern", "solver", "size", "calibration", "tokenizer", "max_length",
    "attention", "reduce_range", "tuning", "require", "verify", "max_drop", "checkpoints",
})  # fmt: skip
ELSEWHERE = frozenset({"fast", "no_tune"})  # options that others say
ENGINE = {"trt_version": "version", "int8_outputs": "outputs", "weights": "weights"}  # of an engine's graph

HELP = """Compile a model and compare everything that comes out of it with a recorded baseline; for CI.

\b
  nmcompile check model.onnx --recipe recipe.toml            # the first time: records the baseline
  nmcompile check model.onnx --recipe recipe.toml            # then: fails, with a diff, when something changed
  nmcompile check model.onnx --recipe recipe.toml --record   # the change was meant: record anew, and commit it

The baseline is DIR/NAME-OF-MODEL: the graph as text in canonical form, after pruning and after quantization, and
facts.json with the passes, each layer's density and kernel, the error of the plan against the model, what the plan
gives for seeded inputs, and the plan's hash. It holds no timings and no weights. Floats are compared with the
tolerances that stand in facts.json, so that another machine agrees; the hash is compared only where versions and CPU
are those of the recording. A recipe holds the options of `nmcompile compile`; those about files to write and about
engines have no effect here, which is said. Kernels are chosen by the cost model, or by the recipe's table.
For TensorRT the graph is recorded, run in onnxruntime, not an engine.
"""


@click.command("check", help=HELP, short_help="Compare with a recorded baseline; for CI.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--record", "again", is_flag=True, help="Write the baseline anew.")
@click.option("--baseline", type=click.Path(path_type=Path), default=Path("baselines"), show_default=True,
              metavar="DIR", help="Where baselines are kept.")  # fmt: skip
@click.option("--recipe", "recipe_", type=click.Path(path_type=Path), metavar="FILE", help="Options of compile.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="DATA", help="Samples: .npz, .jsonl, folder.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="PATH", help="tokenizer.json, for texts.")
def command(model: Path, again: bool, baseline: Path, recipe_: Path | None, calibration: Path | None,
            tokenizer: Path | None) -> None:  # fmt: skip
    from nmcompile.cli.compile import check_model
    from nmcompile.cli.compile import command as compile_command

    check_model(model)
    options: dict[str, Any] = {}
    if recipe_ is not None:
        options = taken(recipe.read(recipe_, compile_command))
    samples = {"calibration": calibration, "tokenizer": tokenizer}
    options |= {key: value for key, value in samples.items() if value is not None}
    with terminal.Progress() as progress:
        progress("starting", 0, 1)
        from nmcompile import regression

        place = regression.place(model, baseline)
        if again or not (place / regression.FACTS).exists():
            facts = regression.record(model, baseline, progress=progress, **options)
            changes = None
        else:
            changes = regression.compare(model, baseline, progress=progress, **options)
    if changes is None:
        click.echo(f"recorded {place}: {len(facts.layers)} layers, {len(facts.outputs)} outputs; commit it")
        if "calibration" not in options:
            click.echo("the figures are those of made-up inputs; give --calibration for real ones", err=True)
    elif changes:
        click.echo("\n".join(changes))
        raise NmcompileError(f"{model} differs from {place} in {len(changes)} ways; if that is meant, add --record")
    else:
        click.echo(f"{model} agrees with {place}")


def taken(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `nmcompile.compile` among those of a recipe; the others are named on stderr."""
    options = {key: value for key, value in given.items() if key in KEPT}
    if given.get("fast"):
        options["preset"] = "fast"
    if given.get("no_tune"):
        options["tuning"] = "off"
    if options.get("target") == "tensorrt":
        from nmcompile.backends.tensorrt.recipe import EngineOptions

        engine: dict[str, Any] = {ENGINE[key]: value for key, value in given.items() if key in ENGINE}
        options["engine"] = EngineOptions(**engine)
    used = KEPT | ELSEWHERE | (ENGINE.keys() if "engine" in options else frozenset())
    said = {key: value for key, value in given.items() if key not in used and value is not (key == "measure")}
    dropped = [f"--{'no-' if value is False else ''}{key.replace('_', '-')}" for key, value in said.items()]
    if dropped:
        click.echo(f"without effect on a baseline: {', '.join(dropped)}", err=True)
    return options
