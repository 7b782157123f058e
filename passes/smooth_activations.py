"""SmoothActivations: move outlier channels of activations into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile.contract import CANONICAL, Context, Pass, Report
from nmcompile.qdq.scheme import Scheme
from nmcompile.qdq.smoothing import needs, smooth


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
        return needs(graph, self.alpha)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        found = smooth(graph, self.alpha, self.scheme.dtype, context.gathered)
        detail: dict[str, object] = {"peak reduced by": {name: round(done.peak, 3) for name, done in found.items()}}
        chosen = {} if self.alpha else {"alpha": {name: done.alpha for name, done in found.items()}}
        return Report(changed=len(found), detail={**detail, **chosen} if found else {})
