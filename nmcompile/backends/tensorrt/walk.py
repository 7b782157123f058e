"""Walks along edges as TensorRT does when it moves Q and DQ: through operators that leave the values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile import ir as g

Array = npt.NDArray[Any]

Q, DQ = "QuantizeLinear", "DequantizeLinear"
MOVES = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"})  # commute with Q and DQ
CARRIES = MOVES | {"Cast"}
ON_THE_WAY = CARRIES | {Q, DQ}  # between a weight and what reads it


def nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Every node, those of subgraphs after the node that holds them."""
    for node in graph.nodes:
        yield node
        for sub in node.subgraphs():
            yield from nodes(sub)


def behind(tensor: gs.Tensor, ops: frozenset[str]) -> gs.Tensor:
    """The tensor from which this one is made by nothing but `ops`, going by their first inputs."""
    while True:
        node = g.producer(tensor)
        if node is None or node.op not in ops or not node.inputs:
            return tensor
        tensor = node.inputs[0]


def fixed(tensor: gs.Tensor) -> Array | None:
    """The value of a constant, also behind Identity and Cast."""
    return g.constant(behind(tensor, frozenset({"Identity", "Cast"})))


def rooted(tensor: gs.Tensor) -> bool:
    """Whether the tensor is a constant, however quantized, cast or reshaped."""
    return isinstance(behind(tensor, ON_THE_WAY), gs.Constant)


def dequantized(tensor: gs.Tensor, ops: frozenset[str] = CARRIES) -> gs.Node | None:
    """The DequantizeLinear that the tensor comes from through `ops`, if any."""
    node = g.producer(behind(tensor, ops))
    return node if node is not None and node.op == DQ else None


def quantized(dequantize: gs.Node) -> gs.Node | None:
    """The QuantizeLinear before a DequantizeLinear, None for one of a constant."""
    node = g.producer(behind(dequantize.inputs[0], MOVES))
    return node if node is not None and node.op == Q else None


def given(node: gs.Node, index: int) -> gs.Tensor | None:
    """An optional input that is there."""
    return node.inputs[index] if len(node.inputs) > index and not node.inputs[index].is_empty() else None


def kind(tensor: gs.Tensor) -> str | None:
    """numpy's name of the element type ("float16", "bfloat16", "object" for strings), None when it is not known."""
    if tensor.dtype is None:
        return None
    try:
        return str(np.dtype(tensor.dtype).name)
    except TypeError:
        return str(tensor.dtype)


def sizes(tensor: gs.Tensor) -> list[int] | None:
    """The shape when every size is known."""
    if tensor.shape is None or not all(isinstance(dim, (int, np.integer)) for dim in tensor.shape):
        return None
    return [int(dim) for dim in tensor.shape]


def readers(tensor: gs.Tensor, op: str) -> list[gs.Node]:
    """The nodes of one operator that take the tensor as their data."""
    return [node for node in g.consumers(tensor) if node.op == op and node.inputs[0] is tensor]


def axis_of(node: gs.Node, rank: int) -> int:
    """The axis of a Q or DQ, counted from the front."""
    axis = int(node.attrs.get("axis", 1))
    return axis + rank if axis < 0 else axis
