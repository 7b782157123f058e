"""What the pruning passes share: which layers, by which criterion, ranked over which weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile import sparsity as sp
from nmcompile.canonical import role
from nmcompile.errors import PassError
from nmcompile.pipeline import CalibratedPass, Report

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics


@dataclass(frozen=True)
class Criterion:
    """How much a weight matters: `score(weight [N, K], statistics of its inputs)` -> [N, K].

    `needs` names the statistics of the layer's input that the score is made of.
    """

    needs: tuple[str, ...]
    score: Callable[[np.ndarray, np.ndarray | None], np.ndarray]


def _wanda(weight: np.ndarray, squares: np.ndarray | None) -> np.ndarray:
    assert squares is not None
    return sp.wanda(weight, squares)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Criterion((), lambda weight, _: sp.magnitude(weight)),
    "wanda": Criterion(("squares",), _wanda),  # |w| * ||x||, Sun et al. 2023 (arXiv 2306.11695)
}


@dataclass(frozen=True)
class Selection:
    """The layers to prune, and those left alone with the reason."""

    layers: tuple[g.Linear, ...]
    kept: Mapping[str, str]


def select(graph: gs.Graph, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """Layers named by a glob of `include` (default: all but heads and poolers) and by none of `exclude`."""
    layers, kept = [], {}
    for layer in g.linear_layers(graph):
        default = role(graph, layer)
        if any(fnmatchcase(layer.name, glob) for glob in exclude):
            kept[layer.name] = "excluded by name"
        elif include and not any(fnmatchcase(layer.name, glob) for glob in include):
            kept[layer.name] = "not included by name"
        elif layer.quantized:
            kept[layer.name] = "already quantized"
        elif not include and default:
            kept[layer.name] = f"{default}s are kept dense by default"
        else:
            layers.append(layer)
    if include and not layers:
        names = ", ".join(layer.name for layer in g.linear_layers(graph)[:4])
        raise PassError(f"include={'|'.join(include)} matches no linear layer; the graph has {names or 'none'}, ...")
    return Selection(tuple(layers), kept)


def prune(
    graph: gs.Graph,
    pattern: sp.Pattern,
    sparsity: float,
    criterion: str,
    ranking: str,
    selection: Selection,
    statistics: Statistics | None,
) -> Report:
    """Zero the least units of each layer (`ranking` "uniform") or of all together ("global")."""
    if not 0 <= sparsity < 1:
        raise PassError(f"sparsity={sparsity} is not a share of zeros between 0 and 1, for example 0.8")
    if criterion not in CRITERIA:
        raise PassError(f"criterion={criterion} is not known; choose one of {', '.join(CRITERIA)}")
    if ranking not in ("uniform", "global"):
        raise PassError(f"ranking={ranking} is not known; choose uniform or global")
    rule = CRITERIA[criterion]
    scores: dict[str, np.ndarray] = {}
    for layer in selection.layers:
        squares = statistics.squares(layer.x.name) if rule.needs and statistics is not None else None
        scores[layer.name] = rule.score(layer.weight, squares)
    threshold = None
    if ranking == "global" and not isinstance(pattern, sp.NM) and scores:
        units = [sp.unit_scores(score, pattern) for score in scores.values()]
        sizes = [score.size // unit.size for score, unit in zip(scores.values(), units, strict=True)]
        threshold = sp.global_threshold(units, sizes, sparsity)
    layers: dict[str, object] = {}
    changed, done = 0, set()
    emptied: list[str] = []
    for layer in selection.layers:
        stored = layer.node.inputs[1].name
        if stored in done:
            continue  # a weight shared by several layers is pruned once, by its first user's inputs
        done.add(stored)
        score = scores[layer.name]
        mask = sp.keep_mask(score, pattern, sparsity) if threshold is None else sp.keep_above(score, pattern, threshold)
        pruned = layer.weight * mask
        if np.count_nonzero(pruned) != np.count_nonzero(layer.weight):
            g.set_weight(graph, layer, pruned)
            changed += 1
        layers[layer.name] = round(float(sp.density(pruned)), 4)
        if not pruned.any() and layer.weight.any():
            n, k = layer.weight.shape
            emptied.append(f"{layer.name}: nothing is left of its {n}x{k} weights at {pattern}; take smaller units")
    notes = (*emptied, *(f"{name}: kept dense, {reason}" for name, reason in selection.kept.items()))
    return Report(changed=changed, detail={"pattern": str(pattern), "density": layers}, notes=notes)


class PruningPass(CalibratedPass):
    """A pass with the fields `criterion`, `include` and `exclude`; asks for what its criterion needs."""

    criterion: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        wanted = CRITERIA[self.criterion].needs if self.criterion in CRITERIA else ()
        if not wanted:
            return {}
        return {layer.x.name: wanted for layer in select(graph, self.include, self.exclude).layers}
