"""FuseGelu: recognise GELU however an exporter spells it, by computing it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import erf
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.contract import Context, Pass, Report

Array = np.ndarray
PROBE = np.linspace(-6.0, 6.0, 97)  # where a candidate must agree with the definition

ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Pow": lambda a, b: a**b,
    "Erf": lambda a: np.vectorize(erf)(a),
    "Tanh": np.tanh,
    "Neg": lambda a: -a,
}


def gelu(x: Array) -> Array:
    """x * Phi(x) (Hendrycks and Gimpel 2016)."""
    return np.asarray(0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of the same paper."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


FORMULAS = {"none": gelu, "tanh": gelu_tanh}


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Replace the elementwise nodes around an Erf or Tanh that compute GELU by one Gelu node.

    x * 0.5 * (1 + Erf(x / sqrt 2))                          ->  Gelu(x)
    x * 0.5 * (1 + Tanh(0.7979 * (x + 0.044715 * x^3)))      ->  Gelu(x, approximate="tanh")
    """

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: Context) -> Report:
        already = sum(node.op == "Gelu" for node in graph.nodes)
        if graph.opset < 20:
            return Report(notes=(f"Gelu needs opset 20, the graph has {graph.opset}",))
        notes: list[str] = []
        own = {id(node) for node in graph.nodes}
        fused = total = 0
        for anchor in [node for node in graph.nodes if node.op in ("Erf", "Tanh")]:
            match = _match(anchor, own)
            if match is None:
                if anchor.op == "Erf":
                    total += 1
                    notes.append(f"{anchor.name}: Erf not matched, the nodes around it do not compute GELU")
                continue
            total += 1
            x, y, approximate = match
            b = Builder(graph, anchor.name.rsplit("/", 1)[0] or anchor.name)
            new = b("Gelu", x, dtype=y.dtype, shape=y.shape, approximate=approximate)
            g.rewire(graph, y, new)
            fused += 1
        if fused:
            g.cleanup(graph)
        return Report(changed=fused, detail={"matched": f"{fused + already}/{total + already}"}, notes=tuple(notes))


def _match(anchor: gs.Node, own: Collection[int]) -> tuple[gs.Tensor, gs.Tensor, str] | None:
    sources = _upwards(anchor.inputs[0])
    tops = _downwards(anchor.outputs[0], own)
    for y in tops:
        for x in sources:
            if x.shape is not None and y.shape is not None and len(x.shape) != len(y.shape):
                continue  # a constant of higher rank, which Gelu would lose
            values = _evaluate(y, x, 24)
            if values is None:
                continue
            errors = {kind: np.max(np.abs(values - formula(PROBE))) for kind, formula in FORMULAS.items()}
            best = min(errors, key=lambda kind: errors[kind])
            if errors[best] < 2e-4:  # the constants may have been rounded to half precision
                return x, y, best
    return None


def _upwards(tensor: gs.Tensor) -> list[gs.Tensor]:
    """Tensors that feed this one through at most 8 elementwise steps, nearest first."""
    found = [tensor]
    for item in found:
        node = g.producer(item)
        if node is not None and node.op in ELEMENTWISE and len(found) < 9:
            known = {t.name for t in found}
            found += [t for t in node.inputs if g.constant(t) is None and t.name not in known]
    return found


def _downwards(tensor: gs.Tensor, own: Collection[int]) -> list[gs.Tensor]:
    """Results of the elementwise chain after this tensor, nearest first."""
    found: list[gs.Tensor] = []
    while len(found) < 6:
        users = [node for node in g.consumers(tensor) if node.op in ELEMENTWISE and id(node) in own]
        if len(users) != 1:
            break
        tensor = users[0].outputs[0]
        found.append(tensor)
    return found


def _evaluate(y: gs.Tensor, x: gs.Tensor, depth: int) -> Array | None:
    """y as a function of x alone, at the probe points."""
    if y is x:
        return PROBE
    value = g.constant(y)
    if value is not None:
        return np.asarray(value.item(), np.float64) if value.size == 1 else None
    node = g.producer(y)
    if node is None or node.op not in ELEMENTWISE or depth == 0:
        return None
    parts = [_evaluate(item, x, depth - 1) for item in node.inputs]
    if any(part is None for part in parts):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(ELEMENTWISE[node.op](*parts))
