"""The stages of a compile up to the quantized graph: pure functions from one frozen artifact to the next.

    canonical = canonicalise(source, runner)
    pruned    = prune(canonical, PrunePasses.of(passes), runner)
    quantized = quantize(pruned, scheme, runner, keep)

What a target makes of the last one stands in nmcompile.targets.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from typing import NamedTuple, cast

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile.calibrate import Calibration
from nmcompile.contract import Pass, Progress, Report
from nmcompile.pipeline import Observer, Pipeline
from nmcompile.prune import PruningPass, Records, completed, joined, undone
from nmcompile.qdq.scheme import Scheme
from nmcompile.recipes import canonical_passes, scheme_passes
from nmcompile.roles import stated
from nmcompile.spec import spec


class PassRun(NamedTuple):
    """A pass as text, what it did, and in how many seconds."""

    spec: str
    report: Report
    seconds: float


@dataclass(frozen=True)
class Runner:
    """What goes on around the passes of every stage."""

    calibration: Calibration
    verify: bool = False
    observers: tuple[Observer, ...] = ()
    progress: Progress = lambda what, done, total: None

    @property
    def unseen(self) -> Runner:
        """The same without observers, for what is only tried."""
        return replace(self, observers=())

    def run(self, passes: Sequence[Pass], graph: gs.Graph) -> tuple[gs.Graph, tuple[PassRun, ...]]:
        """The graph after the passes, and what each did; the graph given stays as it is."""
        ran: list[PassRun] = []

        def record(pass_: Pass, _graph: gs.Graph, report: Report, seconds: float) -> None:
            ran.append(PassRun(spec(pass_), report, seconds))
            self.progress(f"pass {pass_.name}", len(ran), 0)

        pipeline = Pipeline(passes, observers=[record, *self.observers], verify=self.verify,
                            calibration=self.calibration)  # fmt: skip
        return pipeline.run(graph)[0], tuple(ran)


# ---- canonical form ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canonical:
    """The model as it came, and in canonical form."""

    source: gs.Graph
    graph: gs.Graph
    ran: tuple[PassRun, ...]

    @cached_property
    def roles(self) -> Mapping[str, Mapping[str, str]]:
        """Of the inputs whose names do not tell them."""
        return stated(input_roles.inputs(self.source))

    @cached_property
    def fingerprint(self) -> str:
        """Of the model as it came."""
        return fingerprint(self.source)


def canonicalise(source: gs.Graph, runner: Runner) -> Canonical:
    """Few operators in one form each, whatever exporter the graph is from; it computes the same."""
    return Canonical(source, *runner.run(canonical_passes(), source))


def fingerprint(graph: gs.Graph) -> str:
    """Short hash of a graph's text: its structure, names and weights."""
    return hashlib.sha256(g.to_text(graph).encode()).hexdigest()[:16]


# ---- pruning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunePasses:
    """The passes between canonical form and quantization: `orders` of features, which keep what the graph computes;
    `pruning`; and what comes `after` it, which sees what was pruned (smoothing, other orders, more pruning)."""

    orders: tuple[Pass, ...] = ()
    pruning: tuple[Pass, ...] = ()
    after: tuple[Pass, ...] = ()

    @classmethod
    def of(cls, passes: Iterable[Pass]) -> PrunePasses:
        """Passes in the order in which they shall run."""
        left = list(passes)
        orders = tuple(itertools.takewhile(lambda pass_: pass_.preserves, left))
        pruning = tuple(itertools.takewhile(lambda pass_: not pass_.preserves, left[len(orders) :]))
        return cls(orders, pruning, tuple(left[len(orders) + len(pruning) :]))


@dataclass(frozen=True)
class Pruned:
    """dense: canonical, features in the order that pruning wants. sparse: with fewer weights. graph: after all passes
    of the plan. records: masks, and what was there before. changed: the layers whose weights pruning has changed, in
    the order of the nodes. ran: the passes up to pruning, `after` those behind it."""

    canonical: Canonical
    plan: PrunePasses
    dense: gs.Graph
    sparse: gs.Graph
    graph: gs.Graph
    records: Records
    changed: tuple[str, ...]
    ran: tuple[PassRun, ...]
    after: tuple[PassRun, ...]

    def together(self, names: Iterable[str]) -> tuple[str, ...]:
        """The layers named, and those beside them that read the same tensor and were pruned: what runs as one product
        goes back as one."""
        named, layers = set(names), g.linear_layers(self.sparse)
        read = {layer.x.name for layer in layers if layer.name in named}
        return tuple(layer.name for layer in layers if layer.x.name in read and layer.name in {*named, *self.changed})


