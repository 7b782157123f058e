"""How much each group of layers suffers from zeros, and the sparsities that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import solvers
from nmcompile import sparsity as sp
from nmcompile.calibrate.collect import without_padding
from nmcompile.calibrate.data import Data
from nmcompile.compare import powers
from nmcompile.prune.plan import Goal
from nmcompile.prune.sequential import Feed, SequentialCalibration
from nmcompile.prune.stages import Stage, stages
from nmcompile.roles import real_tokens
from nmcompile.tensorinfo import TensorInfo

LADDER = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities that a unit may get
STEPS = (0.25, 0.5, 0.75)  # of what is left beyond a sparsity that the ladder does not exceed
REFERENCE = 0.5  # sparsity at which a unit's effect on the outputs is measured
SAMPLES = 32  # on which that is done
DAMPING = 1e-2
QUICK = 8  # steps of the solutions that are only compared

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Unit:
    """Layers that read one tensor (query, key and value), have one goal and get one sparsity.

    size: weights. errors: by sparsity, the part of the layers' output power that is lost, mean over the layers.
    weight: what a unit of such error adds to the relative error of the model's outputs.
    """

    layers: tuple[str, ...]
    goal: Goal
    size: int
    errors: Mapping[float, float]
    weight: float

    def to_json(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "weights": self.size, "sensitivity": round(self.weight, 6),
                "errors": {f"{sparsity:g}": round(error, 6) for sparsity, error in self.errors.items()}}  # fmt: skip


def ladder(sparsity: float) -> tuple[float, ...]:
    """The sparsities that units may get where all together shall have `sparsity`: some of them more than that, so
    that others can have less.

    0.8 -> 0, 0.2, ... 0.9;  0.96 -> 0, 0.2, ... 0.9, 0.93, 0.96, 0.97, 0.98, 0.99
    """
    if sparsity < LADDER[-1]:
        return LADDER
    between = {round((LADDER[-1] + sparsity) / 2, 6), sparsity} - {LADDER[-1]}
    return (*LADDER, *sorted({*between, *(round(sparsity + step * (1 - sparsity), 6) for step in STEPS)}))


def measure(
    graph: gs.Graph,
    data: Data,
    layers: Sequence[g.Linear],
    goals: Mapping[str, Goal],
    progress: Progress | None = None,
) -> list[Unit]:
    """The table of errors: each unit pruned alone, by a quick solution, at every sparsity of its goal's ladder."""
    todo = stages(graph, layers)
    calibration = SequentialCalibration(graph, graph, data, todo)
    units: list[Unit] = []
    pruned: list[dict[str, np.ndarray]] = []
    total = 2 * sum(len(_groups(stage, goals)) for stage in todo)
    for index, stage in enumerate(todo):
        if progress is not None:
            progress("measuring layers", len(units), total)
        hessian = _hessian(calibration, index)
        for goal, group in _groups(stage, goals).items():
            errors, at_reference = _errors(group, hessian, goal)
            units.append(Unit(tuple(layer.name for layer in group), goal,
                              sum(layer.weight.size for layer in group), errors, 0.0))  # fmt: skip
            pruned.append(at_reference)
    effects = _effects(graph, calibration.feeds, data.inputs, pruned, progress)
    return [replace(unit, weight=effect / max(unit.errors[REFERENCE], 1e-12))
            for unit, effect in zip(units, effects, strict=True)]  # fmt: skip


def sparsities(units: Sequence[Unit], sparsity: float) -> dict[str, float]:
    """Layer -> sparsity, all together `sparsity` of the units' weights. The units have one ladder."""
    levels = list(units[0].errors)
    errors = [[unit.weight * unit.errors[level] for level in levels] for unit in units]
    saved = [[int(unit.size * level) for level in levels] for unit in units]
    chosen = solvers.allocate(errors, saved, int(sparsity * sum(unit.size for unit in units)))
    return {name: levels[at] for unit, at in zip(units, chosen, strict=True) for name in unit.layers}


def _groups(stage: Stage, goals: Mapping[str, Goal]) -> dict[Goal, list[g.Linear]]:
    """The layers of a stage by their goals."""
    found: dict[Goal, list[g.Linear]] = {}
    for layer in stage.layers:
        found.setdefault(goals[layer.name], []).append(layer)
    return found


def _hessian(calibration: SequentialCalibration, index: int) -> np.ndarray:
    """Of a stage's inputs, damped."""
    moments = None
    for batch in calibration.batches(index):
        moments = moments or solvers.Moments(batch.x.shape[-1], {})
        moments.add(batch.x, {})
    assert moments is not None
    return moments.hessian + DAMPING * np.diag(np.diag(moments.hessian) + solvers.LEAST * moments.power_mean)


def _errors(
    layers: Sequence[g.Linear], hessian: np.ndarray, goal: Goal
) -> tuple[dict[float, float], dict[str, np.ndarray]]:
    """(error by sparsity, mean over the layers; the weight of each layer at the sparsity of reference)."""
    found: dict[float, list[float]] = {sparsity: [] for sparsity in ladder(goal.sparsity)}
    at_reference = {}
    scaled = solvers.scaled(hessian)
    for layer in layers:
        weight = layer.weight.astype(np.float64, order="C")
        whole, score = max(solvers.power(weight, hessian), 1e-300), weight**2 * np.diag(hessian)
        for sparsity in found:
            mask = sp.keep_mask(score, goal.pattern, sparsity)
            left = solvers.descended(weight, scaled, mask, QUICK) if sparsity else weight
            found[sparsity].append(solvers.power_lost(left, weight, scaled) / whole if sparsity else 0.0)
            if sparsity == REFERENCE:
                at_reference[layer.name] = left.astype(np.float32)
    return {sparsity: float(np.mean(errors)) for sparsity, errors in found.items()}, at_reference


def _effects(
    graph: gs.Graph,
    samples: Sequence[Feed],
    inputs: Sequence[TensorInfo],
    pruned: Sequence[Mapping[str, np.ndarray]],
    progress: Progress | None,
) -> list[float]:
    """Of each unit pruned alone, |error|^2 / |output|^2 of the model's float outputs."""
    feeds, count = [], 0
    for feed in samples:
        feeds.append(feed)
        count += len(next(iter(feed.values())))
        if count >= SAMPLES:
            break
    names = [info.name for info in g.outputs(graph) if info.dtype.kind == "f"]
    dense = g.runner(graph, names, optimise=True)
    real = [real_tokens(feed, inputs) for feed in feeds]
    reference = [_values(dense, *item) for item in zip(feeds, real, strict=True)]
    found = []
    for index, weights in enumerate(pruned):
        if progress is not None:
            progress("measuring layers", len(pruned) + index, 2 * len(pruned))
        changed = g.copy(graph)
        for layer in g.linear_layers(changed):
            if layer.name in weights:
                g.set_weight(changed, layer, weights[layer.name])
        run = g.runner(changed, names, optimise=True)
        lost = power = 0.0
        for feed, keep, before in zip(feeds, real, reference, strict=True):
            for a, b in zip(before, _values(run, feed, keep), strict=True):
                whole, error = powers(a, b)
                lost, power = lost + error, power + whole
        found.append(lost / max(power, 1e-300))
    return found


def _values(
    run: Callable[[Feed], dict[str, np.ndarray]], feed: Feed, real: np.ndarray | None
) -> list[np.ndarray]:
    return [without_padding(value, real) for value in run(feed).values()]
