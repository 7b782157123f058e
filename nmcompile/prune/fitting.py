"""Fits pruned layers to what the dense model computes, stage by stage, each on the inputs that it will see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import solvers
from nmcompile import sparsity as sp
from nmcompile.calibrate.data import Data
from nmcompile.errors import CalibrationError
from nmcompile.prune.checkpoints import Arrays, Checkpoints
from nmcompile.prune.norms import channel_fit, snapshot
from nmcompile.prune.plan import Fit, Goal
from nmcompile.prune.records import NormRecord, packed
from nmcompile.prune.sequential import Batch, SequentialCalibration
from nmcompile.prune.stages import Stage, stages

DAMPING = (0.01, 0.05, 0.2, 0.8)  # of the Hessian's diagonal
QUICK = 8  # steps of the solutions that are only compared
HELD_OUT = 5  # every fifth batch chooses the damping

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Samples:
    """Moments of a stage: of the batches to fit to, of those to choose the damping by, of both."""

    fitting: solvers.Moments
    held: solvers.Moments
    both: solvers.Moments

    def centred(self) -> _Samples:
        """About the means, for layers that have a bias."""
        return _Samples(self.fitting.centred(), self.held.centred(), self.both.centred())


@dataclass(frozen=True)
class Fitted:
    """Of one layer: the damping taken, |error|^2 / |output|^2 against the dense model's output, the rows (tokens) it
    was fitted to, and the bits of its mask."""

    damping: float
    error: float
    rows: int
    bits: np.ndarray = field(repr=False, compare=False)


def fit(
    graph: gs.Graph,
    data: Data,
    layers: Sequence[g.Linear],
    goals: Mapping[str, Goal],
    how: Fit,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
) -> tuple[dict[str, Fitted], dict[str, NormRecord]]:
    """Prune `layers` of the graph, in place, each to its goal; what was done to each, and the normalisations that were
    fitted too, as they were before.

    checkpoints: a folder for finished stages, which a later call with the same arguments takes from there.
    CalibrationError names the layer whose inputs are not finite.
    """
    kept = None
    if checkpoints is not None:
        wanted = sorted((layer.name, str(goals[layer.name].pattern), goals[layer.name].sparsity) for layer in layers)
        kept = Checkpoints(checkpoints, graph, data, wanted, asdict(how))
    todo = stages(graph, layers, norms=how.sequential and how.norms)
    calibration = SequentialCalibration(graph, g.copy(graph), data, todo, same=1)
    found: dict[str, Fitted] = {}
    norms: dict[str, NormRecord] = {}
    for index, stage in enumerate(todo):
        if progress is not None:
            progress("fitting layers", index, len(todo))
        batches = list(calibration.batches(index))
        saved = kept.load(index) if kept is not None else None
        if saved is not None and not _whole(saved, stage, how):
            saved = None  # damaged, or of another stage: its layers are fitted again
            if progress is not None:
                progress("leaving out a damaged checkpoint", index, len(todo))
        if saved is None:
            saved = _solve(stage, batches, goals, how)
            if kept is not None:
                kept.save(index, saved)
        if "gain" in saved:
            norms |= snapshot(graph, stage.tensor)
            calibration.scale(index, saved["gain"], saved["shift"])
        found |= _taken_over(graph, stage, saved)
    if progress is not None:
        progress("fitting layers", len(todo), len(todo))
    return found, norms


def _taken_over(graph: gs.Graph, stage: Stage, saved: Arrays) -> dict[str, Fitted]:
    """Set what became of a stage's layers."""
    found = {}
    for i, layer in enumerate(stage.layers):
        g.set_weight(graph, layer, saved[f"weight{i}"])
        if f"bias{i}" in saved:
            g.set_bias(graph, layer, saved[f"bias{i}"])
        damping, error, rows = saved[f"facts{i}"]
        found[layer.name] = Fitted(float(damping), float(error), int(rows), saved[f"mask{i}"])
    return found