def prune(canonical: Canonical, plan: PrunePasses, runner: Runner) -> Pruned:
    """Run the plan's passes on the canonical graph."""
    dense, orders = runner.run(plan.orders, canonical.graph)
    sparse, pruning = runner.run(plan.pruning, dense)
    records = completed(joined(run.report.records for run in pruning), dense, sparse)
    changed = set(records.changed)
    graph, after = sparse, cast("tuple[PassRun, ...]", ())
    for pass_ in plan.after:
        before = graph
        graph, ran = runner.run([pass_], graph)
        after += ran
        changed |= set() if pass_.preserves else _changed(before, graph)
    ordered = tuple(layer.name for layer in g.linear_layers(graph) if layer.name in changed)
    return Pruned(canonical, plan, dense, sparse, graph, records, ordered, (*canonical.ran, *orders, *pruning), after)


def _changed(before: gs.Graph, after: gs.Graph) -> set[str]:
    """Layers of other weights."""
    known = {layer.name: layer.weight for layer in g.linear_layers(before)}
    return {layer.name for layer in g.linear_layers(after)
            if layer.name in known and not np.array_equal(layer.weight, known[layer.name])}  # fmt: skip


# ---- layers that go back -------------------------------------------------------------------------------------------


def with_dense(pruned: Pruned, names: Sequence[str], runner: Runner) -> tuple[gs.Graph, tuple[PassRun, ...]]:
    """The pruned graph without what pruning did to some layers, and the passes behind pruning that led there.

    Weights and biases of these layers are those of before. What came after pruning is done again, as it saw other
    weights: smoothing has moved factors into them, an order of features is theirs too, and more pruning leaves them
    out.
    """
    graph = _unpruned(pruned, names, runner)
    if not pruned.plan.after:
        return graph, ()
    again = [_without(pass_, names) for pass_ in pruned.plan.after]
    graph, ran = runner.run(again, graph)
    return graph, tuple(_told(PassRun(name, report, seconds), names, "dense")
                        for (name, _, _), (_, report, seconds) in zip(pruned.after, ran, strict=True))  # fmt: skip


def _unpruned(pruned: Pruned, names: Sequence[str], runner: Runner) -> gs.Graph:
    """Without the passes that came after pruning, and with normalisations that are fitted to what is pruned now."""
    if set(names) >= set(pruned.changed):
        return pruned.dense
    return undone(pruned.sparse, pruned.records, names, runner.calibration.data)


def _without(pass_: Pass, names: Sequence[str]) -> Pass:
    """A pruning pass that leaves some layers alone; others are as they were."""
    if not isinstance(pass_, PruningPass):
        return pass_
    return replace(pass_, exclude=(*pass_.exclude, *map(escape, names)))


def _told(one: PassRun, names: Sequence[str], form: str) -> PassRun:
    """A pass whose remarks say of layers that were put back that they were, not that a user named them."""
    name, report, seconds = one
    said = {f"{layer}: kept {kept}, excluded by name": f"{layer}: kept {form}, by the search that holds the limit"
            for layer in names for kept in ("as it is", "dense")}  # fmt: skip
    return PassRun(name, replace(report, notes=tuple(said.get(note, note) for note in report.notes)), seconds)


# ---- quantization --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Keep:
    """Layers that keep more than was asked for: their `dense` weights, or all of their floats (`floating`)."""

    dense: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantized:
    """The Q/DQ graph: plain ONNX that any runtime runs. floating: what it came from. ran: all that led here."""

    pruned: Pruned
    keep: Keep
    floating: gs.Graph
    graph: gs.Graph
    ran: tuple[PassRun, ...]


def quantize(pruned: Pruned, scheme: Scheme, runner: Runner, keep: Keep = Keep()) -> Quantized:
    """Quantize what pruning has left, layers of `keep` as that says."""
    graph, after = with_dense(pruned, keep.dense, runner) if keep.dense else (pruned.graph, pruned.after)
    left = replace(scheme, keep=(*scheme.keep, *map(escape, keep.floating)))
    quantized, ran = runner.run(scheme_passes(left), graph)
    told = (_told(one, keep.floating, "float") for one in ran)
    return Quantized(pruned, keep, graph, quantized, (*pruned.ran, *(after or pruned.after), *told))
