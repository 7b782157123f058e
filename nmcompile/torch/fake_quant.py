"""Fake quantization: QuantizeLinear and DequantizeLinear in floats, bit for bit as ONNX has them, with a gradient.

q = saturate(round_half_even(x / scale) + zero_point), x = (q - zero_point) * scale, all in float32, which holds the
integers exactly. Between the two, levels are floats. Rounding passes the gradient on where the value is inside the
range and stops it where it saturates (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
LEVELS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


class _Levels(torch.autograd.Function):
    """x -> level - zero_point, as floats; scale and zero broadcast against x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = torch.div(x, scale).round_().add_(zero)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((steps >= low) & (steps <= high), scale)
        return steps.clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        return gradients[0] * inside / scale, None, None, None, None


def spread(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Scales or zero points, one or one per index of an axis, so that they broadcast against `like`."""
    if values.numel() == 1:
        return values.reshape(())
    sizes = [1] * like.ndim
    sizes[axis] = -1
    return values.reshape(sizes)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, **_: Any) -> Tensor:
    """Levels as floats, the shape of x."""
    kind = torch.uint8 if zero is None else zero.dtype
    low, high = LEVELS[kind]
    offset = torch.zeros((), device=x.device) if zero is None else spread(zero.to(x.device, torch.float32), x, axis)
    found: Tensor = _Levels.apply(x.float(), spread(scale, x, axis).to(x.device), offset, low, high)
    return found


def dequantize(levels: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, **_: Any) -> Tensor:
    """float32, the shape of the levels, which are integers or floats."""
    shifted = levels.float()
    if zero is not None:
        shifted = shifted - spread(zero.to(levels.device, torch.float32), levels, axis)
    return shifted * spread(scale, levels, axis).to(levels.device)
