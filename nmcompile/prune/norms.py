"""Normalisations whose gain and bias follow the layers that were pruned before them, and how they are put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.calibrate.data import Data
from nmcompile.prune.records import NormRecord
from nmcompile.prune.sequential import Batch, SequentialCalibration
from nmcompile.prune.stages import norm_before, stages

MOST_GAIN = 2.0  # of a channel: more would blow up one that is hardly there any more


def channel_fit(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """gain and shift [K] that give a stage's input, channel by channel, the dense model's mean and deviation. (The
    gain of least error is smaller, by the correlation: what was lost would make every channel weaker.)"""
    x, y = (np.concatenate([getattr(batch, side) for batch in batches]) for side in ("x", "dense_x"))
    x_mean, y_mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
    spread, wanted = x.std(axis=0, dtype=np.float64), y.std(axis=0, dtype=np.float64)
    gain = np.clip(wanted / np.maximum(spread, 1e-30), 1 / MOST_GAIN, MOST_GAIN)
    return gain.astype(np.float32), (y_mean - gain * x_mean).astype(np.float32)


def snapshot(graph: gs.Graph, tensor: str) -> dict[str, NormRecord]:
    """The normalisation that makes a tensor as it is, by the name of its node."""
    node = next(node for node in graph.nodes for t in node.outputs if t.name == tensor and norm_before(t) is not None)
    gain, bias = (np.asarray(g.constant(operand)) for operand in node.inputs[1:3])
    return {node.name: NormRecord((gain, bias), (node.inputs[1].name, node.inputs[2].name))}


def restore_norms(graph: gs.Graph, records: Mapping[str, NormRecord]) -> bool:
    """Give normalisations the gain and bias that they had before they were fitted; whether any had others."""
    changed = False
    for node in graph.nodes:
        if node.name not in records:
            continue
        for at, (values, name) in enumerate(zip(records[node.name].values, records[node.name].names, strict=True), 1):
            changed |= not np.array_equal(values, np.asarray(g.constant(node.inputs[at])))
            if node.inputs[at].name != name:
                node.inputs[at] = g.changed(gs.Constant(g.fresh(graph, name), values), node.inputs[at])
    return changed


def fit_norms(graph: gs.Graph, dense: gs.Graph, data: Data, layers: Sequence[g.Linear]) -> None:
    """Let each normalisation after the first of the pruned `layers` give every channel the dense model's mean and
    deviation, in place; what was fitted when more layers were pruned is too much for fewer."""
    calibration = SequentialCalibration(graph, dense, data, stages(graph, layers, norms=True))
    for index, stage in enumerate(calibration.stages):
        batches = list(calibration.batches(index))
        if stage.normalised:
            calibration.scale(index, *channel_fit(batches))
