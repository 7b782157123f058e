"""nmcompile inspect FILE"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from nmcompile.cli import terminal
from nmcompile.errors import NmcompileError, PlanError

HELP = """Show what is in an ONNX model or a plan: inputs, outputs, segments, and each linear layer with its shape
(outputs x inputs), density, pattern of zeros, precision and kernel.

\b
  nmcompile inspect model.onnx          # is it sparse already, and in which pattern?
  nmcompile inspect model.plan
  nmcompile inspect model.plan --json

With --target tensorrt, what TensorRT will make of each layer of an ONNX model, and which of its rules the model breaks:

\b
  nmcompile inspect emitted.onnx --target tensorrt --trt-version 10
"""


@click.command("inspect", help=HELP, short_help="Show what is in an ONNX model or a plan.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["tensorrt"]), help="Check an ONNX model against this target's rules.")
@click.option("--trt-version", metavar="VERSION", help="Of TensorRT: 8.6, 10 or 11; 10 by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: Path, target: str | None, trt_version: str | None, as_json: bool) -> None:
    from nmcompile.session import is_plan

    if target is not None:
        from nmcompile.cli import inspect_tensorrt

        inspect_tensorrt.report(file, trt_version or "10", as_json)
        return
    if trt_version is not None:
        raise click.UsageError("--trt-version is for --target tensorrt; give both")
    if not is_plan(file):
        found = model_facts(file)
        terminal.say_json(found) if as_json else show(found)
        return
    found = plan_facts(file)
    try:
        terminal.say_json(found) if as_json else show(found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # what a header says may be of any kind
        raise _damaged(file, error) from None


def plan_facts(path: Path) -> dict[str, Any]:
    """What a plan's header says."""
    from nmcompile.backends.tensorrt.build import read_description
    from nmcompile.plan import read_plan

    engine = read_description(path)
    if engine is not None:
        return {"file": str(path), "kind": "engine", "bytes": path.stat().st_size, **engine}
    with read_plan(path) as plan:
        header = plan.header
    try:
        segments = []
        for item in header["segments"]:
            facts = {"kind": item["kind"], "inputs": item["inputs"], "outputs": item["outputs"]}
            if item["kind"] == "native":
                facts["steps"] = dict(Counter(step["step"] for step in item["steps"]))
            else:
                facts |= {"nodes": item["nodes"], "operators": item["operators"]}
            segments.append(facts)
        return {
            "file": str(path), "kind": "plan", "bytes": path.stat().st_size, "target": header["target"],
            "nmcompile": header.get("nmcompile"), "passes": header.get("passes", []),
            "inputs": header["inputs"], "outputs": header["outputs"], "segments": segments, "layers": header["layers"],
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> NmcompileError:
    why = f"{type(error).__name__}: {str(error)[:100]}"
    return PlanError(f"the description in {path} is damaged ({why}); compile it again")


def model_facts(path: Path) -> dict[str, Any]:
    """What an ONNX model holds."""
    from nmcompile import ir as g
    from nmcompile import sparsity as sp
    from nmcompile.compiler import model_bytes
    from nmcompile.ir.text import type_name

    graph = g.load(path)
    layers = []
    for layer in g.linear_layers(graph):
        found = sp.detect(layer.weight)
        stored = g.constant(layer.node.inputs[1])
        layers.append({
            "name": layer.name, "outputs": layer.weight.shape[0], "inputs": layer.weight.shape[1],
            "density": round(float(sp.density(layer.weight)), 4),
            "pattern": "dense" if found is None else str(found.pattern),
            "orientation": None if found is None else found.orientation,
            "precision": "int8" if layer.quantized else "?" if stored is None else type_name(stored.dtype),
        })  # fmt: skip
    return {
        "file": str(path), "kind": "onnx", "bytes": model_bytes(path), "opset": graph.opset,
        "nodes": len(graph.nodes), "operators": dict(Counter(node.op for node in graph.nodes).most_common()),
        "inputs": [_info(info) for info in g.inputs(graph)], "outputs": [_info(info) for info in g.outputs(graph)],
        "layers": layers,
    }  # fmt: skip


def _info(info: Any) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)}


def show_engine(found: dict[str, Any]) -> None:
    """An engine by its description: what was built, and how its layers were meant to run."""
    from nmcompile.cli.engine import described

    click.echo(f"{found['file']}: engine for tensorrt, made by nmcompile {found['nmcompile']}, "
               f"{terminal.size(found['bytes'])}")  # fmt: skip
    for line in described(found):
        click.echo(f"  {line}")
    for name, ranges in (found.get("shapes") or {}).items():
        sizes = ", ".join("x".join(map(str, ranges[key])) for key in ("min", "opt", "max"))
        click.echo(f"  input {name}: {sizes} (min, opt, max)")
    rows = [[layer["name"], f"{layer['outputs']}x{layer['inputs']}", layer["verdict"], layer["why"]]
            for layer in found.get("layers", ())]  # fmt: skip
    if rows:
        click.echo("\n" + terminal.table(["layer", "shape", "expected", "why"], rows, right="1"))


def show(found: dict[str, Any]) -> None:
    """The facts for people."""
    if found["kind"] == "engine":
        show_engine(found)
        return
    if found["kind"] == "plan":
        head = f"plan for {found['target']}, made by nmcompile {found['nmcompile']}"
    else:
        head = f"ONNX model, opset {found['opset']}, {found['nodes']} nodes"
    click.echo(f"{found['file']}: {head}, {terminal.size(found['bytes'])}")
    for title in ("inputs", "outputs"):
        for index, item in enumerate(found[title]):
            shape = ", ".join("?" if dim is None else str(dim) for dim in item["shape"])
            click.echo(f"  {title if index == 0 else '':10}{item['name']}: {item['dtype']}[{shape}]")
    if "operators" in found:
        click.echo(f"  operators {', '.join(f'{op} {count}' for op, count in found['operators'].items())}")
    for index, item in enumerate(found.get("segments", ())):
        what = (f"native, {sum(item['steps'].values())} steps" if item["kind"] == "native"
                else f"{item['kind']}, {item['nodes']} nodes ({', '.join(item['operators'])})")  # fmt: skip
        click.echo(f"  {'segments' if index == 0 else '':10}{what}")
    if found.get("passes"):
        click.echo(f"  passes    {', '.join(found['passes'])}")
    if not found["layers"]:
        click.echo("  no linear layers" + (" on the engine" if found["kind"] == "plan" else ""))
        return
    click.echo()
    rows = []
    for item in found["layers"]:
        pattern = item["pattern"]
        if item.get("orientation") == "outputs":
            pattern += " along outputs"
        rows.append([item["name"], f"{item['outputs']}x{item['inputs']}", terminal.percent(item["density"]), pattern,
                     item["precision"], item.get("kernel", "")])  # fmt: skip
    header = ["layer", "shape", "density", "pattern", "precision", "kernel"]
    columns = 6 if found["kind"] == "plan" else 5
    click.echo(terminal.table(header[:columns], [row[:columns] for row in rows], right="12"))
