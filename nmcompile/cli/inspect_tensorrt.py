"""What `nmcompile inspect --target tensorrt` prints: a verdict for each layer, then the rules that are broken."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmcompile.cli import terminal

if TYPE_CHECKING:
    from nmcompile.backends.tensorrt.findings import Finding

SHOWN = 3  # nodes named per rule


def report(path: Path, version: str, as_json: bool) -> None:
    """Check the ONNX model at `path` and print what is found. UnsupportedError for a plan or an unknown version."""
    from nmcompile import ir as g
    from nmcompile.backends.tensorrt.profiles import profile
    from nmcompile.backends.tensorrt.rules import check, explain
    from nmcompile.errors import UnsupportedError
    from nmcompile.session import is_plan

    chosen = profile(version)
    if is_plan(path):
        raise UnsupportedError(f"{path} is a plan, --target is for ONNX models; inspect the model it was compiled from")
    graph = g.load(path)
    layers = [asdict(layer) for layer in explain(graph, chosen)]
    findings = check(graph, chosen)
    if as_json:
        terminal.say_json({
            "file": str(path), "kind": "onnx", "target": "tensorrt", "trt_version": chosen.name, "opset": graph.opset,
            "layers": layers, "findings": [asdict(finding) for finding in findings],
        })  # fmt: skip
        return
    click.echo(f"{path}: ONNX model, opset {graph.opset}, by the rules of TensorRT {chosen.name}")
    click.echo()
    _show_layers(layers)
    click.echo()
    _show_findings(findings)


def _show_layers(layers: list[dict[str, Any]]) -> None:
    if not layers:
        click.echo("  no product with a constant weight")
        return
    rows = [
        [layer["name"], f"{layer['outputs']}x{layer['inputs']}", "yes" if layer["pattern"] else "no",
         "int8" if layer["int8"] else "float", layer["epilogue"], layer["verdict"], layer["why"]]
        for layer in layers
    ]  # fmt: skip
    click.echo(terminal.table(["layer", "shape", "2:4", "inputs", "result", "verdict", "why"], rows, right="1"))


def _show_findings(findings: list[Finding]) -> None:
    if not findings:
        click.echo("no rule is broken")
        return
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    for level in ("error", "warning", "note"):
        for (found, rule), group in groups.items():
            if found == level:
                _show_rule(level, rule, group)
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning", "note")}
    click.echo(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items()))


def _show_rule(level: str, rule: str, group: list[Finding]) -> None:
    """`error Q1 x 12: title`, the first nodes with what is wrong there, and each remedy once."""
    colour = {"error": "red", "warning": "yellow"}.get(level)
    click.echo(f"{click.style(level, fg=colour, bold=True)} {rule} x {len(group)}: {group[0].title}")
    for finding in group[:SHOWN]:
        click.echo(f"  {finding.node}: {finding.what}")
    if len(group) > SHOWN:
        click.echo(f"  and {len(group) - SHOWN} more")
    for remedy in dict.fromkeys(finding.remedy for finding in group):
        click.echo(f"  remedy: {remedy}")
