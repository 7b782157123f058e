"""Pruning by solvers that leave the kept weights as they are: scores, ranked layer by layer or over many layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.contract import Context
from nmcompile.prune.plan import Goal, PrunePlan
from nmcompile.solvers import SOLVERS, Needs


def apply_masks(
    graph: gs.Graph, layers: Sequence[g.Linear], goals: Mapping[str, Goal], plan: PrunePlan, context: Context
) -> dict[str, sp.Mask]:
    """Zero the units of least score, the rest stays; the mask of each layer."""
    scores = _scores(graph, layers, plan.fit.solver, context)
    bars = _thresholds(scores, goals) if plan.ranking == "global" else {}
    masks = {}
    for layer in layers:
        score, goal = scores[layer.name], goals[layer.name]
        mask = (sp.keep_mask(score, goal.pattern, goal.sparsity) if goal not in bars
                else sp.keep_above(score, goal.pattern, bars[goal]))  # fmt: skip
        pruned = layer.weight * mask
        if np.count_nonzero(pruned) != np.count_nonzero(layer.weight):
            g.set_weight(graph, layer, pruned)
        masks[layer.name] = mask
    return masks


def _scores(graph: gs.Graph, layers: Sequence[g.Linear], solver: str, context: Context) -> dict[str, np.ndarray]:
    row = SOLVERS[solver]
    assert row.score is not None
    if row.needs is Needs.NOTHING:
        return {layer.name: row.score(layer.weight, np.empty(0)) for layer in layers}
    statistics = context.collect(graph, {layer.x.name: ("squares",) for layer in layers})
    return {layer.name: row.score(layer.weight, statistics.squares(layer.x.name)) for layer in layers}


def _thresholds(scores: Mapping[str, np.ndarray], goals: Mapping[str, Goal]) -> dict[Goal, float]:
    """The score below which units go, of the layers of each goal together; n:m has none."""
    found = {}
    for goal in dict.fromkeys(goals[name] for name in scores):
        if isinstance(goal.pattern, sp.NM):
            continue
        those = [score for name, score in scores.items() if goals[name] == goal]
        units = [sp.unit_scores(score, goal.pattern) for score in those]
        sizes = [score.size // unit.size for score, unit in zip(those, units, strict=True)]
        found[goal] = sp.global_threshold(units, sizes, goal.sparsity)
    return found
