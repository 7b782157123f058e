"""Finds the linear layers of a graph and rebinds their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.edit import constant, consumers, is_output, producer, source_constant
from nmcompile.ir.names import fresh
from nmcompile.ir.provenance import Take, changed, derived, permuted, source, with_source

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias: a MatMul by a constant [K inputs, N outputs] and the Add of a constant [N], if
    any.

    shape: (N, K). quantized: the weight came through DequantizeLinear.
    """

    node: gs.Node
    name: str
    shape: tuple[int, int]
    bias: Array | None
    x: gs.Tensor
    y: gs.Tensor
    quantized: bool
    _read: Callable[[], Array] = field(repr=False, compare=False)  # [K, N]

    @cached_property
    def weight(self) -> Array:
        """[N, K] float32 as it was when the layer was found, a view of the constant when that is float32."""
        return np.asarray(self._read().T, np.float32)


def linear_layers(graph: gs.Graph) -> list[Linear]:
    """Every linear layer, in the order of the nodes."""
    found = []
    for node in graph.nodes:
        if node.op != "MatMul" or node.domain not in (None, "", "ai.onnx") or constant(node.inputs[0]) is not None:
            continue
        stored = constant(node.inputs[1])
        dequantize = None if stored is not None else producer(node.inputs[1])
        read: Callable[[], Array] | None = None if stored is None else partial(np.asarray, stored)
        if dequantize is not None and dequantize.op == "DequantizeLinear":
            pair = _Quantized.of(dequantize)
            stored, read = (None, None) if pair is None else (pair.stored, pair.values)
        if stored is None or read is None or stored.ndim != 2:
            continue
        inputs, outputs = stored.shape
        bias, y = _bias(graph, node, outputs)
        quantized = dequantize is not None
        found.append(Linear(node, node.name, (outputs, inputs), bias, node.inputs[0], y, quantized, read))
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
    found = _Quantized.of(node)
    return None if found is None else found.values()


@dataclass(frozen=True)
class _Quantized:
    """The constants of a DequantizeLinear."""

    stored: Array
    scale: Array
    zero: Array | None
    axis: int
    block: int

    @classmethod
    def of(cls, node: gs.Node) -> _Quantized | None:
        parts = [constant(t) for t in node.inputs if not t.is_empty()]
        stored, scale = (*parts, None, None)[:2]
        zero = parts[2] if len(parts) > 2 else None
        if stored is None or scale is None or (len(parts) > 2 and zero is None):
            return None
        return cls(stored, scale, zero, int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0)))

    def values(self) -> Array:
        """In float32."""
        shape = self.stored.shape
        wide = _spread(self.scale.astype(np.float32), shape, self.axis, self.block)
        values = self.stored.astype(np.float32)
        if self.zero is not None:
            values -= _spread(self.zero.astype(np.float32), shape, self.axis, self.block)
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
    add, at = _bias_place(linear)
    kind = np.asarray(constant(add.inputs[at])).dtype
    made = gs.Constant(fresh(graph, f"{linear.name}/bias"), np.ascontiguousarray(bias, kind))
    add.inputs[at] = changed(made, add.inputs[at])


def set_weight(graph: gs.Graph, linear: Linear, weight: Array) -> None:
    """Bind a new array [N, K] to the layer's weight; every layer that shares the weight follows.

    GraphError for a quantized layer (its scales would no longer fit) and for another shape.
    """
    if weight.shape != linear.shape:
        raise GraphError(f"layer '{linear.name}': a weight of shape {list(weight.shape)} cannot replace "
                         f"one of {list(linear.shape)}; keep outputs x inputs")  # fmt: skip
    stored = _float_weight(linear)
    values = np.ascontiguousarray(weight.T, dtype=stored.values.dtype)  # [K, N]
    stored.values = values
    changed(stored, stored)


def reorder(graph: gs.Graph, linear: Linear, order: Sequence[int] | Array, *, outputs: bool) -> None:
    """Put a layer's outputs, with their biases, or its inputs into another order; every layer that shares the weight
    follows. GraphError for a quantized layer."""
    stored = _float_weight(linear)
    axis = 1 if outputs else 0
    known = permuted(source(stored), order, axis)
    stored.values = np.ascontiguousarray(np.asarray(stored.values).take(np.asarray(order), axis))
    with_source(stored, known)
    if outputs and linear.bias is not None:
        add, at = _bias_place(linear)
        add.inputs[at] = derived(add.inputs[at], fresh(graph, f"{linear.name}/bias"), Take(0, tuple(map(int, order))))


def _bias_place(linear: Linear) -> tuple[gs.Node, int]:
    """The node that adds a layer's bias, and which of its inputs that is."""
    add = producer(linear.y)
    assert add is not None
    return add, next(i for i, t in enumerate(add.inputs) if constant(t) is not None)


def _float_weight(linear: Linear) -> gs.Constant:
    stored = None if linear.quantized else source_constant(linear.node.inputs[1])
    if stored is None:
        raise GraphError(f"layer '{linear.name}' is quantized: its weight cannot be set; change it before quantizing")
    return stored


def weight_of(linear: Linear) -> gs.Constant:
    """The constant that holds a layer's weight [K, N], in integers where it is quantized."""
    tensor = linear.node.inputs[1]
    maker = producer(tensor) if linear.quantized else None
    stored = source_constant(tensor if maker is None else maker.inputs[0])
    assert stored is not None
    return stored


def bias_of(linear: Linear) -> gs.Constant | None:
    """The constant that holds a layer's bias [N]."""
    if linear.bias is None:
        return None
    add, at = _bias_place(linear)
    return source_constant(add.inputs[at])


def layer_keys(graph: gs.Graph) -> dict[str, str]:
    """One key for each linear layer, by its name: what of the source file its weight is ("qkv.weight[1: 0-384]").

    It stays the same from the canonical graph to the quantized one. Layers that share what they are made of, or that
    are made of nothing in the file, also have their name in it.
    """
    known = {layer.name: source(weight_of(layer)) for layer in linear_layers(graph)}
    keys = {name: "" if found is None else found.key for name, found in known.items()}
    uses = Counter(keys.values())
    return {name: key if key and uses[key] == 1 else f"{key}@{name}" for name, key in keys.items()}