def _whole(saved: Arrays, stage: Stage, how: Fit) -> bool:
    """Whether a stage's arrays are all there and of its layers' sizes."""
    sizes = {name: saved[name].shape for name in saved if saved[name].dtype.kind == "f"}
    bits = {name: saved[name].shape for name in saved if saved[name].dtype == np.uint8}
    scaled = bool(how.sequential and how.norms and stage.normalised)
    ends = [("gain" in sizes) == ("shift" in sizes) == scaled, sizes.get("gain") == sizes.get("shift")]
    for i, layer in enumerate(stage.layers):
        outputs, inputs = layer.weight.shape
        ends += [sizes.get(f"weight{i}") == (outputs, inputs), sizes.get(f"facts{i}") == (3,),
                 bits.get(f"mask{i}") == (-(-outputs * inputs // 8),),
                 sizes.get(f"bias{i}", (outputs,)) == (outputs,),
                 sizes.get("gain", (inputs,)) == (inputs,)]  # fmt: skip
    return all(ends)


# ---- one stage ---------------------------------------------------------------------------------------------------


def _solve(stage: Stage, batches: list[Batch], goals: Mapping[str, Goal], how: Fit) -> Arrays:
    """What becomes of a stage: weight, bias, mask and facts of each layer by its place, gain and shift of the norm."""
    saved: Arrays = {}
    if how.sequential and how.norms and stage.normalised:
        saved["gain"], saved["shift"] = gain, shift = channel_fit(batches)
        batches = [Batch(b.index, b.x * gain + shift, b.dense_x, b.residuals) for b in batches]
    if not stage.layers:
        return saved
    plain = _moments(stage, batches, how)
    centred = plain.centred() if how.bias and any(layer.bias is not None for layer in stage.layers) else plain
    for i, layer in enumerate(stage.layers):
        biased = how.bias and layer.bias is not None
        weight, facts = _fit_layer(layer, centred if biased else plain, goals[layer.name], how)
        saved[f"weight{i}"] = weight.astype(np.float32)
        saved[f"mask{i}"] = facts.bits
        saved[f"facts{i}"] = np.array([facts.damping, facts.error, facts.rows])
        if biased and layer.bias is not None:
            saved[f"bias{i}"] = (layer.bias + plain.both.shift(layer.name, weight)).astype(np.float32)
    return saved


def _moments(stage: Stage, batches: Sequence[Batch], how: Fit) -> _Samples:
    sizes = {layer.name: layer.weight.shape[0] for layer in stage.layers}
    width = batches[0].x.shape[-1]
    parts = (solvers.Moments(width, sizes), solvers.Moments(width, sizes))
    for batch in batches:
        targets = {}
        wanted = batch.x + how.correction * (batch.dense_x - batch.x) if how.sequential else batch.dense_x
        for layer in stage.layers:
            targets[layer.name] = wanted @ layer.weight.T
            residual = stage.residuals.get(layer.name)
            if how.sequential and how.residual and residual is not None:
                now, before = batch.residuals[residual]
                targets[layer.name] += how.correction * (before - now)
        held = len(batches) >= HELD_OUT and batch.index % HELD_OUT == HELD_OUT - 1
        try:
            parts[held].add(batch.x if how.sequential else batch.dense_x, targets)
        except CalibrationError as error:
            raise CalibrationError(f"layer '{stage.layers[0].name}', input '{stage.tensor}': {error}") from None
    return _Samples(*parts, parts[0] + parts[1])


def _fit_layer(layer: g.Linear, samples: _Samples, goal: Goal, how: Fit) -> tuple[np.ndarray, Fitted]:
    """(weight, facts)."""
    weight, name = layer.weight.astype(np.float64), layer.name
    share = how.damping
    if share is None:
        share = _best_damping(samples, name, weight, goal) if samples.held.rows else DAMPING[1]
    target, hessian = solvers.damped(samples.both, name, weight, share)
    new, mask = target, np.ones(target.shape, np.bool_)
    if goal.sparsity > 0:
        new, mask = solvers.SOLVERS[how.solver].solve(target, hessian, goal.pattern, goal.sparsity)
    if how.rounding:
        new = solvers.rounded(new, hessian, new != 0)
    return new, Fitted(share, samples.both.error(name, new), samples.both.rows, packed(mask))


def _best_damping(samples: _Samples, name: str, weight: np.ndarray, goal: Goal) -> float:
    """The damping whose quick solution does best on rows it has not seen."""
    errors = []
    for share in DAMPING:
        target, hessian = solvers.damped(samples.fitting, name, weight, share)
        mask = sp.keep_mask(target**2 * np.diag(hessian), goal.pattern, goal.sparsity)
        errors.append(samples.held.error(name, solvers.descended(target, solvers.scaled(hessian), mask, QUICK)))
    return DAMPING[int(np.argmin(errors))]
