"""NMPrune: keep n of every m consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.prune import Goal, PrunePlan, PruningPass


@dataclass(frozen=True)
class NMPrune(PruningPass):
    """Keep the n weights of greatest score among every m consecutive inputs: `prune` with one pattern, n:m.

    MatMul(x, W)  ->  MatMul(x, W * keep)      2:4 along the reduction axis is what sparse tensor cores take

    multiple: of which outputs and inputs must be for a layer to be pruned, as kernels ask for; layers that read one
    tensor (query, key and value) run as one product, so one that stays dense keeps all of them dense.
    """

    name: ClassVar[str] = "n-m-prune"
    pattern: str = "2:4"
    multiple: int = 1

    @property
    def plan(self) -> PrunePlan:
        pattern = sp.parse_pattern(self.pattern)
        if not isinstance(pattern, sp.NM):
            raise PassError(f"pattern={self.pattern} is not n:m; write for example 2:4")
        return self.planned(Goal(pattern, 1 - pattern.n / pattern.m), multiple=self.multiple)
