"""NMPrune: keep n of every m consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.passes.pruning import PruningPass, Selection, select
from nmcompile.pipeline import Report

if TYPE_CHECKING:
    from nmcompile.calibrate import Calibration


@dataclass(frozen=True)
class NMPrune(PruningPass):
    """Keep the n weights of greatest score among every m consecutive inputs of an output.

    MatMul(x, W)  ->  MatMul(x, W * keep)      2:4 along the reduction axis is what sparse tensor cores take
    """

    name: ClassVar[str] = "n-m-prune"
    pattern: str = "2:4"

    def run(self, graph: gs.Graph, calibration: Calibration | None = None) -> Report:
        pattern = sp.parse_pattern(self.pattern)
        if not isinstance(pattern, sp.NM):
            raise PassError(f"pattern={self.pattern} is not n:m; write for example 2:4")
        chosen = select(graph, self.include, self.exclude)
        fitting = tuple(layer for layer in chosen.layers if layer.weight.shape[1] % pattern.m == 0)
        kept = dict(chosen.kept)
        for layer in chosen.layers:
            if layer.weight.shape[1] % pattern.m:
                kept[layer.name] = f"K={layer.weight.shape[1]} is not a multiple of {pattern.m}"
        return self.prune(graph, pattern, 1 - pattern.n / pattern.m, Selection(fitting, kept), calibration)
