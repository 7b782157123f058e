"""Finds attention by its two products around a Softmax, however masked, scaled, cast or quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.gemms import epilogue

BETWEEN = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Reshape", "Dropout", walk.Q, walk.DQ})
STEPS = 30  # nodes to look at on either side of the Softmax


@dataclass(frozen=True)
class FusedAttention:
    """scores = q k, context = softmax(scores) v; which of them have a Q/DQ pair right before their product."""

    softmax: gs.Node
    scores: gs.Node
    context: gs.Node
    pairs: tuple[tuple[str, bool], ...]  # ("queries", True), ...: what the two products read
    int8_out: bool  # the second product's result is read by Q alone

    @property
    def head_size(self) -> int | None:
        """Features per head, from the operands that say it."""
        queries, keys = self.scores.inputs
        return _known(queries, -1) or _known(keys, -2) or _known(self.context.inputs[1], -1)

    @property
    def length(self) -> int | None:
        """The longer of queries and keys, None while neither is fixed."""
        sizes = (_known(self.scores.inputs[0], -2), _known(self.scores.inputs[1], -1))
        return max((size for size in sizes if size is not None), default=None)


def fused_attentions(graph: gs.Graph) -> Iterator[FusedAttention]:
    """Every Softmax that stands between two products of activations."""
    for node in walk.nodes(graph):
        if node.op != "Softmax":
            continue
        scores, context = _before(node), _after(node)
        if scores is None or context is None:
            continue
        operands = {"queries": scores.inputs[0], "keys": scores.inputs[1], "softmax": context.inputs[0],
                    "values": context.inputs[1]}  # fmt: skip
        pairs = tuple((name, _paired(tensor)) for name, tensor in operands.items())
        yield FusedAttention(node, scores, context, pairs, epilogue(graph, context.outputs[0])[0] == "int8")


def _paired(tensor: gs.Tensor) -> bool:
    # Not behind Reshape or Transpose: there a pair may be the INT8 result of the projection.
    dequantize = walk.dequantized(tensor, frozenset({"Identity"}))
    return dequantize is not None and walk.quantized(dequantize) is not None


def _product(node: gs.Node) -> bool:
    return node.op == "MatMul" and not any(walk.rooted(tensor) for tensor in node.inputs)


def _before(softmax: gs.Node) -> gs.Node | None:
    todo = [softmax.inputs[0]]
    for _ in range(STEPS):
        node = g.producer(todo.pop(0)) if todo else None
        if node is not None and _product(node):
            return node
        if node is not None and node.op in BETWEEN:
            todo += node.inputs
    return None


def _after(softmax: gs.Node) -> gs.Node | None:
    todo = [softmax.outputs[0]]
    for _ in range(STEPS):
        tensor = todo.pop(0) if todo else None
        for node in g.consumers(tensor) if tensor is not None else ():
            if node.op == "MatMul" and node.inputs[0] is tensor and _product(node):
                return node
            if node.op in BETWEEN:
                todo += node.outputs
    return None


def _known(tensor: gs.Tensor, axis: int) -> int | None:
    shape = tensor.shape
    if shape is None or len(shape) < 2 or not isinstance(shape[axis], int):
        return None
    return int(shape[axis])
