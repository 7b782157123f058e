"""BlockPrune: zero whole blocks of weights, the unit that sparse kernels skip."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import sparsity as sp
from nmcompile.contract import Context, Report
from nmcompile.errors import PassError
from nmcompile.prune.selection import PruningPass, select


@dataclass(frozen=True)
class BlockPrune(PruningPass):
    """Zero the blocks of least score in every linear layer but heads and poolers.

    MatMul(x, W)  ->  MatMul(x, W * keep)      keep is constant over each block of outputs x inputs
    """

    sparsity: float = 0.8
    block: str = "2x4"  # outputs x inputs

    def run(self, graph: gs.Graph, context: Context) -> Report:
        pattern = sp.parse_pattern(self.block)
        if not isinstance(pattern, sp.Block):
            raise PassError(f"block={self.block} is not a block; write outputs x inputs, for example 2x4")
        selection = select(graph, self.include, self.exclude)
        return self.prune(graph, pattern, self.sparsity, selection, context)
