"""Finds the products with constant weights, what quantizes their inputs and what follows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.weights import Weight, weight_of

# What an INT8 product computes before it rounds: bias, activation, and the parts of a GELU or SiLU.
EPILOGUE = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "LeakyRelu", "Elu", "Selu", "Clip",
    "HardSwish", "HardSigmoid", "Softplus", "Mish", "PRelu",
})  # fmt: skip


@dataclass(frozen=True)
class Gemm:
    """A MatMul, Gemm or Conv with a constant weight; x is what it multiplies it by."""

    node: gs.Node
    weight: Weight
    x: gs.Tensor
    dequantize: gs.Node | None  # that makes x out of an INT8 tensor
    epilogue: str  # "int8" when all that reads the result, behind bias and activation, is a Q; else "float"
    reader: str  # the node that takes the result in float

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def int8(self) -> bool:
        """Both inputs come out of a DQ."""
        return self.dequantize is not None and self.weight.dequantize is not None


def gemms(graph: gs.Graph) -> tuple[Gemm, ...]:
    """Every product with a constant weight, in the order of the nodes, those of subgraphs too."""
    found = []
    for node in walk.nodes(graph):
        if node.op not in ("MatMul", "Gemm", "Conv") or node.domain not in (None, "", "ai.onnx"):
            continue
        weight = None if walk.rooted(node.inputs[0]) else weight_of(node)
        if weight is not None:
            kind, reader = epilogue(graph, node.outputs[0])
            x = node.inputs[0]
            found.append(Gemm(node, weight, x, walk.dequantized(x), kind, reader))
    return tuple(found)


def epilogue(graph: gs.Graph, y: gs.Tensor) -> tuple[str, str]:
    """("int8", "") when everything computed from `y` alone, by bias and activation, is read by nothing but Q; else
    ("float", the node, or the graph output, that reads it so)."""
    inside = {id(y)}
    todo = [y]
    waiting: list[gs.Node] = []  # nodes that mix the result with something else, or with a part of itself to come
    quantizes = 0
    while todo:
        tensor = todo.pop()
        if g.is_output(graph, tensor):
            return "float", f"the output '{tensor.name}'"
        for node in [*waiting, *g.consumers(tensor)]:
            if id(node.outputs[0]) in inside:
                continue
            if node.op == walk.Q and node.inputs[0] is tensor:
                quantizes += 1
                continue
            if node.op not in EPILOGUE | walk.CARRIES:
                return "float", f"node '{node.name}' ({node.op})"
            data = node.inputs[:1] if node.op in walk.CARRIES else node.inputs
            if all(id(t) in inside or t.is_empty() or walk.rooted(t) for t in data):
                waiting = [other for other in waiting if other is not node]
                inside.add(id(node.outputs[0]))
                todo.append(node.outputs[0])
            elif not any(other is node for other in waiting):
                waiting.append(node)
    if waiting:
        return "float", f"node '{waiting[0].name}' ({waiting[0].op})"
    return ("int8", "") if quantizes else ("float", "no node at all")


def merge_groups(found: Iterable[Gemm]) -> list[list[Gemm]]:
    """Products that read the same tensor, quantized once or float: TensorRT may run each group as one."""
    groups: dict[int, list[Gemm]] = {}
    for gemm in found:
        if gemm.node.op == "Conv":
            continue
        tensor = walk.behind(gemm.x, walk.CARRIES)
        if gemm.dequantize is not None:
            tensor = walk.behind(gemm.dequantize.inputs[0], walk.MOVES)
        groups.setdefault(id(tensor), []).append(gemm)
    return [group for group in groups.values() if len(group) > 1]


def after_bias(gemm: Gemm) -> gs.Tensor:
    """The product's result, behind the Add of a constant if that is all that reads it."""
    y: gs.Tensor = gemm.node.outputs[0]
    users = g.consumers(y)
    if len(users) != 1 or users[0].op != "Add":
        return y
    others = [t for t in users[0].inputs if t is not y]
    return users[0].outputs[0] if len(others) == 1 and walk.rooted(others[0]) else y
