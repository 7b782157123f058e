"""Fits pruned layers to what the dense model computes, stage by stage, each on the inputs that it will see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import solvers
from nmcompile import sparsity as sp
from nmcompile.calibrate.data import Data
from nmcompile.errors import CalibrationError
from nmcompile.prune.checkpoints import Checkpoints
from nmcompile.prune.sequential import Batch, SequentialCalibration, Stage, stages

DAMPING = (0.01, 0.05, 0.2, 0.8)  # of the Hessian's diagonal
QUICK = 8  # steps of the solutions that are only compared
MOST_GAIN = 2.0  # of a channel: more would blow up one that is hardly there any more
HELD_OUT = 5  # every fifth batch chooses the damping

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fit:
    """How layers are fitted.

    sequential: inputs are those of the compressed model; otherwise they are the dense model's. correction: how much of
    what the inputs have lost by then the layer shall make up for: 0 aims at what it would give on these inputs, 1 at
    what the dense model gives, which shrinks what cannot be predicted. residual: the same share of what the residual
    beside it has lost is part of the target of the layer that is added to it. bias: biases take on the mean error.
    norms: gain and bias of a normalisation give each channel the mean and deviation that it has in the dense model.
    damping: None chooses by held-out batches. rounding: weights end on int8 levels, each rounding error made up for by
    later ones.
    """

    solver: str = "admm"
    sequential: bool = True
    correction: float = 0.25
    residual: bool = True
    bias: bool = True
    norms: bool = True
    damping: float | None = None
    rounding: bool = False


@dataclass(frozen=True)
class Fitted:
    """Of one layer: the damping taken, |error|^2 / |output|^2 against the dense model's output, and the rows (tokens)
    it was fitted to."""

    damping: float
    error: float
    rows: int


def fit(
    graph: gs.Graph,
    data: Data,
    layers: Sequence[g.Linear],
    pattern: sp.Pattern,
    sparsity: Mapping[str, float],
    how: Fit,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
) -> dict[str, Fitted]:
    """Prune `layers` of the graph, in place, to the share of zeros that `sparsity` gives by name.

    checkpoints: a folder for finished stages, which a later call with the same arguments takes from there.
    CalibrationError names the layer whose inputs are not finite.
    """
    kept = None
    if checkpoints is not None:
        kept = Checkpoints(checkpoints, graph, data, str(pattern), sorted(sparsity.items()), asdict(how))
    todo = stages(graph, layers, norms=how.sequential and how.norms)
    cascade = SequentialCalibration(graph, g.copy(graph), data, todo)
    found: dict[str, Fitted] = {}
    for index, stage in enumerate(cascade.stages):
        if progress is not None:
            progress("fitting layers", index, len(cascade.stages))
        batches = list(cascade.batches(index))
        saved = kept.load(index) if kept is not None else None
        if saved is not None and not _whole(saved, stage, how):
            saved = None  # damaged, or of another stage: its layers are fitted again
            if progress is not None:
                progress("leaving out a damaged checkpoint", index, len(cascade.stages))
        if saved is None:
            saved = _solve(stage, batches, pattern, sparsity, how)
            if kept is not None:
                kept.save(index, saved)
        if "gain" in saved:
            cascade.scale(index, saved["gain"], saved["shift"])
        for i, layer in enumerate(stage.layers):
            g.set_weight(graph, layer, saved[f"weight{i}"])
            if f"bias{i}" in saved:
                g.set_bias(graph, layer, saved[f"bias{i}"])
            damping, error, rows = saved[f"facts{i}"]
            found[layer.name] = Fitted(float(damping), float(error), int(rows))
    if progress is not None:
        progress("fitting layers", len(cascade.stages), len(cascade.stages))
    return found


def _whole(saved: Mapping[str, np.ndarray], stage: Stage, how: Fit) -> bool:
    """Whether a stage's arrays are all there and of its layers' sizes."""
    sizes = {name: saved[name].shape for name in saved if saved[name].dtype.kind == "f"}
    scaled = bool(how.sequential and how.norms and stage.normalised)
    ends = [("gain" in sizes) == ("shift" in sizes) == scaled, sizes.get("gain") == sizes.get("shift")]
    for i, layer in enumerate(stage.layers):
        outputs, inputs = layer.weight.shape
        ends += [sizes.get(f"weight{i}") == (outputs, inputs), sizes.get(f"facts{i}") == (3,),
                 sizes.get(f"bias{i}", (outputs,)) == (outputs,),
                 sizes.get("gain", (inputs,)) == (inputs,)]  # fmt: skip
    return all(ends)


def restore_norms(graph: gs.Graph, dense: gs.Graph) -> bool:
    """Give the normalisations of a pruned graph the gain and bias that they have in the dense one; whether any had
    others."""
    before = {node.name: node for node in dense.nodes if node.op == "LayerNormalization"}
    changed = False
    for node in graph.nodes:
        old = before.get(node.name)
        if old is None or node.op != "LayerNormalization":
            continue
        for at in range(1, min(len(node.inputs), len(old.inputs))):
            values, fitted = g.constant(old.inputs[at]), g.constant(node.inputs[at])
            if values is not None and fitted is not None and not np.array_equal(values, fitted):
                node.inputs[at] = g.changed(gs.Constant(g.fresh(graph, f"{node.name}/dense"), values), node.inputs[at])
                changed = True
    return changed


def fit_norms(graph: gs.Graph, dense: gs.Graph, data: Data, layers: Sequence[g.Linear]) -> None:
    """Let each normalisation after the first of the pruned `layers` give every channel the dense model's mean and
    deviation, in place; what was fitted when more layers were pruned is too much for fewer."""
    cascade = SequentialCalibration(graph, dense, data, stages(graph, layers, norms=True))
    for index, stage in enumerate(cascade.stages):
        batches = list(cascade.batches(index))
        if stage.normalised:
            cascade.scale(index, *_norm(batches))


def _solve(
    stage: Stage, batches: list[Batch], pattern: sp.Pattern, sparsity: Mapping[str, float], how: Fit
) -> dict[str, np.ndarray]:
    """What becomes of a stage: weight, bias and facts of each layer by its place, gain and shift of the norm."""
    saved: dict[str, np.ndarray] = {}
    if how.sequential and how.norms and stage.normalised:
        saved["gain"], saved["shift"] = gain, shift = _norm(batches)
        batches = [Batch(b.index, b.x * gain + shift, b.dense_x, b.residuals) for b in batches]
    if not stage.layers:
        return saved
    parts = _moments(stage, batches, how)
    for i, layer in enumerate(stage.layers):
        weight, bias, facts = _fit_layer(layer, parts, pattern, sparsity[layer.name], how)
        saved[f"weight{i}"] = weight.astype(np.float32)
        saved[f"facts{i}"] = np.array([facts.damping, facts.error, facts.rows])
        if bias is not None:
            saved[f"bias{i}"] = bias.astype(np.float32)
    return saved


def _moments(stage: Stage, batches: Sequence[Batch], how: Fit) -> tuple[solvers.Moments, solvers.Moments]:
    """(of the batches to fit, of those to choose the damping by)."""
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
    return parts


def _fit_layer(
    layer: g.Linear,
    parts: tuple[solvers.Moments, solvers.Moments],
    pattern: sp.Pattern,
    sparsity: float,
    how: Fit,
) -> tuple[np.ndarray, np.ndarray | None, Fitted]:
    """(weight, bias if it has one that is fitted, facts)."""
    weight, name = layer.weight.astype(np.float64), layer.name
    whole = parts[0] + parts[1]
    biased = how.bias and layer.bias is not None
    fitting, held, both = (part.centred() if biased else part for part in (*parts, whole))
    share = how.damping
    if share is None:
        share = _best_damping(fitting, held, name, weight, pattern, sparsity) if held.rows else DAMPING[1]
    target, hessian = solvers.damped(both, name, weight, share)
    new = solvers.SOLVERS[how.solver](target, hessian, pattern, sparsity) if sparsity > 0 else target
    if how.rounding:
        new = solvers.rounded(new, hessian, new != 0)
    bias = layer.bias + (whole.shift(name, new)) if biased and layer.bias is not None else None
    return new, bias, Fitted(share, both.error(name, new), whole.rows)


def _best_damping(
    fitting: solvers.Moments,
    held: solvers.Moments,
    name: str,
    weight: np.ndarray,
    pattern: sp.Pattern,
    sparsity: float,
) -> float:
    """The damping whose quick solution does best on rows it has not seen."""
    errors = []
    for share in DAMPING:
        target, hessian = solvers.damped(fitting, name, weight, share)
        mask = sp.keep_mask(target**2 * np.diag(hessian), pattern, sparsity)
        errors.append(held.error(name, solvers.refit(target, hessian, mask, exact=False, steps=QUICK)))
    return DAMPING[int(np.argmin(errors))]


def _norm(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """gain and shift [K] that give the stage's input, channel by channel, the dense model's mean and deviation. (The
    gain of least error is smaller, by the correlation: what was lost would make every channel weaker.)"""
    x, y = (np.concatenate([getattr(batch, side) for batch in batches]) for side in ("x", "dense_x"))
    x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    spread, wanted = x.std(axis=0, dtype=np.float64), y.std(axis=0, dtype=np.float64)
    gain = np.clip(wanted / np.maximum(spread, 1e-30), 1 / MOST_GAIN, MOST_GAIN)
    return gain.astype(np.float32), (y_mean - gain * x_mean).astype(np.float32)
