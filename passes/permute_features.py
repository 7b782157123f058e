"""PermuteFeatures: put features that matter to the same outputs side by side, so that blocks of zeros lose less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile import sparsity as sp
from nmcompile.contract import CANONICAL, Context, Pass, Report
from nmcompile.prune.features import hidden, reorder


@dataclass(frozen=True)
class PermuteFeatures(Pass):
    """Reorder the features between two linear layers, and inside the heads of attention.

    gelu(x @ W1 + b1) @ W2   ->   gelu(x @ W1[:, p] + b1[p]) @ W2[p, :]

    A block keeps or drops its weights together: it loses least where all of them matter, or none; a group of n:m where
    what matters is spread evenly (Pool and Yu 2021, Channel Permutations for N:M Sparsity). What matters is the
    saliency w^2 |x|^2 of the weights that make and read a feature; an order is taken where it keeps more of it.
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (CANONICAL,)
    pattern: str = "2x4"

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        return {layer.x.name: ("squares",) for part in hidden(graph) for layer in (*part.makers, *part.readers)}

    def run(self, graph: gs.Graph, context: Context) -> Report:
        pattern, parts = sp.parse_pattern(self.pattern), list(hidden(graph))
        if not parts:
            return Report()
        kept = {name: [round(before, 4), round(after, 4)] for name, (before, after)
                in reorder(graph, parts, pattern, context.statistics).items()}  # fmt: skip
        return Report(changed=len(kept), detail={"share of saliency kept, before and after": kept} if kept else {})
