"""MagnitudePrune: zero single weights, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import sparsity as sp
from nmcompile.contract import Context, Report
from nmcompile.prune.selection import PruningPass, select


@dataclass(frozen=True)
class MagnitudePrune(PruningPass):
    """Zero the weights of least score in every linear layer but heads and poolers (unstructured).

    MatMul(x, W)  ->  MatMul(x, W * keep)
    """

    sparsity: float = 0.8

    def run(self, graph: gs.Graph, context: Context) -> Report:
        selection = select(graph, self.include, self.exclude)
        return self.prune(graph, sp.Unstructured(), self.sparsity, selection, context)
