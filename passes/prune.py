"""Prune: zeros of any patterns, layer by layer, in one run."""

from __future__ import annotations

from dataclasses import dataclass

from nmcompile.prune import PrunePlan, PruningPass, goal, parse_rules


@dataclass(frozen=True)
class Prune(PruningPass):
    """Zero the weights of least score in every linear layer but heads and poolers, in the pattern that each is to get.

    MatMul(x, W)  ->  MatMul(x, W * keep)      keep is of the layer's pattern: blocks, n:m, or any weights

    pattern: outputs x inputs (2x4), n:m (2:4), unstructured, or dense. sparsity: of blocks and single weights; none is
    0.8. layers: what some layers get instead, NAMES:PATTERN or NAMES:PATTERN@SPARSITY, names being a glob; the first
    that matches decides: `prune(pattern=2x4, sparsity=0.5, layers=*.0.*:2:4|*.ffn.*:4x4@0.8|*.11.*:dense)`. It does not
    select: that is left to `include` and `exclude`. multiple: of which the sizes of a layer must be to get n:m, as in
    n-m-prune. Whatever the patterns, layers are fitted in one sweep, each to what those before it have become.
    """

    pattern: str = "2x4"
    sparsity: float | None = None
    layers: tuple[str, ...] = ()
    multiple: int = 1

    @property
    def plan(self) -> PrunePlan:
        rules = parse_rules(self.layers, self.sparsity)
        return self.planned(goal(self.pattern, self.sparsity), rules, self.multiple)
