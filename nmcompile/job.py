"""One compile: the graph before pruning, after it and after quantization, and what its target makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import graph as g
from nmcompile.calibrate import Calibration
from nmcompile.pipeline import Observer, Pass, Pipeline, Report
from nmcompile.recipes import Preset, canonical_passes
from nmcompile.spec import spec
from nmcompile.targets import Target

Progress = Callable[[str, int, int], None]  # (what, done, total)
Step = tuple[str, Report, float]  # a pass as text, what it did, seconds


@dataclass
class Job:
    """`prepare` runs the passes up to pruning, once; `quantize` the rest, as often as wanted, each time from there."""

    source: gs.Graph
    target: Target
    preset: Preset
    attention: str
    pruning: Sequence[Pass]
    calibration: Calibration
    verify: bool
    observers: Sequence[Observer]
    tell: Progress
    fingerprint: str = ""
    first: list[Step] = field(default_factory=list)
    last: list[Step] = field(default_factory=list)

    def prepare(self) -> None:
        """dense: canonical form, features in the order that pruning wants; pruned: that and the rest of `pruning`;
        changed: the layers whose weights pruning has changed."""
        orders = list(itertools.takewhile(lambda pass_: pass_.preserves, self.pruning))
        self.dense = self._run([*canonical_passes(), *orders], self.source, self.first)
        self.pruned = self._run(self.pruning[len(orders) :], self.dense, self.first)
        before = {layer.name: layer.weight for layer in g.linear_layers(self.dense)}
        self.changed = [layer.name for layer in g.linear_layers(self.pruned)
                        if layer.name in before and not np.array_equal(layer.weight, before[layer.name])]  # fmt: skip

    def quantize(self, dense: Sequence[str] = (), floating: Sequence[str] = ()) -> None:
        """graph: quantized, which the target then finishes. Layers `dense` unpruned, `floating` in float."""
        self.last.clear()
        graph = self.pruned if not dense else self._with_dense(self.closed(dense))
        self.graph = self._run(self.target.quantizing(self.preset, self.attention, floating), graph, self.last)
        spelled = self._run(self.target.spelling(), self.graph, self.last)
        self.observers = ()  # they have seen every pass once
        self.tell("choosing kernels", 0, 1)
        self.target.finish(spelled)

    def closed(self, names: Sequence[str]) -> list[str]:
        """The layers named, and where the target runs layers that read one tensor as one product, those beside them."""
        if self.target.multiple == 1:
            return list(names)
        layers = g.linear_layers(self.pruned)
        read = {layer.x.name for layer in layers if layer.name in names}
        return [layer.name for layer in layers if layer.x.name in read and layer.name in {*names, *self.changed}]

    @property
    def log(self) -> tuple[Step, ...]:
        return (*self.first, *self.last)

    @property
    def notes(self) -> list[str]:
        return [note for _, report, _ in self.log for note in report.notes] + list(self.target.notes)

    @property
    def header(self) -> dict[str, Any]:
        """Where a plan comes from."""
        return {"nmcompile": nmcompile.__version__, "target": self.target.name, "source": self.fingerprint,
                "passes": [name for name, _, _ in self.log]}  # fmt: skip

    def _run(self, passes: Sequence[Pass], graph: gs.Graph, log: list[Step]) -> gs.Graph:
        def record(pass_: Pass, _graph: gs.Graph, result: Report, seconds: float) -> None:
            log.append((spec(pass_), result, seconds))
            self.tell(f"pass {pass_.name}", len(self.first) + len(self.last), 0)

        observers = [record, *self.observers]
        return Pipeline(passes, observers=observers, verify=self.verify, calibration=self.calibration).run(graph)[0]

    def _with_dense(self, names: Sequence[str]) -> gs.Graph:
        """The pruned graph with the weights and biases that some layers had before; all of them: the graph before."""
        if set(names) >= set(self.changed):
            return self.dense
        graph, before = g.copy(self.pruned), {layer.name: layer for layer in g.linear_layers(self.dense)}
        for layer in g.linear_layers(graph):
            if layer.name in names:
                g.set_weight(graph, layer, before[layer.name].weight)
                bias = before[layer.name].bias
                if bias is not None:
                    g.set_bias(graph, layer, bias)
        return graph
