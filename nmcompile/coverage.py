"""What share of a model runs on the engine, and how long each part of a plan takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.cpu.session import Session
from nmcompile.errors import NmcompileError

Arrays = Mapping[str, np.ndarray]

RUNS = 3  # of a plan, of which the fastest counts: the first one opens onnxruntime's sessions
PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


@dataclass(frozen=True)
class Coverage:
    """Linear layers, and multiply-adds of a run on one sample; those that native segments compute.

    multiply_adds 0: the model could not be run for its sizes.
    """

    layers: int
    native_layers: int
    multiply_adds: int = 0
    native_multiply_adds: int = 0

    def to_json(self) -> dict[str, Any]:
        share = self.native_multiply_adds / self.multiply_adds if self.multiply_adds else None
        return {
            "linear_layers": self.layers,
            "native_linear_layers": self.native_layers,
            "multiply_adds": self.multiply_adds,
            "native_share_of_multiply_adds": None if share is None else round(share, 4),
        }


def coverage(graph: gs.Graph, blobs: Mapping[str, bytes], feeds: Arrays | None) -> Coverage:
    """Of a Q/DQ graph whose parts in `blobs` (ONNX) run in onnxruntime; sizes are those of a run on the first sample of
    `feeds`, as every tensor of it is held at once."""
    elsewhere = {node.name for blob in blobs.values() for node in onnx.load_from_string(blob).graph.node}
    layers = [layer.node.name for layer in g.linear_layers(graph)]
    native = sum(name not in elsewhere for name in layers)
    free = {info.name for info in g.inputs(graph) if info.shape and not isinstance(info.shape[0], int)}
    first = {name: array[:1] if name in free else array for name, array in (feeds or {}).items()}
    work = _multiply_adds(graph, first) if first else {}
    return Coverage(len(layers), native, sum(work.values()),
                    sum(count for name, count in work.items() if name not in elsewhere))  # fmt: skip


def _multiply_adds(graph: gs.Graph, feeds: Arrays) -> dict[str, int]:
    """Of each product of the graph (not of those inside loops and branches), dense, zeros and padding counted."""
    nodes = [node for node in graph.nodes if node.op in PRODUCTS]
    names = [name for node in nodes for name in (node.outputs[0].name, *_variable(node.inputs))]
    try:
        values = g.run(graph, feeds, list(dict.fromkeys(names))) if names else {}
    except NmcompileError:
        return {}
    sizes = {name: value.shape for name, value in values.items() if isinstance(value, np.ndarray)}
    return {node.name: prod(sizes[node.outputs[0].name]) * _inner(node, sizes) for node in nodes}


def _variable(tensors: Sequence[gs.Tensor]) -> list[str]:
    return [tensor.name for tensor in tensors if tensor.name and not isinstance(tensor, gs.Constant)]


def _inner(node: gs.Node, sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Products that are summed for one element of what the node gives."""
    at = {"QLinearMatMul": 3, "QLinearConv": 3}.get(node.op, 1)
    second = node.inputs[at]
    shape = tuple(np.shape(second.values)) if isinstance(second, gs.Constant) else sizes[second.name]
    if "Conv" in node.op:
        return prod(shape[1:])
    if node.op == "Gemm":
        return int(shape[1 if node.attrs.get("transB") else 0])
    return int(shape[-2] if len(shape) > 1 else shape[0])


def timed(segments: Sequence[Mapping[str, Any]], session: Session, feeds: Arrays) -> tuple[dict[str, Any], ...]:
    """The plan's segments with the milliseconds that each takes on `feeds`, the fastest of a few runs.

    Of several native segments only their sum is known, which the first one gets.
    """
    best: dict[str, float] = {}
    for _ in range(RUNS):
        found: dict[str, float] = {}
        for step, nanoseconds in session.profile(feeds):
            key = step if step.startswith("onnxruntime ") else "native"
            found[key] = found.get(key, 0.0) + nanoseconds / 1e6
        best = {key: min(value, best.get(key, value)) for key, value in found.items()}
    told = []
    for segment in segments:
        time = best.pop("native" if segment["kind"] == "native" else f"onnxruntime {segment['model']}", None)
        told.append({**segment, **({} if time is None else {"milliseconds": round(time, 3)})})
    return tuple(told)
