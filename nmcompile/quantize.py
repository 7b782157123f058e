"""Scales, rounding, quantization and dequantization to eight bits; arrays only, knows no graph.

Arithmetic is that of ONNX QuantizeLinear and DequantizeLinear: q = saturate(round_half_even(x / scale) +
zero_point) and x = (q - zero_point) * scale, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nmcompile.errors import InputError

Array = npt.NDArray[Any]
QuantType = Literal["uint8", "int8"]

# By bits, the largest |level| of a weight. 7 bits are onnxruntime's reduce_range: a pair of products u8 x s8 is at most
# 2 * 255 * 64 < 2**15, which the saturating 16-bit sums of CPUs without VNNI hold.
WEIGHT_LEVELS = {8: 127, 7: 64}

_TINY = float(np.finfo(np.float32).tiny)  # a smaller scale is flushed to zero by some processors


@dataclass(frozen=True)
class QuantParams:
    """How a tensor is quantized as a whole; `scale` is a float32 value, > 0."""

    scale: float
    zero_point: int
    dtype: QuantType


def weight_scales(weight: Array, levels: int = WEIGHT_LEVELS[8]) -> npt.NDArray[np.float32]:
    """Symmetric scales, float32 [N], of weight [N outputs, K inputs]: the largest |w| of a row is `levels`; a zero
    row has 1.

    InputError when a weight is NaN or infinite.
    """
    largest = np.abs(np.asarray(weight, np.float32)).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise InputError(
            f"the weights of output {row} hold NaN or Inf; mend the model before it is quantized"
        )
    scales = np.maximum(largest / np.float32(levels), np.float32(_TINY))
    return np.where(largest > 0, scales, np.float32(1))


def quantize_weight(
    weight: Array, least: float = 0.0, levels: int = WEIGHT_LEVELS[8]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(int8 [N, K] within +-levels, scales float32 [N], none below `least`) of weight [N outputs, K inputs]; zeros stay
    zeros."""
    scales = np.maximum(weight_scales(weight, levels), np.float32(least))
    return round_weight(weight, scales, levels), scales


def round_weight(weight: Array, scales: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.int8]:
    """int8 [N, K] within +-levels of weight [N, K] at scales [N]."""
    steps = np.rint(np.asarray(weight, np.float32) / scales[:, None])
    return np.asarray(np.clip(steps, -levels, levels, out=steps), np.int8)


def activation_params(lo: float, hi: float, dtype: QuantType) -> QuantParams:
    """Parameters for values in [lo, hi], widened to hold 0, which is represented exactly.

    uint8: asymmetric, 255 steps from lo to hi. int8: symmetric, zero point 0, 127 steps to the larger side.
    An empty range [0, 0] has scale 1.
    """
    if not (math.isfinite(lo) and math.isfinite(hi)) or lo > hi:
        raise InputError(
            f"[{lo:g}, {hi:g}] is not a range to quantize; calibrate with data that give finite values"
        )
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    if dtype == "int8":
        return QuantParams(_scale(max(-lo, hi), 127), 0, "int8")
    if dtype == "uint8":
        scale = _scale(hi - lo, 255)
        return QuantParams(scale, min(max(round(-lo / scale), 0), 255), "uint8")
    raise InputError(f"quantization type '{dtype}' is not known; use uint8 or int8")


def rounded(x: Array, params: QuantParams) -> npt.NDArray[np.float32]:
    """x after quantization and back, float32 of its shape: as `quantize` and `dequantize`, whose integers float32 holds
    exactly."""
    scale, zero = np.float32(params.scale), np.float32(params.zero_point)
    steps: npt.NDArray[np.float32] = np.rint(np.asarray(x, np.float32) / scale)
    steps += zero
    np.clip(steps, *((0, 255) if params.dtype == "uint8" else (-128, 127)), out=steps)
    steps -= zero
    steps *= scale
    return steps


def quantize(
    x: Array, scale: float | Array, zero_point: int | Array, dtype: QuantType
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
    """uint8 or int8, the shape of x; `scale` and `zero_point` are scalars or broadcast against x."""
    rounded = np.rint(x.astype(np.float32) / np.asarray(scale, np.float32))
    shifted: npt.NDArray[np.float32] = rounded + np.asarray(zero_point, np.float32)
    if dtype == "uint8":
        return np.clip(shifted, 0, 255).astype(np.uint8)
    return np.clip(shifted, -128, 127).astype(np.int8)


def dequantize(q: Array, scale: float | Array, zero_point: int | Array) -> npt.NDArray[np.float32]:
    """float32, the shape of q."""
    shifted = q.astype(np.int32) - np.asarray(zero_point, np.int32)
    return shifted.astype(np.float32) * np.asarray(scale, np.float32)


def _scale(span: float, steps: int) -> float:
    """span / steps as a float32 value, never zero."""
    return max(float(np.float32(span / steps)), _TINY) if span > 0 else 1.0
