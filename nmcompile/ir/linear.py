"""Finds the linear layers of a graph and rebinds their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.edit import constant, consumers, fresh, is_output, producer, source_constant

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias: a MatMul by a constant [K inputs, N outputs] and the Add of a constant [N], if
    any.

    weight: [N, K] float32, a view of the constant when that is float32. quantized: it came through
    DequantizeLinear.
    """

    node: gs.Node
    name: str
    weight: Array
    bias: Array | None
    x: gs.Tensor
    y: gs.Tensor
    quantized: bool


def linear_layers(graph: gs.Graph) -> list[Linear]:
    """Every linear layer, in the order of the nodes."""
    found = []
    for node in graph.nodes:
        if node.op != "MatMul" or node.domain not in (None, "", "ai.onnx") or constant(node.inputs[0]) is not None:
            continue
        stored = constant(node.inputs[1])
        dequantize = None if stored is not None else producer(node.inputs[1])
        if stored is None and dequantize is not None and dequantize.op == "DequantizeLinear":
            stored = dequantized(dequantize)
        if stored is None or stored.ndim != 2:
            continue
        bias, y = _bias(graph, node, stored.shape[1])
        weight = np.asarray(stored.T, np.float32)  # [N, K]
        found.append(Linear(node, node.name, weight, bias, node.inputs[0], y, dequantize is not None))
    return found


def _bias(graph: gs.Graph, node: gs.Node, size: int) -> tuple[Array | None, gs.Tensor]:
    """(bias [N], the tensor after it), or (None, the MatMul's result)."""
    y = node.outputs[0]
    users = consumers(y)
    if len(users) != 1 or users[0].op != "Add" or is_output(graph, y):
        return None, y
    others = [t for t in users[0].inputs if t is not y]
    bias = constant(others[0]) if len(others) == 1 else None
    if bias is None or bias.shape != (size,):  # CanonicaliseLinear writes other forms like this
        return None, y
    return np.asarray(bias, np.float32), users[0].outputs[0]


def per_feature(value: Array, rank: int, width: int) -> Array | None:
    """A constant as one number per feature [width], where it broadcasts against [..., width] of a rank without changing
    that shape and varies along the last axis alone; else None."""
    if value.ndim > rank or any(size != 1 for size in value.shape[:-1]):
        return None
    if value.ndim and value.shape[-1] not in (1, width):
        return None
    return np.broadcast_to(value.reshape(-1), (width,)).copy()


def dequantized(node: gs.Node) -> Array | None:
    """float32 value of a DequantizeLinear of constants: per tensor, per axis or in blocks; None when one is
    computed."""
    parts = [constant(t) for t in node.inputs if not t.is_empty()]
    stored, scale = (*parts, None, None)[:2]
    zero = parts[2] if len(parts) > 2 else None
    if stored is None or scale is None or (len(parts) > 2 and zero is None):
        return None
    axis = int(node.attrs.get("axis", 1))
    block = int(node.attrs.get("block_size", 0))
    wide = _spread(scale.astype(np.float32), stored.shape, axis, block)
    values = stored.astype(np.float32)
    if zero is not None:
        values -= _spread(zero.astype(np.float32), stored.shape, axis, block)
    return np.asarray(values * wide, np.float32)


def _spread(values: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zero points in a form that broadcasts against `shape`."""
    if values.size == 1:
        return values.reshape(())
    if block:
        return np.repeat(values, block, axis=axis).take(range(shape[axis]), axis=axis)
    dims = [1] * len(shape)
    dims[axis] = -1
    return values.reshape(dims)


def set_bias(graph: gs.Graph, linear: Linear, bias: Array) -> None:
    """Bind a new bias [N] to a layer that has one, and to this layer alone. GraphError for a layer without."""
    if linear.bias is None or bias.shape != linear.bias.shape:
        raise GraphError(f"layer '{linear.name}' has no bias of shape {list(bias.shape)} to replace")
    add = producer(linear.y)
    assert add is not None
    at = next(i for i, t in enumerate(add.inputs) if constant(t) is not None)
    kind = np.asarray(constant(add.inputs[at])).dtype
    add.inputs[at] = gs.Constant(fresh(graph, f"{linear.name}/bias"), np.ascontiguousarray(bias, kind))


def set_weight(graph: gs.Graph, linear: Linear, weight: Array) -> None:
    """Bind a new array [N, K] to the layer's weight; every layer that shares the weight follows.

    GraphError for a quantized layer (its scales would no longer fit) and for another shape.
    """
    if weight.shape != linear.weight.shape:
        raise GraphError(f"layer '{linear.name}': a weight of shape {list(weight.shape)} cannot replace "
                         f"one of {list(linear.weight.shape)}; keep outputs x inputs")  # fmt: skip
    source = None if linear.quantized else source_constant(linear.node.inputs[1])
    if source is None:
        raise GraphError(f"layer '{linear.name}' is quantized: its weight cannot be set; change it before quantizing")
    values = np.ascontiguousarray(weight.T, dtype=source.values.dtype)  # [K, N]
    source.values = values
