"""What a compile measures against the model it came from: the loss, and a limit on it that layers give way to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.calibrate import Data
from nmcompile.compare import Comparison, Difference
from nmcompile.contract import Progress
from nmcompile.errors import PassError
from nmcompile.fallback import Held, fall_back, layer_noise, worst_first
from nmcompile.holdout import Holdout
from nmcompile.lengths import Look, lengths_of, look
from nmcompile.metrics import METRICS, Limit, parse_limit
from nmcompile.roles import real_tokens
from nmcompile.stages import Keep, Pruned
from nmcompile.targets import Arrays, Product, Run

REMEMBERED = 1 << 28  # bytes of the model's own outputs that are kept


class Reference:
    """The model that all is measured against, in onnxruntime, which runs each batch once: its outputs are kept, up to
    REMEMBERED bytes."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._session: Run | None = None
        self._known: dict[tuple[object, ...], Arrays] = {}
        self._room = REMEMBERED

    def run(self, feeds: Arrays) -> Arrays:
        """Its outputs. The session is opened when it is first needed: it holds the weights once more."""
        key = tuple((name, array.shape, array.dtype.str, array.tobytes()) for name, array in sorted(feeds.items()))
        if key in self._known:
            return self._known[key]
        if self._session is None:
            self._session = g.runner(self.graph, [info.name for info in g.outputs(self.graph)], optimise=True)
        found = self._session(feeds)
        self._room -= sum(array.nbytes for array in [*found.values(), *feeds.values()])
        if self._room >= 0:
            self._known[key] = found
        return found

    def release(self) -> None:
        """Let go of the session and what it gave."""
        self._session, self._known, self._room = None, {}, REMEMBERED


def limit_for(asked: str | Limit | None, model: Reference, data: Data, can_run: bool) -> Limit | None:
    """The limit that was asked for. PassError where nothing runs that it could be measured on; InputError where its
    metric has nothing to measure on these outputs, or is not known."""
    if asked is None:
        return None
    if not can_run:
        raise PassError("a limit on the loss needs a plan to measure; give an output")
    if not isinstance(asked, str):
        return asked
    limit = parse_limit(asked, list(data), data.inputs)
    if limit.name in METRICS:  # before the long part
        limit.score(model.run, model.run)
    return limit


def measured_loss(model: Reference, run: Run, data: Data, progress: Progress) -> Mapping[str, Difference]:
    """What runs against the model it came from, by output."""
    comparison = Comparison(g.outputs(model.graph))
    done = 0
    for feeds in data:
        comparison.add(model.run(feeds), run(feeds), real_tokens(feeds, data.inputs))
        done += len(next(iter(feeds.values())))
        progress("measuring the loss", done, data.samples)
    return comparison.differences()


def look_beyond(
    model: Reference, run: Run, data: Data, parts: Holdout, loss: Mapping[str, Difference], progress: Progress
) -> Look:
    """What runs against the model at lengths that none of the samples has."""
    progress("looking at other lengths", 0, 1)
    return look(model.run, run, parts.measured, lengths_of(data), g.outputs(model.graph), loss)


# ---- a limit that layers give way to -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What the fallback searches over. build: a product with some layers as `Keep` says. merged: layers that read one
    tensor go back together."""

    model: Reference
    pruned: Pruned
    build: Callable[[Keep], Product]
    merged: bool
    progress: Progress

    def kept(self, dense: Sequence[str], floating: Sequence[str]) -> Keep:
        return Keep(self.pruned.together(dense) if self.merged else tuple(dense), tuple(floating))


def held_by(
    search: Search, limit: Limit, asked: str | Limit, parts: Holdout
) -> tuple[Product, Held, Holdout, list[str]]:
    """A product that stays within the limit: (it, what it took, the samples that the limit was held by, notes).

    It is measured on samples that the search did not choose by as well; where it does not hold there, the search begins
    again on all of them.
    """
    product, held = _searched(search, limit, parts.chosen)
    if not parts.apart or not isinstance(asked, str) or limit.name not in METRICS:
        return product, held, parts, []
    apart = parse_limit(asked, list(parts.measured), parts.measured.inputs)
    drop = apart.score(search.model.run, product.run)
    if drop <= limit.value:
        return product, replace(held, drop_apart=drop), parts, []
    every = parts.together()
    note = (f"{limit.name} dropped by {drop:.4g} on samples that the search had not chosen by: the limit is held by "
            "all held-out samples, and none was left to measure on")  # fmt: skip
    again = parse_limit(asked, list(every.chosen), every.chosen.inputs)
    return *_searched(search, again, every.chosen), every, [note]


def _searched(search: Search, limit: Limit, data: Data) -> tuple[Product, Held]:
    product: Product | None = None

    def attempt(dense: Sequence[str], floating: Sequence[str]) -> float:
        nonlocal product
        product = search.build(search.kept(dense, floating))
        return limit.score(search.model.run, product.run)

    def candidates() -> tuple[list[str], list[str]]:
        assert product is not None
        graph = product.quantized.graph
        noise = layer_noise(search.pruned.dense, graph, data)
        quantized = [layer.name for layer in g.linear_layers(graph) if layer.quantized]
        return worst_first(noise, search.pruned.changed), worst_first(noise, quantized)

    found = fall_back(limit, attempt, candidates, search.progress)
    assert product is not None
    keep = product.quantized.keep
    return product, Held(limit.name, limit.value, found.drop, keep.dense, keep.floating)
