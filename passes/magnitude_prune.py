"""MagnitudePrune: zero single weights, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from nmcompile import sparsity as sp
from nmcompile.passes.pruning import PruningPass, prune, select
from nmcompile.pipeline import Report

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics


@dataclass(frozen=True)
class MagnitudePrune(PruningPass):
    """Zero the weights of least score in every linear layer but heads and poolers (unstructured).

    MatMul(x, W)  ->  MatMul(x, W * keep)
    """

    sparsity: float = 0.8
    criterion: str = "magnitude"
    ranking: str = "uniform"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def run(self, graph: gs.Graph, statistics: Statistics | None = None) -> Report:
        selection = select(graph, self.include, self.exclude)
        return prune(graph, sp.Unstructured(), self.sparsity, self.criterion, self.ranking, selection, statistics)
