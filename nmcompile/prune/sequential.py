"""The inputs of linear layers, stage by stage, in a graph that is changed on the way and in the graph it was.

A stage is a tensor and the linear layers that read it. Each stage is computed from what the stages before it left in
memory, so that the whole costs one run of either graph, however many stages there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.calibrate.collect import without_padding
from nmcompile.calibrate.data import Data
from nmcompile.errors import CalibrationError, GraphError
from nmcompile.roles import real_tokens

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """The layers that read `tensor`, and the residual that is added to what a layer gives, by the layer's name.

    normalised: a LayerNormalization with a constant gain and bias makes the tensor; then there may be no layers.
    """

    tensor: str
    layers: tuple[g.Linear, ...]
    residuals: Mapping[str, str]
    normalised: bool = False


@dataclass(frozen=True)
class Batch:
    """Of one batch, the rows that are not padding: `x` [T, K] as the changed graph has it, `dense_x` as the other one;
    `residuals` [T, N] by tensor name likewise. `index` counts batches."""

    index: int
    x: Array
    dense_x: Array
    residuals: Mapping[str, tuple[Array, Array]]


def stages(graph: gs.Graph, layers: Sequence[g.Linear], norms: bool = False) -> list[Stage]:
    """The stages of some of the graph's layers, in the order of the nodes. norms: normalisations after the first of
    them are stages too, without layers where none reads them (the last one of an encoder)."""
    readers: dict[str, list[g.Linear]] = {}
    for layer in layers:
        readers.setdefault(layer.x.name, []).append(layer)
    found: list[Stage] = []
    first = {id(group[0].node): name for name, group in readers.items()}
    for node in graph.nodes:
        if id(node) in first:
            name = first[id(node)]
            residuals = {layer.name: residual for layer in readers[name]
                         if (residual := residual_of(graph, layer)) is not None}  # fmt: skip
            found.append(Stage(name, tuple(readers[name]), residuals, _norm(readers[name][0].x) is not None))
        elif norms and found and node.outputs and _norm(node.outputs[0]) and node.outputs[0].name not in readers:
            found.append(Stage(node.outputs[0].name, (), {}, True))
    return found


def _norm(tensor: gs.Tensor) -> gs.Node | None:
    node = g.producer(tensor)
    if node is None or node.op != "LayerNormalization" or len(node.inputs) < 3:
        return None
    values = [g.constant(operand) for operand in node.inputs[1:3]]
    return None if any(value is None or value.ndim != 1 for value in values) else node


def residual_of(graph: gs.Graph, layer: g.Linear) -> str | None:
    """The tensor that is added to the layer's output, when nothing else reads that."""
    users = g.consumers(layer.y)
    if len(users) != 1 or users[0].op != "Add" or g.is_output(graph, layer.y):
        return None
    others = [t for t in users[0].inputs if t is not layer.y]
    if len(others) != 1 or g.constant(others[0]) is not None:
        return None
    shapes = [t.shape for t in (others[0], layer.y)]  # one that is broadcast over the batch holds no rows of its own
    alike = None not in shapes and len(shapes[0]) == len(shapes[1]) and all(
        a == b or None in (a, b) for a, b in zip(*shapes, strict=True))  # fmt: skip
    return others[0].name if alike else None


class SequentialCalibration:
    """Walks the stages of `graph`, whose weights may be set between them; `dense` is the graph before any change.

    Both graphs have the same tensors. Memory: the tensors of the stages that later ones start from, of all of `data`.
    """

    def __init__(self, graph: gs.Graph, dense: gs.Graph, data: Data, todo: Sequence[Stage]) -> None:
        self.graph, self.dense, self.stages = graph, dense, list(todo)
        self.feeds = list(data)
        self.real = [real_tokens(feed, data.inputs) for feed in self.feeds]
        self._inputs = [info.name for info in g.inputs(graph)]
        self._known: tuple[list[dict[str, Array]], ...] = ([{} for _ in self.feeds], [{} for _ in self.feeds])
        self._last = self._lifetimes()

    def batches(self, index: int, progress: Callable[[int, int], None] | None = None) -> Iterator[Batch]:
        """The inputs of stage `index` (each once, in order); CalibrationError where the model does not run."""
        stage = self.stages[index]
        wanted = list(dict.fromkeys([stage.tensor, *stage.residuals.values()]))
        runs = [self._runner(graph, known, index, wanted)
                for graph, known in zip((self.graph, self.dense), self._known, strict=True)]  # fmt: skip
        for i, feed in enumerate(self.feeds):
            values = []
            for run, known in zip(runs, self._known, strict=True):
                try:
                    found = run({**feed, **known[i]})
                except GraphError as error:
                    raise CalibrationError(
                        f"the model does not run on the calibration data: {error}; are they this model's inputs?"
                    ) from None
                known[i][stage.tensor] = found[stage.tensor]
                values.append(found)
            for known in self._known:
                for name in [name for name in known[i] if self._last.get(name, -1) <= index]:
                    del known[i][name]
            rows = [{name: _rows(value, self.real[i]) for name, value in found.items()} for found in values]
            yield Batch(i, rows[0][stage.tensor], rows[1][stage.tensor],
                        {name: (rows[0][name], rows[1][name]) for name in stage.residuals.values()})  # fmt: skip
            if progress is not None:
                progress(i + 1, len(self.feeds))

    def scale(self, index: int, gain: Array, shift: Array) -> None:
        """Let the normalisation that makes the stage's tensor in the changed graph give gain * x + shift, [K] each."""
        name = self.stages[index].tensor
        node = next((_norm(t) for node in self.graph.nodes for t in node.outputs if t.name == name), None)
        assert node is not None
        before = [np.asarray(g.constant(operand), np.float32) for operand in node.inputs[1:3]]
        for at, value in enumerate((before[0] * gain, before[1] * gain + shift), start=1):
            fitted = gs.Constant(g.fresh(self.graph, f"{node.name}/fitted"), value)
            node.inputs[at] = g.changed(fitted, node.inputs[at])
        for known in self._known[0]:
            if name in known:
                known[name] = known[name] * gain + shift

    def _runner(
        self, graph: gs.Graph, known: list[dict[str, Array]], index: int, wanted: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        given = [name for name in (known[0] if known else {}) if name not in self._inputs]
        computed = [name for name in wanted if name not in given and name not in self._inputs]
        run = None
        if computed:
            run = g.runner(g.extract(graph, computed, [*self._inputs, *given]), computed, optimise=True)

        def call(feeds: Mapping[str, Array]) -> dict[str, Array]:
            found = run(feeds) if run is not None else {}
            return {name: found[name] if name in found else feeds[name] for name in wanted}

        return call

    def _lifetimes(self) -> dict[str, int]:
        """The last stage that is computed from each stage's tensor."""
        last: dict[str, int] = {}
        known: list[str] = []
        for index, stage in enumerate(self.stages):
            wanted = list(dict.fromkeys([stage.tensor, *stage.residuals.values()]))
            read = {name for name in wanted if name in known}
            computed = [name for name in wanted if name not in known and name not in self._inputs]
            if computed:
                part = g.extract(self.graph, computed, [*self._inputs, *known])
                read |= {t.name for t in part.inputs}
            for name in read & set(known):
                last[name] = index
            known.append(stage.tensor)
        return last


def _rows(values: Array, real: Array | None) -> Array:
    """[..., K] -> [T, K] without padding."""
    kept = without_padding(values, real)
    return kept.reshape(-1, kept.shape[-1])
