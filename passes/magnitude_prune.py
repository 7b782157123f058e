"""MagnitudePrune: zero single weights, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass

from nmcompile import sparsity as sp
from nmcompile.prune import Goal, PrunePlan, PruningPass


@dataclass(frozen=True)
class MagnitudePrune(PruningPass):
    """Zero the weights of least score in every linear layer but heads and poolers: `prune(pattern=unstructured)`.

    MatMul(x, W)  ->  MatMul(x, W * keep)

    The name is that of its first solver; with another one, write `prune(pattern=unstructured, solver=admm)`.
    """

    sparsity: float = 0.8

    @property
    def plan(self) -> PrunePlan:
        return self.planned(Goal(sp.Unstructured(), self.sparsity))
