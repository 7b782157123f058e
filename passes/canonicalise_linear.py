"""CanonicaliseLinear: one form for every product with a constant matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.canonical import as_linear
from nmcompile.contract import SHAPES, Context, Pass, Report
from nmcompile.unflatten import unflatten


@dataclass(frozen=True)
class CanonicaliseLinear(Pass):
    """Turn Gemm and merged projections into MatMul + Add.

    Reshape -> Gemm(x, W, b, transB=1) -> Reshape  ->  Add(MatMul(x, W'), b)
    Split(Add(MatMul(x, Wqkv), b), axis=-1)        ->  three MatMul + Add, each with its part of Wqkv
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (SHAPES,)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        notes: list[str] = []
        stored: dict[tuple[str, bool, float], gs.Constant] = {}
        gemms = [_gemm(graph, node, notes, stored) for node in list(graph.nodes) if node.op == "Gemm"]
        for node in graph.nodes:
            if node.op == "Add" and g.constant(node.inputs[0]) is not None and g.constant(node.inputs[1]) is None:
                node.inputs = [node.inputs[1], node.inputs[0]]  # the constant second, one form for readers
        g.cleanup(graph)
        context.infer(graph)
        flat = unflatten(graph)
        g.cleanup(graph)
        split = sum(_split(graph, node) for node in list(graph.nodes) if node.op == "Split")
        g.cleanup(graph)
        if flat or split or any(gemms):
            context.infer(graph)
        return Report(changed=sum(gemms) + flat + split, detail={"linear": len(g.linear_layers(graph))},
                      notes=tuple(notes))  # fmt: skip


def _gemm(
    graph: gs.Graph, node: gs.Node, notes: list[str], known: dict[tuple[str, bool, float], gs.Constant]
) -> int:
    x, y = node.inputs[0], node.outputs[0]
    why = as_linear(node)
    if why is None or why:
        if why != "it is quantized":
            notes.append(f"{node.name}: Gemm kept, {why}")
        return 0
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    weight = g.constant(node.inputs[1])
    assert weight is not None
    outputs = weight.shape[0 if node.attrs.get("transB", 0) else 1]
    bias = g.constant(node.inputs[2]) if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    operations: list[g.Operation] = [g.Transpose((1, 0))] if node.attrs.get("transB", 0) else []
    if alpha != 1.0:
        operations.append(g.Scale(alpha))
    b = Builder(graph, node.name)
    key = (node.inputs[1].name, bool(node.attrs.get("transB", 0)), alpha)
    if not operations:
        known.setdefault(key, node.inputs[1])
    elif key not in known:  # layers that share a weight go on sharing it
        known[key] = b.derived(node.inputs[1], "weight", *operations)
    stored = known[key]
    product = gs.Variable(g.fresh(graph, f"{y.name}/product"), y.dtype, y.shape)
    graph.nodes.append(gs.Node("MatMul", node.name, inputs=[x, stored], outputs=[product]))
    node.name = g.fresh(graph, f"{node.name}/bias")
    if bias is not None and bias.size:
        full = b.derived(node.inputs[2], "bias", g.Reshape((bias.size,)), g.Scale(beta), g.Broadcast((outputs,)))
        graph.nodes.append(gs.Node("Add", node.name, inputs=[product, full], outputs=[y]))
        node.outputs.clear()
    else:
        node.outputs.clear()
        product.inputs[0].outputs = [y]
    return 1


def _split(graph: gs.Graph, node: gs.Node) -> int:
    """A Split of a linear layer's outputs along its last axis becomes one linear layer per part."""
    y = node.inputs[0]
    layer = next((item for item in g.linear_layers(graph) if item.y is y and not item.quantized), None)
    axis = node.attrs.get("axis", 0)
    rank = len(y.shape) if y.shape is not None else None
    if layer is None or (axis != -1 and axis + 1 != rank) or len(g.consumers(y)) != 1 or g.is_output(graph, y):
        return 0
    total, stored = layer.shape[0], layer.node.inputs[1]
    parts = g.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    outputs = list(node.outputs)
    count = len(outputs)
    sizes = [int(v) for v in parts] if parts is not None else [total // count] * count
    if sum(sizes) != total:
        return 0
    start = 0
    offsets = g.bias_of(layer)
    for index, (size, part) in enumerate(zip(sizes, outputs, strict=True)):
        b = Builder(graph, f"{layer.name}/part{index}")
        weight = b.derived(stored, "weight", g.Slice(1, start, start + size))
        shape = [*y.shape[:-1], size]
        name = g.fresh(graph, f"{layer.name}/part{index}")
        target = part if offsets is None else gs.Variable(f"{name}_out", part.dtype, shape)
        part.inputs.clear()
        graph.nodes.append(gs.Node("MatMul", name, inputs=[layer.x, weight], outputs=[target]))
        if offsets is not None:
            bias = b.derived(offsets, "bias", g.Slice(0, start, start + size), g.Cast("float32"),
                            g.Cast(weight.dtype.name))  # fmt: skip
            graph.nodes.append(gs.Node("Add", f"{name}/bias", inputs=[target, bias], outputs=[part]))
        part.shape = shape
        start += size
    node.outputs.clear()
    return 1
