"""ScaleQueries: let the layer that makes queries take on the factor of attention's scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.canonical import Attention, attentions
from nmcompile.contract import Context, Pass, Report

KEPT = ("Reshape", "Transpose", "QuantizeLinear", "DequantizeLinear")  # a factor passes through them


@dataclass(frozen=True)
class ScaleQueries(Pass):
    """Move the factor of the scores from behind the first product of an attention to the queries.

    q = MatMul(x, W) + b;  Mul(MatMul(q, k), s)   ->   q = MatMul(x, s * W) + s * b;  MatMul(q, k)

    TensorRT fuses an attention whose product is not followed by a scale. Scales of Q/DQ pairs on the way are
    multiplied, so that all integers stay as they were.
    """

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: Context) -> Report:
        layers = {layer.y.name: layer for layer in g.linear_layers(graph)}
        notes, changed = [], 0
        for attention in attentions(graph):
            product, _ = attention.readers[0]
            mul = g.consumers(product.outputs[0])[0]
            if attention.scale != 1.0:
                path = _path(graph, product, layers)
                if path is None:
                    notes.append(f"{attention.name}: scores are scaled behind the product, queries have other readers")
                    continue
                scaled: dict[str, gs.Constant] = {}
                for node in path[1]:
                    node.inputs[1] = _scaled(graph, node.inputs[1], attention, scaled)
                _scale_layer(graph, path[0], attention, scaled)
            g.rewire(graph, mul.outputs[0], product.outputs[0])
            changed += 1
        if changed:
            g.cleanup(graph)
        return Report(changed=changed, notes=tuple(notes))


def _path(
    graph: gs.Graph, product: gs.Node, layers: dict[str, g.Linear]
) -> tuple[g.Linear, list[gs.Node]] | None:
    """(the layer that makes the queries, the Q and DQ nodes on the way); None where anything else reads them."""
    tensor, reader = product.inputs[0], product
    pairs: list[gs.Node] = []
    while True:
        if g.consumers(tensor) != [reader] and [id(n) for n in g.consumers(tensor)] != [id(reader)]:
            return None
        if g.is_output(graph, tensor):
            return None
        if tensor.name in layers:
            layer = layers[tensor.name]
            return None if len(g.consumers(layer.node.inputs[1])) > 1 else (layer, pairs)
        node = g.producer(tensor)
        if node is None or node.op not in KEPT:
            return None
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            if g.constant(node.inputs[1]) is None:
                return None
            pairs.append(node)
        tensor, reader = node.inputs[0], node


def _scale_layer(graph: gs.Graph, layer: g.Linear, attention: Attention, scaled: dict[str, gs.Constant]) -> None:
    if layer.quantized:
        dequantize = g.producer(layer.node.inputs[1])
        assert dequantize is not None
        dequantize.inputs[1] = _scaled(graph, dequantize.inputs[1], attention, scaled)
    else:
        g.set_weight(graph, layer, layer.weight * np.float32(attention.scale))
    if layer.bias is not None:
        g.set_bias(graph, layer, layer.bias * np.float32(attention.scale))


def _scaled(graph: gs.Graph, tensor: gs.Tensor, attention: Attention, scaled: dict[str, gs.Constant]) -> gs.Constant:
    """The constant times the factor; one for all readers that shared one."""
    if tensor.name not in scaled:
        values = np.asarray(np.asarray(g.constant(tensor), np.float32) * np.float32(attention.scale))
        scaled[tensor.name] = gs.Constant(g.fresh(graph, f"{tensor.name}/times_scale"), values)
    return scaled[tensor.name]
