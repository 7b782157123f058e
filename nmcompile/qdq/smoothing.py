"""Smoothing: outlier channels of activations move into the weights that read them (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.builder import Builder
from nmcompile.calibrate import Statistics
from nmcompile.canonical import role

ALPHAS = (0.6, 0.5, 0.7, 0.4, 0.8, 0.3)  # the first of equals is taken
ROWS = 256  # on which they are compared
NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Smoothed:
    """What was done behind one normalisation. layers: names of those whose weights [N, K] are `factors` [K] times what
    they were; alpha: the exponent; peak: what the largest |x| was divided by."""

    layers: tuple[str, ...]
    factors: np.ndarray
    alpha: float
    peak: float


def needs(graph: gs.Graph, alpha: float) -> dict[str, tuple[str, ...]]:
    """The statistics that `smooth` takes."""
    return dict.fromkeys(_readers(graph), ("channels",) if alpha else ("channels", "sample"))


def smooth(graph: gs.Graph, alpha: float, kind: q8.QuantType, statistics: Statistics | None) -> dict[str, Smoothed]:
    """Smooth behind every normalisation, in place; by its output. alpha 0 chooses it for each by the error of the
    layers' outputs with activations of `kind`. `statistics` as `needs` asks for them, None where it asks for none."""
    found: dict[str, Smoothed] = {}
    for name, layers in _readers(graph).items():
        assert statistics is not None
        peaks = np.maximum(statistics.channels(name).astype(np.float64), 1e-5)
        matrices = [layer.weight for layer in layers]
        weights = np.maximum(np.max([np.abs(weight).max(axis=0) for weight in matrices], axis=0), 1e-5)
        chosen = alpha or _best_alpha(statistics.sample(name), matrices, peaks, weights, kind)
        scale = _factors(peaks, weights, chosen)
        x = layers[0].x
        b = Builder(graph, f"{name}/smooth")
        smoothed = b("Mul", x, b.constant((1 / scale).astype(np.float32), "scale"), shape=x.shape)
        for layer in layers:
            g.set_weight(graph, layer, layer.weight * scale.astype(np.float32))
            layer.node.inputs[0] = smoothed
        names = tuple(layer.name for layer in layers)
        found[name] = Smoothed(names, scale.astype(np.float32), chosen, float(peaks.max() / (peaks / scale).max()))
    if found:
        g.cleanup(graph)
    return found


def _best_alpha(
    x: np.ndarray, matrices: list[np.ndarray], peaks: np.ndarray, weights: np.ndarray, kind: q8.QuantType
) -> float:
    """The exponent of least error on some of the rows x [T, K], for the largest |x| and |W| by channel."""
    few = x[:: max(len(x) // ROWS, 1)]
    wanted = [few @ matrix.T for matrix in matrices]
    best, least = ALPHAS[0], _error(few, matrices, wanted, _factors(peaks, weights, ALPHAS[0]), kind)
    for alpha in ALPHAS[1:]:
        error = _error(few, matrices, wanted, _factors(peaks, weights, alpha), kind, least)
        if error < least:
            best, least = alpha, error
    return best


def _factors(peaks: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """s [K] of the largest |x| and |W| by channel; their geometric mean is 1, since only the ratios matter."""
    scale = peaks**alpha / weights.astype(np.float64) ** (1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()))


def _error(
    x: np.ndarray, weights: list[np.ndarray], wanted: list[np.ndarray], scale: np.ndarray, kind: q8.QuantType,
    limit: float = np.inf,
) -> float:  # fmt: skip
    """Sum over layers of |Q(x / s) Q(s W)^T - x W^T|^2 / |x W^T|^2 for x [T, K] and weights [N, K], `wanted` holds
    x W^T; only the first of them where these reach the limit already."""
    smooth = (x / scale).astype(np.float32)
    small, total = q8.rounded(smooth, q8.activation_params(float(smooth.min()), float(smooth.max()), kind)), 0.0
    for weight, exact in zip(weights, wanted, strict=True):
        levels, steps = q8.quantize_weight(weight * scale.astype(np.float32))
        lost = small @ (levels * steps[:, None]).T - exact
        total += float(np.vdot(lost, lost)) / max(float(np.vdot(exact, exact)), 1e-30)
        if total >= limit:
            break
    return total


def _readers(graph: gs.Graph) -> Mapping[str, list[g.Linear]]:
    """Outputs of normalisations -> the linear layers that read them and share their weights with no one."""
    found: dict[str, list[g.Linear]] = {}
    for layer in g.linear_layers(graph):
        norm = g.producer(layer.x)
        if norm is None or norm.op not in NORMS or layer.quantized or role(graph, layer):
            continue
        if len(g.consumers(layer.node.inputs[1])) == 1:
            found.setdefault(layer.x.name, []).append(layer)
    return found
