"""BlockPrune: zero whole blocks of weights, the unit that sparse kernels skip."""

from __future__ import annotations

from dataclasses import dataclass

from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.prune import Goal, PrunePlan, PruningPass


@dataclass(frozen=True)
class BlockPrune(PruningPass):
    """Zero the blocks of least score in every linear layer but heads and poolers: `prune` with one pattern, a block.

    MatMul(x, W)  ->  MatMul(x, W * keep)      keep is constant over each block of outputs x inputs
    """

    sparsity: float = 0.8
    block: str = "2x4"  # outputs x inputs

    @property
    def plan(self) -> PrunePlan:
        pattern = sp.parse_pattern(self.block)
        if not isinstance(pattern, sp.Block):
            raise PassError(f"block={self.block} is not a block; write outputs x inputs, for example 2x4")
        return self.planned(Goal(pattern, self.sparsity))
