"""What a constant weight is when a product reads it: followed through Transpose, Q and DQ, value by value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.walk import Array


@dataclass(frozen=True)
class Weight:
    """A weight of `outputs` x `inputs`; the inputs are what the product sums over, of a Conv its channels per group.

    stored: the constant's values are 2:4 along the inputs. rounded: what Q makes of them is (the same without a Q).
    broken: groups of four rounded values with more than two non-zeros, of `groups`. follows: each scale belongs to
    one output. clipped: values that Q takes beyond +-127. dequantize: the DQ, None for a float weight.
    """

    outputs: int
    inputs: int
    density: float
    stored: bool
    rounded: bool
    broken: int
    groups: int
    follows: bool
    clipped: int
    constant: gs.Constant
    dequantize: gs.Node | None

    @property
    def pattern(self) -> bool:
        """2:4 before and after rounding."""
        return self.stored and self.rounded


@dataclass
class _Trace:
    """Arrays that all go through the same transpositions: values, what they round to, the number of their scale."""

    values: Array
    levels: Array | None = None
    channel: Array | None = None
    dequantize: gs.Node | None = None

    def each(self, move: Callable[[Array], Array]) -> None:
        """Move all of them alike."""
        self.values = move(self.values)
        self.levels = None if self.levels is None else move(self.levels)
        self.channel = None if self.channel is None else move(self.channel)


def weight_of(node: gs.Node) -> Weight | None:
    """The weight of a MatMul, Gemm or Conv: of input 1, None unless that is a constant of fitting rank."""
    source = walk.behind(node.inputs[1], walk.ON_THE_WAY)
    if not isinstance(source, gs.Constant):
        return None
    trace = _follow(node.inputs[1], np.asarray(source.values))
    if trace is None or not _outputs_first(node, trace):
        return None
    levels = trace.values if trace.levels is None else trace.levels
    broken, groups = _broken(levels)
    first = (slice(None), *[slice(0, 1)] * (trace.values.ndim - 1))
    channel = trace.channel
    return Weight(
        outputs=int(trace.values.shape[0]), inputs=int(trace.values.shape[-1]), density=sp.density(levels),
        stored=_broken(trace.values)[0] == 0, rounded=broken == 0, broken=broken, groups=groups,
        follows=channel is None or bool((channel == channel[first]).all() and np.unique(channel[first]).size > 1),
        clipped=0 if trace.levels is None else int(np.count_nonzero(np.abs(levels) > 127)),
        constant=source, dequantize=trace.dequantize,
    )  # fmt: skip


def _follow(tensor: gs.Tensor, values: Array) -> _Trace | None:
    """The constant's way to `tensor`; None where a shape on it is not known."""
    path = []
    while not isinstance(tensor, gs.Constant):
        node = g.producer(tensor)
        assert node is not None
        path.append(node)
        tensor = node.inputs[0]
    trace = _Trace(values)
    for node in reversed(path):
        if node.op == "Transpose":
            trace.each(partial(np.transpose, axes=node.attrs.get("perm")))
        elif node.op in (walk.Q, walk.DQ):
            _scale(node, trace)
        elif node.op in walk.MOVES and node.op != "Identity":
            shape = walk.sizes(node.outputs[0])
            if shape is None or int(np.prod(shape)) != trace.values.size:
                return None
            trace.each(partial(_reshaped, shape=shape))
    return trace


def _scale(node: gs.Node, trace: _Trace) -> None:
    """What Q or DQ does to the trace; scales that rules Q3 and Q4 refuse leave it as it is."""
    if node.op == walk.DQ:
        trace.dequantize = node
    if trace.levels is not None:
        return
    scale = walk.fixed(node.inputs[1])
    axis = walk.axis_of(node, trace.values.ndim)
    if scale is None or scale.ndim > 1 or not (scale.astype(np.float32) > 0).all():
        return
    if scale.size > 1:
        if axis >= trace.values.ndim or trace.values.shape[axis] != scale.size:
            return
        dims = [1] * trace.values.ndim
        dims[axis] = -1
        scale = scale.reshape(dims)
        number = np.arange(scale.size, dtype=np.int32).reshape(dims)
        trace.channel = np.broadcast_to(number, trace.values.shape)
    else:
        scale = scale.reshape(())
    if node.op == walk.DQ:
        trace.levels = trace.values if trace.values.dtype.kind in "iu" else None
        return
    with np.errstate(over="ignore"):
        levels = np.rint(trace.values.astype(np.float32) / scale.astype(np.float32))
    trace.levels = np.clip(levels, -129, 128).astype(np.int16)  # one beyond either end of int8 tells what is cut off


def _reshaped(array: Array, shape: list[int]) -> Array:
    return array.reshape(shape)


def _outputs_first(node: gs.Node, trace: _Trace) -> bool:
    """Bring the arrays to [outputs, ..., inputs]; False for a rank that is no weight's."""
    shape = trace.values.shape
    if node.op == "Conv":
        if len(shape) < 3:
            return False
        trace.each(lambda array: np.moveaxis(array, 1, -1))
        return True
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]):
        return False
    trace.each(lambda array: array.reshape(shape[-2:]))
    if node.op == "MatMul" or not node.attrs.get("transB", 0):
        trace.each(lambda array: array.T)
    return True


def _broken(array: Array) -> tuple[int, int]:
    """(groups of four along the last axis with more than two non-zeros, groups); a ragged row breaks all of it."""
    size = array.shape[-1]
    groups = -(-array.size // 4)
    if size % 4 or not array.size:
        return groups, groups
    kept = (array != 0).reshape(*array.shape[:-1], size // 4, 4).sum(axis=-1, dtype=np.uint8)
    return int(np.count_nonzero(kept > 2)), groups
