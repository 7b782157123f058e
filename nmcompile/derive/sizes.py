"""Rules of shapes: operators that read or make sizes, and those of which only the result's shape is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.derive.elementwise import Made, Rule, given
from nmcompile.derive.movement import axes_of, product
from nmcompile.derive.value import Shape, Underived, Value, broadcast, constant, number
from nmcompile.symbolic import ONE, Index, Poly, Running, Size, floor_divided, never_negative, poly


def _listed(items: Sequence[Poly]) -> Made:
    def at(index: Shape) -> Poly:
        place = index[0].integer
        if place is None:
            raise Underived("a size picked by what is not constant")
        return items[place]

    return [((poly(len(items)),), at)]


def _shape(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(x.shape))
    return _listed(x.shape[slice(int(start), int(end))])


def _size(node: gs.Node, args: Sequence[Value | None]) -> Made:
    total = product(given(args, 0).shape)
    return [((), lambda index: total)]


def _constant(node: gs.Node, args: Sequence[Value | None]) -> Made:
    value = node.attrs.get("value")
    array = getattr(value, "values", value)
    if array is None:
        found = next((node.attrs[k] for k in ("value_int", "value_ints", "value_float", "value_floats")
                      if k in node.attrs), None)  # fmt: skip
        array = np.asarray(found)
    array = np.asarray(array)
    held = constant(node.outputs[0].name, array.shape, array.dtype.kind, lambda: array)
    return [(held.shape, held.at)]


def _constant_of_shape(node: gs.Node, args: Sequence[Value | None]) -> Made:
    value = node.attrs.get("value")
    item = np.asarray(getattr(value, "values", 0.0 if value is None else value)).reshape(-1)[0]
    return [(tuple(given(args, 0).entries()), lambda index: number(item))]


def _range(node: gs.Node, args: Sequence[Value | None]) -> Made:
    first, end, step = (given(args, place).entries()[0] for place in range(3))
    if step.integer is None or step.integer <= 0 or not first.whole or not end.whole:
        raise Underived("a range that does not count up")
    count = end - first
    if step != ONE:
        count = floor_divided(count + (step - 1), step)[0]
    if not never_negative(count):
        raise Underived(f"a range of {count} numbers")
    return [((count,), lambda index: first + index[0] * step)]


def _alike(node: gs.Node, args: Sequence[Value | None]) -> Made:
    return [(given(args, 0).shape, None)]


def _matmul(node: gs.Node, args: Sequence[Value | None]) -> Made:
    a, b = given(args, 0).shape, given(args, 1).shape
    if len(a) < 2 or len(b) < 2:
        if len(a) == 1 and len(b) >= 2:
            return [((*b[:-2], b[-1]), None)]
        return [(a[:-1], None)] if len(b) == 1 else [((), None)]
    return [((*broadcast(a[:-2], b[:-2]), a[-2], b[-1]), None)] if a[:-2] or b[:-2] else [((a[-2], b[-1]), None)]


def _gemm(node: gs.Node, args: Sequence[Value | None]) -> Made:
    a, b = given(args, 0).shape, given(args, 1).shape
    return [((a[1 if node.attrs.get("transA", 0) else 0], b[0 if node.attrs.get("transB", 0) else 1]), None)]


def _reduced(node: gs.Node, args: Sequence[Value | None]) -> Made:
    shape = given(args, 0).shape
    rank = len(shape)
    if node.op in ("ArgMax", "ArgMin"):
        axis = int(node.attrs.get("axis", 0))
        axes = [axis + rank * (axis < 0)]
    else:
        axes = axes_of(node, args, 1, rank) or []
        if not axes and node.attrs.get("noop_with_empty_axes", 0):
            return [(shape, None)]
        axes = axes or list(range(rank))
    if node.attrs.get("keepdims", 1):
        return [(tuple(ONE if axis in axes else size for axis, size in enumerate(shape)), None)]
    return [(tuple(size for axis, size in enumerate(shape) if axis not in axes), None)]


def _summed(node: gs.Node, args: Sequence[Value | None]) -> Made:
    """ReduceSum; over one axis its elements are running sums to the end of it."""
    x = given(args, 0)
    ((shape, _),) = _reduced(node, args)
    axes = axes_of(node, args, 1, len(x.shape))
    if axes is None or len(axes) != 1:
        return [(shape, None)]
    (axis,) = axes
    kept = len(shape) == len(x.shape)

    def at(index: Shape) -> Poly:
        over = Index("#", x.shape[axis])
        place = [*index[:axis], poly(over), *index[axis + kept :]]
        return poly(Running(x.element(place), over, x.shape[axis] - 1))

    return [(shape, at)]


def _window(node: gs.Node, args: Sequence[Value | None]) -> Made:
    """A convolution or pooling: each axis behind batch and channels shrinks by its kernel and strides."""
    x = given(args, 0).shape
    spatial = len(x) - 2
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or node.attrs.get("ceil_mode", 0):
        raise Underived("a window whose padding depends on the size")
    weight = given(args, 1).shape if node.op == "Conv" else None
    raw = node.attrs.get("kernel_shape") or [size.integer for size in (weight or ())[2:]]
    strides, dilations = (list(node.attrs.get(k) or [1] * spatial) for k in ("strides", "dilations"))
    pads = list(node.attrs.get("pads") or [0] * 2 * spatial)
    shape = [x[0], weight[0] if weight is not None else x[1]]
    for axis in range(spatial):
        span = int(dilations[axis]) * (int(raw[axis]) - 1) + 1
        room = x[2 + axis] + int(pads[axis]) + int(pads[spatial + axis]) - span
        size = floor_divided(room, poly(int(strides[axis])))[0] + 1
        # an input too small for the window has no answer at all
        shape.append(size if never_negative(size - 1) else poly(Size(f"{node.outputs[0].name}.{axis + 2}")))
    return [(tuple(shape), None)]


def _global_pool(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0).shape
    return [((*x[:2], *(ONE for _ in x[2:])), None)]


def _pad(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0).shape
    pads = given(args, 1).entries() if len(args) > 1 else [poly(int(v)) for v in node.attrs["pads"]]
    axes = axes_of(node, args, 3, len(x)) or list(range(len(x)))
    shape = list(x)
    for place, axis in enumerate(axes):
        shape[axis] = shape[axis] + pads[place] + pads[place + len(axes)]
    return [(tuple(shape), None)]


def _one_hot(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, depth = given(args, 0).shape, given(args, 1).entries()[0]
    axis = int(node.attrs.get("axis", -1))
    axis += (len(x) + 1) * (axis < 0)
    return [((*x[:axis], depth, *x[axis:]), None)]


def _attention(node: gs.Node, args: Sequence[Value | None]) -> Made:
    """The operator of opset 23: [batch, tokens, features] or [batch, heads, tokens, size]."""
    q, v = given(args, 0).shape, given(args, 2).shape
    if len(args) > 4 and any(item is not None for item in args[4:6]):
        raise Underived("attention with a cache")
    if len(q) == 4:
        return [((*q[:3], v[3]), None)]
    heads, kv = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
    size = floor_divided(v[2], poly(kv))[0]
    return [((*q[:2], size * heads), None)]


SIZES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _window,
    "MaxPool": _window,
    "AveragePool": _window,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Pad": _pad,
    "OneHot": _one_hot,
    "Attention": _attention,
    "RotaryEmbedding": _alike,
}
SIZES.update({op: _reduced for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2",
                                      "ReduceL1", "ReduceLogSumExp", "ReduceSumSquare", "ReduceLogSum", "ArgMax",
                                      "ArgMin")})  # fmt: skip
SIZES["ReduceSum"] = _summed
SIZES.update({op: _alike for op in ("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "Hardmax",
                                   "BatchNormalization", "InstanceNormalization", "GroupNormalization", "ScatterND",
                                   "ScatterElements", "LpNormalization", "QuantizeLinear", "DequantizeLinear",
                                   "RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike", "LRN",
                                   "MeanVarianceNormalization")})  # fmt: skip
