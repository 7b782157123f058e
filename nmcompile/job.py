"""One compile: the graph before pruning, after it and after quantization, and what its target makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import Calibration
from nmcompile.pipeline import Observer, Pass, Pipeline, Report
from nmcompile.prune import PruningPass, completed, joined, undone
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
    middle: list[Step] = field(default_factory=list)
    last: list[Step] = field(default_factory=list)

    def prepare(self) -> None:
        """dense: canonical form, features in the order that pruning wants; pruned: with fewer weights; after: the other
        passes of `pruning`, which see what was pruned (smoothing, orders, more pruning); changed: the layers whose
        weights pruning has changed."""
        orders = list(itertools.takewhile(lambda pass_: pass_.preserves, self.pruning))
        rest = self.pruning[len(orders) :]
        core = list(itertools.takewhile(lambda pass_: not pass_.preserves, rest))
        self.after = rest[len(core) :]
        self.dense = self._run([*canonical_passes(), *orders], self.source, self.first)
        self.pruned = self._run(core, self.dense, self.first)
        before = {layer.name: layer.weight for layer in g.linear_layers(self.dense)}
        changed = {layer.name for layer in g.linear_layers(self.pruned)
                   if layer.name in before and not np.array_equal(layer.weight, before[layer.name])}  # fmt: skip
        graph = self.pruned
        for pass_ in self.after:
            before = {layer.name: layer.weight for layer in g.linear_layers(graph)}
            graph = self._run([pass_], graph, self.middle)
            changed |= set() if pass_.preserves else {
                layer.name for layer in g.linear_layers(graph)
                if layer.name in before and not np.array_equal(layer.weight, before[layer.name])}  # fmt: skip
        self.finished = graph
        self.changed = [layer.name for layer in g.linear_layers(graph) if layer.name in changed]

    def quantize(self, dense: Sequence[str] = (), floating: Sequence[str] = ()) -> None:
        """graph: quantized, which the target then finishes. Layers `dense` unpruned, `floating` in float."""
        self.last.clear()
        dense = self.closed(dense)
        graph = self._with_dense(dense) if dense else self.finished
        exclude = [escape(name) for name in floating]
        self.graph = self._run(self.target.quantizing(self.preset, self.attention, exclude), graph, self.last)
        self.last[:] = [_told(step, floating, "float") for step in self.last]
        spelled = self._run(self.target.legalizing(), self.graph, self.last)
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
        return (*self.first, *self.middle, *self.last)

    @property
    def notes(self) -> list[str]:
        """Each remark once: some passes run twice."""
        told = [note for _, report, _ in self.log for note in report.notes] + list(self.target.notes)
        return list(dict.fromkeys(told))

    @property
    def header(self) -> dict[str, Any]:
        """Where a plan comes from."""
        return {"nmcompile": nmcompile.__version__, "target": self.target.name, "source": self.fingerprint,
                "passes": [name for name, _, _ in self.log]}  # fmt: skip

    def _run(self, passes: Sequence[Pass], graph: gs.Graph, log: list[Step]) -> gs.Graph:
        def record(pass_: Pass, _graph: gs.Graph, result: Report, seconds: float) -> None:
            log.append((spec(pass_), result, seconds))
            self.tell(f"pass {pass_.name}", len(self.log), 0)

        observers = [record, *self.observers]
        return Pipeline(passes, observers=observers, verify=self.verify, calibration=self.calibration).run(graph)[0]

    # ---- layers that go back -------------------------------------------------------------------------------------

    def _with_dense(self, names: Sequence[str]) -> gs.Graph:
        """The graph before quantization as it is without what pruning did to some layers.

        Their weights and biases are those of before. What came after pruning is done again, as it saw other weights:
        smoothing has moved factors into them, an order of features is theirs too, and more pruning leaves them out.
        """
        if not self.after:
            return self._unpruned(names)
        log: list[Step] = []
        again = [_without(pass_, names) for pass_ in self.after]
        graph = self._run(again, self._unpruned(names), log)
        self.middle[:] = [_told((name, report, seconds), names, "dense")
                          for (name, _, _), (_, report, seconds) in zip(self.middle, log, strict=True)]  # fmt: skip
        return graph

    def _unpruned(self, names: Sequence[str]) -> gs.Graph:
        """The pruned graph with the weights and biases that some layers had before, and normalisations that are fitted
        to what is pruned now; all of them: the graph before."""
        if set(names) >= set(self.changed):
            return self.dense
        records = completed(joined(report.records for _, report, _ in self.first), self.dense, self.pruned)
        return undone(self.pruned, records, names, self.calibration.data)


def _without(pass_: Pass, names: Sequence[str]) -> Pass:
    """A pruning pass that leaves some layers alone; others are as they were."""
    if not isinstance(pass_, PruningPass):
        return pass_
    return replace(pass_, exclude=(*pass_.exclude, *map(escape, names)))


def _told(step: Step, names: Sequence[str], form: str) -> Step:
    """A step whose remarks say of layers that were put back that they were, not that a user named them."""
    name, report, seconds = step
    said = {f"{layer}: kept {kept}, excluded by name": f"{layer}: kept {form}, by the search that holds the limit"
            for layer in names for kept in ("as it is", "dense")}  # fmt: skip
    return name, replace(report, notes=tuple(said.get(note, note) for note in report.notes)), seconds
