"""What eight bits do to the outputs of linear layers, on a sample of tokens: ranges and biases chosen by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.calibrate.statistics import Method

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics

CANDIDATES: tuple[tuple[Method, float], ...] = (("mse", 0.0), ("min-max", 0.0), ("percentile", 99.999),
                                                ("percentile", 99.99), ("percentile", 99.9))  # fmt: skip


def best_range(
    statistics: Statistics, name: str, layers: Sequence[g.Linear], dtype: q8.QuantType, levels: int
) -> tuple[float, float]:
    """The range of a tensor, of those that the clipping methods propose, with the least
    |Q(x) Q(W)^T - x W^T|^2 / |x W^T|^2 over the layers that read it; weights are within +-levels."""
    x = statistics.sample(name)
    weights = [(layer.weight, _rounded(layer.weight, levels)) for layer in layers]
    exact = [x @ weight.T for weight, _ in weights]

    def error(ends: tuple[float, float]) -> float:
        small = q8.rounded(x, q8.activation_params(*ends, dtype))
        lost = [small @ coarse.T - wanted for (_, coarse), wanted in zip(weights, exact, strict=True)]
        return sum(float(np.vdot(a, a)) / max(float(np.vdot(b, b)), 1e-30) for a, b in zip(lost, exact, strict=True))

    return min((statistics.clip(name, method, share, dtype) for method, share in CANDIDATES), key=error)


def correct_bias(graph: gs.Graph, layer: g.Linear, x: np.ndarray, params: q8.QuantParams, levels: int) -> None:
    """Let the layer's bias take on what rounding adds to its outputs on average (Nagel et al. 2019, arXiv 1906.04721),
    for x [T, K] as it comes in; a layer without a bias stays as it is."""
    if layer.bias is not None:
        lost = (x @ layer.weight.T - q8.rounded(x, params) @ _rounded(layer.weight, levels).T).mean(axis=0)
        g.set_bias(graph, layer, layer.bias + lost.astype(np.float32))


def _rounded(weight: np.ndarray, levels: int) -> np.ndarray:
    small, steps = q8.quantize_weight(weight, levels=levels)
    return np.asarray(small * steps[:, None])
