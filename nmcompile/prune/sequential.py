"""The inputs of linear layers, stage by stage, in a graph that is changed on the way and in the graph it was.

Each stage is computed from what the stages before it left in memory, so that the whole costs one run of either graph,
however many stages there are; and a single run of both as long as they are the same.
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
from nmcompile.prune.stages import Stage, norm_before
from nmcompile.roles import real_tokens

Array = npt.NDArray[Any]
Feed = dict[str, Array]


@dataclass(frozen=True)
class Batch:
    """Of one batch, the rows that are not padding: `x` [T, K] as the changed graph has it, `dense_x` as the other one;
    `residuals` [T, N] by tensor name likewise. `index` counts batches."""

    index: int
    x: Array
    dense_x: Array
    residuals: Mapping[str, tuple[Array, Array]]


class SequentialCalibration:
    """Walks the stages of `graph`, whose weights may be set between them; `dense` is the graph before any change.

    Both graphs have the same tensors. `same`: how many stages see the same in either graph, those before the first
    change and that one itself; all of them where `dense` is the graph. Memory: the tensors of the stages that later
    ones start from, of all of `data`.
    """

    def __init__(self, graph: gs.Graph, dense: gs.Graph, data: Data, todo: Sequence[Stage], same: int = 0) -> None:
        self.graph, self.dense, self.stages = graph, dense, list(todo)
        self.feeds = list(data)
        self.real = [real_tokens(feed, data.inputs) for feed in self.feeds]
        self._same = len(self.stages) if graph is dense else same
        self._inputs = [info.name for info in g.inputs(graph)]
        self._known: tuple[list[Feed], list[Feed]] = ([{} for _ in self.feeds], [{} for _ in self.feeds])
        self._last = self._lifetimes()

    def batches(self, index: int) -> Iterator[Batch]:
        """The inputs of stage `index` (each once, in order); CalibrationError where the model does not run."""
        stage = self.stages[index]
        wanted = list(dict.fromkeys([stage.tensor, *stage.residuals.values()]))
        alike = index < self._same
        runs = [self._runner(graph, wanted) for graph in ([self.dense] if alike else [self.graph, self.dense])]
        for i, feed in enumerate(self.feeds):
            known = [self._known[1][i]] if alike else [self._known[0][i], self._known[1][i]]
            values = [_computed(run, {**feed, **before}) for run, before in zip(runs, known, strict=True)]
            mine, dense = values[0], values[-1]
            self._keep(index, i, mine, dense)
            tensors = {name: _rows(value, self.real[i]) for name, value in dense.items()}
            x = tensors if alike else {name: _rows(value, self.real[i]) for name, value in mine.items()}
            yield Batch(i, x[stage.tensor], tensors[stage.tensor],
                        {name: (x[name], tensors[name]) for name in stage.residuals.values()})  # fmt: skip

    def _keep(self, index: int, i: int, mine: Feed, dense: Feed) -> None:
        """Hold the stage's tensor for the stages that are computed from it; let go what none needs any more."""
        tensor = self.stages[index].tensor
        for known, values in zip(self._known, (mine, dense), strict=True):
            known[i][tensor] = values[tensor]
            for name in [name for name in known[i] if self._last.get(name, -1) <= index]:
                del known[i][name]

    def scale(self, index: int, gain: Array, shift: Array) -> None:
        """Let the normalisation that makes the stage's tensor in the changed graph give gain * x + shift, [K] each."""
        name = self.stages[index].tensor
        node = next((norm_before(t) for node in self.graph.nodes for t in node.outputs if t.name == name), None)
        assert node is not None
        before = [np.asarray(g.constant(operand), np.float32) for operand in node.inputs[1:3]]
        for at, value in enumerate((before[0] * gain, before[1] * gain + shift), start=1):
            fitted = gs.Constant(g.fresh(self.graph, f"{node.name}/fitted"), value)
            node.inputs[at] = g.changed(fitted, node.inputs[at])
        for known in self._known[0]:
            if name in known:
                known[name] = known[name] * gain + shift

    def _runner(self, graph: gs.Graph, wanted: Sequence[str]) -> Callable[[Feed], Feed]:
        """The values of `wanted` in a graph, from its inputs and what is known of the stages before."""
        given = [name for name in (self._known[1][0] if self.feeds else {}) if name not in self._inputs]
        computed = [name for name in wanted if name not in given and name not in self._inputs]
        run = None
        if computed:
            run = g.runner(g.extract(graph, computed, [*self._inputs, *given]), computed, optimise=True)

        def call(feeds: Feed) -> Feed:
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


def _computed(run: Callable[[Feed], Feed], feeds: Feed) -> Feed:
    try:
        return run(feeds)
    except GraphError as error:
        raise CalibrationError(
            f"the model does not run on the calibration data: {error}; are they this model's inputs?"
        ) from None


def _rows(values: Array, real: Array | None) -> Array:
    """[..., K] -> [T, K] without padding."""
    kept = without_padding(values, real)
    return kept.reshape(-1, kept.shape[-1])
