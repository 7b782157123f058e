"""NMPrune: keep n of every m consecutive inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.contract import Context, Report
from nmcompile.errors import PassError
from nmcompile.prune.selection import PruningPass, Selection, select


@dataclass(frozen=True)
class NMPrune(PruningPass):
    """Keep the n weights of greatest score among every m consecutive inputs of an output.

    MatMul(x, W)  ->  MatMul(x, W * keep)      2:4 along the reduction axis is what sparse tensor cores take

    multiple: of which outputs and inputs must be for a layer to be pruned, as kernels ask for; layers that read one
    tensor (query, key and value) run as one product, so one that stays dense keeps all of them dense.
    """

    name: ClassVar[str] = "n-m-prune"
    pattern: str = "2:4"
    multiple: int = 1

    def run(self, graph: gs.Graph, context: Context) -> Report:
        pattern = sp.parse_pattern(self.pattern)
        if not isinstance(pattern, sp.NM):
            raise PassError(f"pattern={self.pattern} is not n:m; write for example 2:4")
        chosen = select(graph, self.include, self.exclude)
        named = {name for name, why in chosen.kept.items() if "by name" in why}
        left = [layer for layer in g.linear_layers(graph) if layer.name in named]
        kept = {**chosen.kept, **self._unfit(chosen.layers, pattern.m, left)}
        fitting = tuple(layer for layer in chosen.layers if layer.name not in kept)
        return self.prune(graph, pattern, 1 - pattern.n / pattern.m, Selection(fitting, kept), context)

    def _unfit(self, layers: Sequence[g.Linear], group: int, left: Sequence[g.Linear] = ()) -> dict[str, str]:
        """Layers of sizes that do not fit, and those merged with them or with layers that are `left` out, with the
        reason."""
        kept: dict[str, str] = {}
        for layer in layers:
            outputs, inputs = layer.weight.shape
            if inputs % group:
                kept[layer.name] = f"K={inputs} is not a multiple of {group}"
            elif inputs % self.multiple or outputs % self.multiple:
                kept[layer.name] = f"{outputs}x{inputs} are not multiples of {self.multiple}"
        if self.multiple > 1:
            first = {layer.x.name: layer.name for layer in reversed(layers) if layer.name in kept}
            first |= {layer.x.name: layer.name for layer in left}
            for layer in layers:
                if layer.x.name in first:
                    kept.setdefault(layer.name, f"it runs as one product with {first[layer.x.name]}, which stays dense")
        return kept
