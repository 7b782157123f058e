"""nmcompile build-engine RECIPE.json"""

from __future__ import annotations

from pathlib import Path

import click

from nmcompile.cli import terminal

HELP = """Build a TensorRT engine from a recipe that `nmcompile MODEL -o PLAN --target tensorrt` wrote where there
was no GPU. The .onnx files lie beside the recipe.

\b
  nmcompile build-engine model.recipe.json
  nmcompile build-engine model.recipe.json -o model.plan --trt-python /opt/trt/bin/python

Builds a sparse and a dense engine of the same model, times both and keeps the faster, with its description in
PLAN.json. Exit status 3: this machine has no GPU or no TensorRT.
"""


@click.command("build-engine", help=HELP, short_help="Build a TensorRT engine from a recipe.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PLAN", help="Default: as the recipe says.")
@click.option("--trt-python", metavar="PYTHON", help="The Python that has TensorRT. Default: this one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(recipe: Path, output: Path | None, trt_python: str | None, as_json: bool) -> None:
    from nmcompile.backends.tensorrt.build import build, read_description, read_recipe
    from nmcompile.cli.engine import described

    models = [recipe.parent / str(name) for name in read_recipe(recipe)["models"].values()]
    terminal.check_writable(output, recipe, *models)
    with terminal.Progress() as progress:
        plan = build(recipe, trt_python, output, progress)
    facts = read_description(plan)
    if as_json:
        terminal.say_json({"plan": str(plan), **(facts or {})})
        return
    click.echo(f"{recipe} -> {plan}")
    for line in described(facts):
        click.echo(f"  {line}")
