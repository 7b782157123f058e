"""How much each group of layers suffers from zeros, and the densities that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import solvers
from nmcompile import sparsity as sp
from nmcompile.calibrate.collect import without_padding
from nmcompile.calibrate.data import Data
from nmcompile.compare import powers, real_tokens
from nmcompile.prune.sequential import SequentialCalibration, stages

LADDER = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of zeros that a unit may get
STEPS = (0.25, 0.5, 0.75)  # of what is left beyond a share that the ladder does not exceed
REFERENCE = 0.5  # share of zeros at which a unit's effect on the outputs is measured
SAMPLES = 32  # on which that is done
DAMPING = 1e-2
QUICK = 8  # steps of the solutions that are only compared

Progress = Callable[[str, int, int], None]
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Unit:
    """Layers that read one tensor (query, key and value) and get one share of zeros.

    errors: by share of zeros, the part of the layers' output power that is lost, mean over the layers. weight: what a
    unit of such error adds to the relative error of the model's outputs.
    """

    layers: tuple[str, ...]
    size: int
    errors: Mapping[float, float]
    weight: float

    def to_json(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "weights": self.size, "sensitivity": round(self.weight, 6),
                "errors": {f"{share:g}": round(error, 6) for share, error in self.errors.items()}}  # fmt: skip


def ladder(sparsity: float) -> tuple[float, ...]:
    """The shares of zeros that units may get where all together shall have `sparsity`: some of them more than that, so
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
    pattern: sp.Pattern,
    shares: Sequence[float] = LADDER,
    progress: Progress | None = None,
) -> list[Unit]:
    """The table of errors: each unit pruned alone, by a quick solution, at every share of zeros."""
    cascade = SequentialCalibration(graph, graph, data, stages(graph, layers))
    tables: list[dict[float, float]] = []
    pruned: list[dict[str, np.ndarray]] = []
    for index, stage in enumerate(cascade.stages):
        if progress is not None:
            progress("measuring layers", index, 2 * len(cascade.stages))
        moments = None
        for batch in cascade.batches(index):
            moments = moments or solvers.Moments(batch.x.shape[-1], {})
            moments.add(batch.x, {})
        assert moments is not None
        matrix = moments.hessian + DAMPING * np.diag(np.diag(moments.hessian) + solvers.LEAST * moments.power_mean)
        errors: dict[float, list[float]] = {share: [] for share in shares}
        pruned.append({})
        for layer in stage.layers:
            weight = layer.weight.astype(np.float64)
            for share in shares:
                mask = sp.keep_mask(weight**2 * np.diag(matrix), pattern, share)
                left = solvers.refit(weight, matrix, mask, exact=False, steps=QUICK) if share else weight
                errors[share].append(solvers.relative_error(left, weight, matrix))
                if share == REFERENCE:
                    pruned[-1][layer.name] = left.astype(np.float32)
        tables.append({share: float(np.mean(found)) for share, found in errors.items()})
    weights = _effects(graph, data, cascade, pruned, progress)
    return [Unit(tuple(layer.name for layer in stage.layers), sum(layer.weight.size for layer in stage.layers), table,
                 effect / max(table[REFERENCE], 1e-12))
            for stage, table, effect in zip(cascade.stages, tables, weights, strict=True)]  # fmt: skip


def sparsities(units: Sequence[Unit], sparsity: float) -> dict[str, float]:
    """Layer -> share of zeros, all together `sparsity` of the units' weights."""
    shares = list(units[0].errors)
    errors = [[unit.weight * unit.errors[share] for share in shares] for unit in units]
    saved = [[int(unit.size * share) for share in shares] for unit in units]
    levels = solvers.allocate(errors, saved, int(sparsity * sum(unit.size for unit in units)))
    return {name: shares[level] for unit, level in zip(units, levels, strict=True) for name in unit.layers}


def _effects(
    graph: gs.Graph,
    data: Data,
    cascade: SequentialCalibration,
    pruned: Sequence[Mapping[str, np.ndarray]],
    progress: Progress | None,
) -> list[float]:
    """Of each unit pruned alone, |error|^2 / |output|^2 of the model's float outputs."""
    feeds, count = [], 0
    for feed in cascade.feeds:
        feeds.append(feed)
        count += len(next(iter(feed.values())))
        if count >= SAMPLES:
            break
    names = [info.name for info in g.outputs(graph) if info.dtype.kind == "f"]
    dense = g.runner(graph, names, optimise=True)
    reference = [_values(dense, feed) for feed in feeds]
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
        for feed, before in zip(feeds, reference, strict=True):
            for a, b in zip(before, _values(run, feed), strict=True):
                whole, error = powers(a, b)
                lost, power = lost + error, power + whole
        found.append(lost / max(power, 1e-300))
    return found


def _values(run: Callable[[Feed], dict[str, np.ndarray]], feed: Feed) -> list[np.ndarray]:
    return [without_padding(value, real_tokens(feed)) for value in run(feed).values()]
