"""The student behind quantize/dequantize pairs: the forward pass rounds what the compile that follows rounds.

pair -> behind_pairs -> Behind.pair: smoothed and calibrated as in a compile, ranges and scales fixed, weights float
                     -> Behind.take_back(): what was trained, in the weights of the pair that came
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
import torch

from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Statistics
from nmcompile.qdq import placement, smoothing
from nmcompile.qdq.placed import insert
from nmcompile.qdq.scheme import Scheme
from nmcompile.torch import Module
from nmcompile.training.pair import Pair


@dataclass(frozen=True)
class Stored:
    """Where a trained initializer of the source is now: its name, and what smoothing has multiplied its rows by."""

    name: str
    factors: np.ndarray | None = None


@dataclass(frozen=True)
class Behind:
    """source: the pair that came. pair: the same teacher, and the student with rounding. stored: by initializer of the
    source's student, what is trained."""

    source: Pair
    pair: Pair
    stored: Mapping[str, Stored]

    def take_back(self) -> None:
        """Put what the quantized student has learnt into the source's, without the factors; zeros stay zeros."""
        mine, theirs = self.source.student.initializers, self.pair.student.initializers
        with torch.no_grad():
            for name, place in self.stored.items():
                values: torch.Tensor = theirs[place.name]
                if place.factors is not None:
                    values = values / torch.from_numpy(place.factors).to(values)[:, None]
                mine[name].copy_(values)


def behind_pairs(pair: Pair, calibration: Calibration, scheme: Scheme) -> Behind:
    """The pair with a student as it is now whose layers and attention read rounded values, in float32: what the Q/DQ
    graph of these weights computes in onnxruntime, bit for bit in what is rounded."""
    graph = pair.student.graph()
    found: Mapping[str, smoothing.Smoothed] = {}
    if scheme.alpha is not None:
        wanted = smoothing.needs(graph, scheme.alpha)
        found = smoothing.smooth(graph, scheme.alpha, scheme.dtype, _collected(calibration, graph, wanted))
    factors = {layer: each.factors for each in found.values() for layer in each.layers}
    names = {layer.name: g.weight_of(layer).name for layer in g.linear_layers(graph)}  # before pairs stand around them
    places = placement.place(graph, scheme)
    done = insert(graph, places, scheme, _collected(calibration, graph, placement.needs(places, scheme)))
    weights = {layer: done.layers[layer].weight if layer in done.layers else name for layer, name in names.items()}
    student = Module(done.graph, pair.ends, {weights[layer] for layer in pair.weights}).to(pair.device)
    parted = {other for name, other in pair.student.tied.items() if student.tied.get(name) != other}
    stored = {name: Stored(name) for name in pair.trained if name not in parted}  # a head would not follow its table
    for layer, name in names.items():
        if name in stored:
            stored[name] = Stored(weights[layer], factors.get(layer))
    student.requires_grad_(False)
    for place in stored.values():
        student.initializers[place.name].requires_grad_(True)
    masked = {layer: stored[name].name for layer, name in pair.weights.items()}
    trained = tuple(place.name for place in stored.values())
    return Behind(pair, replace(pair, student=student, weights=masked, trained=trained, half=False), stored)


def _collected(calibration: Calibration, graph: gs.Graph, wanted: Mapping[str, tuple[str, ...]]) -> Statistics | None:
    return calibration.collect(graph, wanted) if wanted else None
