"""SmoothActivations: move outlier channels of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile.canonical import Builder, role
from nmcompile.errors import PassError
from nmcompile.pipeline import CalibratedPass, Report

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics

NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class SmoothActivations(CalibratedPass):
    """Scale each channel between a normalisation and its linear layers, and their weights by the inverse.

    x = LayerNormalization(...);  MatMul(x, W)   ->   MatMul(x * (1 / s), s * W)

    One channel of large values costs all others their precision when x is quantized per tensor. With
    s = max|x|^alpha / max|W|^(1 - alpha) the product stays and the range evens out (SmoothQuant, Xiao et al. 2022,
    arXiv 2211.10438). Other readers of x, the residual above all, see it unchanged; the engine folds the factor into
    the normalisation's scale and bias.
    """

    preserves: ClassVar[bool] = True
    alpha: float = 0.6

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        return {name: ("channels",) for name in _readers(graph)}

    def run(self, graph: gs.Graph, statistics: Statistics | None = None) -> Report:
        if not 0 < self.alpha < 1:
            raise PassError(f"alpha={self.alpha} is not between 0 and 1; 0.5 shares the load evenly")
        readers = _readers(graph)
        if readers and statistics is None:
            raise PassError("smooth-activations needs calibration data; give the pipeline calibration=...")
        detail: dict[str, object] = {}
        for name, layers in readers.items():
            assert statistics is not None
            peaks = np.maximum(statistics.channels(name).astype(np.float64), 1e-5)
            weights = np.maximum(np.max([np.abs(layer.weight).max(axis=0) for layer in layers], axis=0), 1e-5)
            scale = peaks**self.alpha / weights.astype(np.float64) ** (1 - self.alpha)
            scale /= np.exp(np.log(scale).mean())  # only the ratios matter
            x = layers[0].x
            b = Builder(graph, f"{name}/smooth")
            smooth = b("Mul", x, b.constant((1 / scale).astype(np.float32), "scale"), shape=x.shape)
            for layer in layers:
                g.set_weight(graph, layer, layer.weight * scale.astype(np.float32))
                layer.node.inputs[0] = smooth
            detail[name] = round(float(peaks.max() / (peaks / scale).max()), 3)
        if readers:
            g.cleanup(graph)
        return Report(changed=len(readers), detail={"peak reduced by": detail} if detail else {})


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
