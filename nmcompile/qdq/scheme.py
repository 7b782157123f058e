"""Scheme: what is rounded to eight bits and how, one value that all passes of quantization read and build.

Scheme -> smooth-activations -> insert-qdq -> quantize-outputs        recipes.scheme_passes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from nmcompile import quantize as q8
from nmcompile.calibrate.statistics import Method
from nmcompile.errors import PassError

METHODS = get_args(Method)
ACTIVATIONS, ATTENTION, OUTPUTS = get_args(q8.QuantType), ("int8", "float"), ("sparse", "all", "none")


@dataclass(frozen=True)
class Scheme:
    """Options of quantization; PassError for a value that is not known.

    activations: uint8 with a zero point for the CPU (VNNI multiplies u8 by s8), int8 with zero point 0 for TensorRT.
    weight_bits: 8, or 7 for CPUs without VNNI. attention: int8, or float, which leaves q, k, v and the softmax alone;
    softmax: where attention is int8, its probabilities too. heads: heads and poolers too. least_scale: of weights.
    clip, percentile: how ranges are taken; output: by the error of the layers' outputs. bias: biases take on what
    rounding adds on average. alpha: exponent by which outliers move into weights, 0 chooses it for each
    normalisation, None leaves them. outputs: the layers that hand on eight bits. include, keep: globs of layers' names
    that alone are quantized, and that stay float.
    """

    activations: str = "uint8"
    weight_bits: int = 8
    attention: str = "int8"
    softmax: bool = False
    heads: bool = False
    least_scale: float = 0.0
    clip: str = "min-max"
    percentile: float = 99.99
    bias: bool = False
    alpha: float | None = None
    outputs: str = "none"
    include: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise PassError(f"activations={self.activations} is not known; choose uint8 (CPU) or int8 (TensorRT)")
        known("clip", self.clip, (*METHODS, "output"))
        known("attention", self.attention, ATTENTION)
        if self.weight_bits not in q8.WEIGHT_LEVELS:
            raise PassError(f"weight_bits={self.weight_bits} is not known; choose 8, or 7 for CPUs without VNNI")
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise PassError(f"alpha={self.alpha} is not between 0 and 1; 0.5 shares the load evenly, 0 chooses")
        if not (math.isfinite(self.least_scale) and self.least_scale >= 0):
            raise PassError(f"least_scale={self.least_scale} is not a scale; 0 takes every weight as it is")
        known("outputs", self.outputs, OUTPUTS)

    @property
    def dtype(self) -> q8.QuantType:
        """Of activations."""
        return cast("q8.QuantType", self.activations)

    @property
    def operands(self) -> tuple[q8.QuantType, q8.QuantType, q8.QuantType]:
        """Of queries, keys and values: keys and values are the s8 operand of attention's products."""
        return self.dtype, "int8", "int8"

    @property
    def levels(self) -> int:
        """The largest |level| of a weight."""
        return q8.WEIGHT_LEVELS[self.weight_bits]

    @property
    def by_error(self) -> bool:
        """Whether ranges are chosen by what rounding does to the layers' outputs."""
        return self.clip == "output"

    @property
    def method(self) -> Method:
        """How a range is taken where no layer reads the tensor."""
        return "mse" if self.by_error else cast("Method", self.clip)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The statistics that a range is taken from."""
        return ("range",) if self.clip == "min-max" else ("range", "histogram")


def known(option: str, value: str, choices: Sequence[str]) -> None:
    """PassError where the value of an option is none of the choices."""
    if value not in choices:
        among = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) < 4 else f"one of {', '.join(choices)}"
        raise PassError(f"{option}={value} is not known; choose {among}")


# What each target takes best. TensorRT: fused half-precision attention is what NVIDIA's own models run; fused INT8
# attention wants pairs on all it multiplies, the probabilities too; half precision holds no smaller scale in full.
CPU = Scheme()
TENSORRT = Scheme(activations="int8", attention="float", softmax=True, least_scale=6.2e-5, outputs="sparse")
