"""ONNX operators in torch, one table: what each computes, with a gradient wherever mathematics has one.

A function of the table takes the node's inputs (None where one is left out) and its attributes, and gives a tensor, or
a tuple for operators of several outputs. Sizes, axes and other integers are tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nmcompile.torch import movement as m
from nmcompile.torch.fake_quant import dequantize, quantize
from nmcompile.torch.types import torch_type

Tensor = torch.Tensor
Operator = Callable[..., Any]
Attributes = Mapping[str, Any]


def _matmul(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    return torch.matmul(a, b)


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0, **_: Any,
) -> Tensor:  # fmt: skip
    y = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    y = y if alpha == 1.0 else y * alpha
    return y if c is None else y + (c if beta == 1.0 else c * beta)


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    y = F.layer_norm(x, shape, None, None, epsilon) * scale
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Tensor:
    axes = tuple(range(axis if axis >= 0 else x.ndim + axis, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


def _gelu(x: Tensor, *, approximate: str | bytes = "none", **_: Any) -> Tensor:
    kind = approximate.decode() if isinstance(approximate, bytes) else approximate
    return F.gelu(x, approximate=kind)


def _softmax(x: Tensor, *, axis: int = -1, **_: Any) -> Tensor:
    return torch.softmax(x, axis)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None, **_: Any) -> Tensor:
    x = x if low is None else torch.maximum(x, low.to(x))
    return x if high is None else torch.minimum(x, high.to(x))


def _pow(x: Tensor, y: Tensor, **_: Any) -> Tensor:
    exponent: Any = y.item() if y.numel() == 1 and not y.requires_grad else y
    return torch.pow(x, exponent).to(x.dtype)


def _div(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    if a.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0, **_: Any) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _chain(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Of any number of operands, left to right."""

    def call(*operands: Tensor, **_: Any) -> Tensor:
        found = operands[0]
        for other in operands[1:]:
            found = function(found, other)
        return found

    return call


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    """axes: an input since opset 18, an attribute before; none means all, or nothing where the node says so."""

    def call(
        x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0,
        **attributes: Any,
    ) -> Tensor:  # fmt: skip
        given: Sequence[int] = m.ints(axes) if axes is not None else attributes.get("axes", ())
        if not given and noop_with_empty_axes:
            return x
        return function(x, list(given) or list(range(x.ndim)), bool(keepdims))

    return call


def _extreme(function: Operator) -> Callable[[Tensor, list[int], bool], Tensor]:
    return lambda x, axes, keep: function(x, dim=tuple(axes), keepdim=keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _arg(function: Operator) -> Operator:
    def call(x: Tensor, *, axis: int = 0, keepdims: int = 1, **_: Any) -> Tensor:
        found: Tensor = function(x, dim=axis, keepdim=bool(keepdims))
        return found

    return call


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pads: Sequence[int] = (), strides: Sequence[int] = (),
    dilations: Sequence[int] = (), group: int = 1, **_: Any,
) -> Tensor:  # fmt: skip
    rank = x.ndim - 2
    ends = list(pads) or [0] * (2 * rank)
    if ends[:rank] != ends[rank:]:  # torch pads both ends alike
        x = F.pad(x, [end for axis in range(rank - 1, -1, -1) for end in (ends[axis], ends[rank + axis])])
        ends = [0] * (2 * rank)
    convolve: Operator = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    found: Tensor = convolve(x, weight, bias, list(strides) or 1, ends[:rank], list(dilations) or 1, group)
    return found


def _sum_log_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def _plain(function: Callable[..., Tensor]) -> Operator:
    """An operator whose attributes mean nothing to it."""
    return lambda *operands, **_: function(*operands)


def _leaky(x: Tensor, *, alpha: float = 0.01, **_: Any) -> Tensor:
    return F.leaky_relu(x, alpha)


def _elu(x: Tensor, *, alpha: float = 1.0, **_: Any) -> Tensor:
    return F.elu(x, alpha)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5, **_: Any) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


def _swish(x: Tensor, *, alpha: float = 1.0, **_: Any) -> Tensor:
    return x * torch.sigmoid(x * alpha)


def _cast(x: Tensor, *, to: int, **_: Any) -> Tensor:
    return x.to(torch_type(int(to)))


def _isinf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1, **_: Any) -> Tensor:
    return torch.isinf(x) & (((x < 0) & bool(detect_negative)) | ((x > 0) & bool(detect_positive)))


def _cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0, **_: Any) -> Tensor:
    at = int(axis)
    x = x.flip(at) if reverse else x
    total = torch.cumsum(x, at, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(at) if reverse else total


def _lp_norm(x: Tensor, *, axis: int = -1, p: int = 2, **_: Any) -> Tensor:
    return F.normalize(x, p=float(p), dim=axis, eps=float(np.finfo(np.float32).tiny))


OPERATORS: Mapping[str, Operator] = {
    "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm, "LpNormalization": _lp_norm,
    "QuantizeLinear": quantize, "DequantizeLinear": dequantize,
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _div, "Mod": _mod,
    "Pow": _pow, "Neg": _plain(torch.neg), "Abs": _plain(torch.abs), "Sign": _plain(torch.sign),
    "Sqrt": _plain(torch.sqrt), "Reciprocal": _plain(torch.reciprocal), "Exp": _plain(torch.exp),
    "Log": _plain(torch.log), "Erf": _plain(torch.erf), "Sin": _plain(torch.sin), "Cos": _plain(torch.cos),
    "Floor": _plain(torch.floor), "Ceil": _plain(torch.ceil), "Round": _plain(torch.round),
    "Min": _chain(torch.minimum), "Max": _chain(torch.maximum), "Sum": _chain(torch.add),
    "Clip": _clip, "Relu": _plain(torch.relu), "Tanh": _plain(torch.tanh), "Sigmoid": _plain(torch.sigmoid),
    "Gelu": _gelu, "LeakyRelu": _leaky, "Elu": _elu, "Softplus": _plain(F.softplus), "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish), "Swish": _swish, "Mish": _plain(F.mish), "Softmax": _softmax,
    "LogSoftmax": lambda x, axis=-1, **_: torch.log_softmax(x, axis),
    "Equal": _plain(torch.eq), "Greater": _plain(torch.gt), "GreaterOrEqual": _plain(torch.ge),
    "Less": _plain(torch.lt), "LessOrEqual": _plain(torch.le), "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or), "Xor": _plain(torch.logical_xor), "Not": _plain(torch.logical_not),
    "IsNaN": _plain(torch.isnan), "IsInf": _isinf, "Where": _plain(torch.where), "Cast": _cast,
    "Identity": _plain(lambda x: x), "CumSum": _cumsum,
    "ReduceSum": _reduce(lambda x, axes, keep: torch.sum(x, axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: torch.mean(x, axes, keepdim=keep)),
    "ReduceMax": _reduce(_extreme(torch.amax)), "ReduceMin": _reduce(_extreme(torch.amin)),
    "ReduceProd": _reduce(_product), "ReduceLogSumExp": _reduce(_sum_log_exp),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep)),
    "ReduceL1": _reduce(lambda x, axes, keep: torch.sum(x.abs(), axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: torch.sum(x.square(), axes, keepdim=keep)),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin),
    "GlobalAveragePool": lambda x, **_: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    **m.MOVEMENT,
}  # fmt: skip
