"""SmoothActivations: move outlier channels of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.builder import Builder
from nmcompile.canonical import role
from nmcompile.contract import CANONICAL, Context, Pass, Report
from nmcompile.qdq.scheme import Scheme

ALPHAS = (0.6, 0.5, 0.7, 0.4, 0.8, 0.3)  # the first of equals is taken
ROWS = 256  # on which they are compared
NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Scale each channel between a normalisation and its linear layers, and their weights by the inverse.

    x = LayerNormalization(...);  MatMul(x, W)   ->   MatMul(x * (1 / s), s * W)

    One channel of large values costs all others their precision when x is quantized per tensor. With
    s = max|x|^alpha / max|W|^(1 - alpha) the product stays and the range evens out (SmoothQuant, Xiao et al. 2022,
    arXiv 2211.10438). Other readers of x, the residual above all, see it unchanged; the engine folds the factor into
    the normalisation's scale and bias. alpha 0 chooses it for each normalisation: the least error of the layers'
    outputs, weights and activations in eight bits, on a sample of tokens.
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (CANONICAL,)
    alpha: float = 0.6
    activations: str = "uint8"  # or int8 for TensorRT: what alpha is chosen for

    @property
    def scheme(self) -> Scheme:
        """The options as a scheme; PassError for one that is not known."""
        return Scheme(activations=self.activations, alpha=self.alpha)

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        wanted = ("channels",) if self.alpha else ("channels", "sample")
        return dict.fromkeys(_readers(graph), wanted)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        kind = self.scheme.dtype
        readers = _readers(graph)
        detail: dict[str, object] = {}
        alphas: dict[str, float] = {}
        for name, layers in readers.items():
            statistics = context.statistics
            peaks = np.maximum(statistics.channels(name).astype(np.float64), 1e-5)
            weights = np.maximum(np.max([np.abs(layer.weight).max(axis=0) for layer in layers], axis=0), 1e-5)
            alpha = self.alpha or _best_alpha(
                statistics.sample(name), [layer.weight for layer in layers], peaks, weights, kind
            )
            scale = _factors(peaks, weights, alpha)
            x = layers[0].x
            b = Builder(graph, f"{name}/smooth")
            smooth = b("Mul", x, b.constant((1 / scale).astype(np.float32), "scale"), shape=x.shape)
            for layer in layers:
                g.set_weight(graph, layer, layer.weight * scale.astype(np.float32))
                layer.node.inputs[0] = smooth
            detail[name] = round(float(peaks.max() / (peaks / scale).max()), 3)
            alphas[name] = alpha
        if readers:
            g.cleanup(graph)
        chosen = {} if self.alpha else {"alpha": alphas}
        return Report(changed=len(readers), detail={"peak reduced by": detail, **chosen} if detail else {})


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
