"""Carries out a plan: chooses layers, ranks what to zero, fits or masks, and says what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.contract import NEEDS_DATA, Context, Report
from nmcompile.errors import PassError
from nmcompile.prune import sensitivity
from nmcompile.prune.fitting import Fitted, fit
from nmcompile.prune.masking import apply_masks
from nmcompile.prune.plan import Goal, PrunePlan
from nmcompile.prune.records import LayerRecord, NormRecord, Records, packed
from nmcompile.prune.selection import Selection, each_weight_once, selected
from nmcompile.prune.stages import norm_before
from nmcompile.prune.undo import bias_name
from nmcompile.solvers import SOLVERS

INTEGER_PRODUCTS = ("MatMulInteger", "QLinearMatMul", "MatMulNBits", "QGemm", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class _Outcome:
    """What became of the layers: the bits of their masks, what the fit says of them, normalisations as they were."""

    bits: Mapping[str, np.ndarray]
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    norms: Mapping[str, NormRecord] = field(default_factory=dict)


def prune(graph: gs.Graph, plan: PrunePlan, context: Context) -> Report:
    """Zero weights of the graph, in place, as the plan says. PassError for names that it does not have, and where
    samples are needed that there are not."""
    selection = selected(graph, plan)
    detail: dict[str, object] = {"pattern": plan.patterns}
    if not plan.zeros or not selection.layers:
        notes = (*_nothing(graph, plan, selection), *_kept_dense(selection))
        return Report(detail={**detail, "density": {}}, notes=notes)
    if plan.needs_data and context.calibration is None:
        raise PassError(NEEDS_DATA)
    if plan.rules:
        detail["goals"] = {name: str(goal) for name, goal in selection.goals.items()}
    layers, goals = each_weight_once(selection.layers), dict(selection.goals)
    before = [(layer, bias_name(layer)) for layer in g.linear_layers(graph)]
    if plan.ranking == "sensitivity":
        goals, table = _by_sensitivity(graph, layers, goals, context)
        detail |= {"table": [unit.to_json() for unit in table]} if table else {}
    outcome = _carried_out(graph, layers, goals, plan, context)
    if outcome.fitted:
        detail["fitted"] = {name: {"error": round(item.error, 6), "damping": item.damping}
                            for name, item in outcome.fitted.items()}  # fmt: skip
    after = {layer.name: layer.weight for layer in g.linear_layers(graph)}
    records = _recorded(before, after, layers, goals, outcome)
    changed = sum(records.layers[layer.name].changed for layer in layers)
    detail["density"] = {layer.name: round(float(sp.density(after[layer.name])), 4) for layer in layers}
    already = [] if changed else ["nothing was pruned: the layers have such zeros already"]
    notes = (*already, *_few(layers, outcome.fitted), *_emptied(layers, after, goals), *_kept_dense(selection))
    return Report(changed=changed, detail=detail, notes=notes, records=records)


def _carried_out(
    graph: gs.Graph, layers: Sequence[g.Linear], goals: Mapping[str, Goal], plan: PrunePlan, context: Context
) -> _Outcome:
    if not SOLVERS[plan.fit.solver].fits:
        return _Outcome({name: packed(mask) for name, mask in apply_masks(graph, layers, goals, plan, context).items()})
    found, norms = fit(graph, context.fitting, layers, goals, plan.fit, context.progress, context.checkpoints)
    return _Outcome({name: item.bits for name, item in found.items()}, found, norms)


def _by_sensitivity(
    graph: gs.Graph, layers: Sequence[g.Linear], goals: Mapping[str, Goal], context: Context
) -> tuple[dict[str, Goal], list[sensitivity.Unit]]:
    """(the goals, with sparsities by what zeros cost among the layers of one goal; the table they follow from)."""
    free = [layer for layer in layers if not isinstance(goals[layer.name].pattern, sp.NM)]
    if not free:
        return dict(goals), []
    table = sensitivity.measure(graph, context.data, free, goals, context.progress)
    found = dict(goals)
    for goal in dict.fromkeys(unit.goal for unit in table):
        shared = sensitivity.sparsities([unit for unit in table if unit.goal == goal], goal.sparsity)
        found |= {name: replace(goal, sparsity=sparsity) for name, sparsity in shared.items()}
    return found, table


def _recorded(
    before: Sequence[tuple[g.Linear, str]],
    after: Mapping[str, np.ndarray],
    layers: Sequence[g.Linear],
    goals: Mapping[str, Goal],
    outcome: _Outcome,
) -> Records:
    """before: all layers as they were, and the names of their biases. layers: those that were pruned, whose weights
    others of them may share."""
    pruned = {layer.node.inputs[1].name: layer.name for layer in layers}
    found = {}
    for layer, held in before:
        name, norm = pruned.get(layer.node.inputs[1].name), norm_before(layer.x)
        if name is None:
            continue
        fitted = norm.name if norm is not None and norm.name in outcome.norms else None
        changed = not np.array_equal(after[layer.name], layer.weight)
        found[layer.name] = LayerRecord(goals[name].pattern, goals[name].sparsity, outcome.bits[name], layer.weight,
                                        layer.bias, held, fitted, changed)  # fmt: skip
    return Records(found, outcome.norms)


# ---- what to say -------------------------------------------------------------------------------------------------


def _nothing(graph: gs.Graph, plan: PrunePlan, selection: Selection) -> list[str]:
    """Why a pass that prunes has nothing to do, beside the reasons of the layers that it keeps."""
    if not plan.zeros:
        return ["nothing was pruned: the share of zeros that was asked for is 0"]
    if selection.kept:
        return []
    integers = sorted({node.op for node in graph.nodes if node.op in INTEGER_PRODUCTS})
    has = f"its products are {', '.join(integers)}, quantized already" if integers else (
        "only products with constant float weights (MatMul, Gemm) are layers")  # fmt: skip
    return [f"nothing was pruned: the model has no linear layers that could be; {has}"]


def _kept_dense(selection: Selection) -> list[str]:
    return [f"{name}: kept dense, {reason}" for name, reason in selection.kept.items()]


def _few(layers: Sequence[g.Linear], found: Mapping[str, Fitted]) -> list[str]:
    """Fewer tokens than inputs leave directions that no sample shows: only damping holds the weights there."""
    poor = [layer for layer in layers if layer.name in found and found[layer.name].rows < layer.weight.shape[1]]
    if not poor:
        return []
    most = max(layer.weight.shape[1] for layer in poor)
    return [f"{len(poor)} layers of up to {most} inputs were fitted to {found[poor[0].name].rows} tokens only, held by "
            "damping; give more calibration samples"]  # fmt: skip


def _emptied(layers: Sequence[g.Linear], after: Mapping[str, np.ndarray], goals: Mapping[str, Goal]) -> list[str]:
    return [f"{layer.name}: nothing is left of its {layer.weight.shape[0]}x{layer.weight.shape[1]} weights at "
            f"{goals[layer.name].pattern}; take smaller units"
            for layer in layers if layer.weight.any() and not after[layer.name].any()]  # fmt: skip
