"""The source of what nodes make of constants: how a Transpose, Slice, Gather or Split of an initializer moves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.ir.edit import constant, producer
from nmcompile.ir.provenance import (
    Array,
    Broadcast,
    Cast,
    Operation,
    Reshape,
    Slice,
    Source,
    Take,
    Transpose,
    computed,
    moved,
    source,
)

LONGEST = 1 << 16  # entries of an order that are worth recording
FLOAT = 1  # onnx.TensorProto.FLOAT
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))  # which float32 holds exactly
Held = tuple[Array | None, Source | None]  # values where they are moved ones, and where they come from


class Lineage:
    """Follows tensors that depend on constants only."""

    def __init__(self) -> None:
        self._known: dict[int, Held] = {}
        self._tensors: list[gs.Tensor] = []  # so that no id is used twice

    def of(self, tensor: gs.Tensor) -> Source | None:
        """The source of what a tensor will hold; None where nothing of the file goes into it."""
        return self._held(tensor)[1]

    def _held(self, tensor: gs.Tensor) -> Held:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._found(tensor)
            self._tensors.append(tensor)
        return self._known[id(tensor)]

    def _found(self, tensor: gs.Tensor) -> Held:
        node = producer(tensor)
        if isinstance(tensor, gs.Constant) or node is None:
            values = constant(tensor)
            return values, source(tensor)
        parts = [self._held(x) for x in node.inputs if not x.is_empty()]
        values, known = parts[0] if parts else (None, None)
        rule = RULES.get(node.op) if node.domain in (None, "", "ai.onnx") else None
        if rule is not None and values is not None:
            given = [self._held(x)[0] if not x.is_empty() else None for x in node.inputs[1:]]
            place = next(index for index, y in enumerate(node.outputs) if y is tensor)
            try:
                operations = rule(node, values, given, place)
            except (IndexError, ValueError, TypeError):
                operations = None  # what the standard does not allow; whoever runs it says so
            if operations is not None:
                return moved(values, known, operations)
        return None, computed(held[1] for held in parts)


Given = Sequence[Array | None]
Moves = tuple[Operation, ...] | None


def _transpose(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    perm = node.attrs.get("perm") or range(x.ndim)[::-1]
    return (Transpose(tuple(int(axis) for axis in perm)),)


def _reshape(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    if not given or given[0] is None:
        return None
    wanted = [int(size) for size in given[0]]
    if not node.attrs.get("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return (Reshape(x.reshape(wanted).shape),)


def _axes(node: gs.Node, given: Given) -> tuple[int, ...] | None:
    value = node.attrs.get("axes") if not given or given[0] is None else given[0].reshape(-1)
    return None if value is None else tuple(int(axis) for axis in value)


def _squeeze(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    return (Reshape(np.squeeze(x, _axes(node, given)).shape),)


def _unsqueeze(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    axes = _axes(node, given)
    return None if axes is None else (Reshape(np.expand_dims(x, axes).shape),)


def _flatten(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    axis = int(node.attrs.get("axis", 1)) % (x.ndim + 1)
    return (Reshape((int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64)))),)


def _slice(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    starts, ends, axes, steps = (*given, None, None, None, None)[:4]
    if starts is None or ends is None:
        return None
    count = len(starts)
    where = range(count) if axes is None else [int(axis) % x.ndim for axis in axes]
    strides = [1] * count if steps is None else [int(step) for step in steps]
    found: list[Operation] = []
    for axis, start, end, step in zip(where, map(int, starts), map(int, ends), strides, strict=True):
        order = range(x.shape[axis])[start:end:step]
        if not len(order) or len(order) > LONGEST:
            return None
        found.append(Slice(axis, order[0], order[-1] + 1) if step == 1 else Take(axis, tuple(order)))
    return tuple(found)


def _gather(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    index, axis = given[0], int(node.attrs.get("axis", 0)) % x.ndim
    if index is None or index.size > LONGEST:
        return None
    order = tuple(int(at) % x.shape[axis] for at in index.reshape(-1))
    return Take(axis, order), Reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _split(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    axis, count = int(node.attrs.get("axis", 0)) % x.ndim, len(node.outputs)
    if given and given[0] is not None:
        sizes = [int(size) for size in given[0]]
    elif "split" in node.attrs:
        sizes = [int(size) for size in node.attrs["split"]]
    else:
        each = -(-x.shape[axis] // count)
        sizes = [*[each] * (count - 1), x.shape[axis] - each * (count - 1)]
    start = sum(sizes[:place])
    return (Slice(axis, start, start + sizes[place]),)


def _expand(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    if given[0] is None:
        return None
    return (Broadcast(np.broadcast_shapes(x.shape, tuple(int(size) for size in given[0]))),)


def _cast(node: gs.Node, x: Array, given: Given, place: int) -> Moves:
    """To float32 from what that holds exactly; other casts round, each runtime in its own way."""
    exact = node.attrs.get("to") == FLOAT and (x.dtype in NARROW or x.dtype == np.float32)
    return (Cast("float32"),) if exact else None


RULES: Mapping[str, Callable[[gs.Node, Array, Given, int], Moves]] = {
    "Identity": lambda node, x, given, place: (),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Expand": _expand,
    "Cast": _cast,
}
