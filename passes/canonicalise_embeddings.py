"""CanonicaliseEmbeddings: look-ups by an input, by position, or of one constant row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile import probe
from nmcompile.canonical import Builder, Positions, build_positions, match_positions
from nmcompile.errors import NmcompileError
from nmcompile.pipeline import Pass, Report

DRAWS = (0, 1)
LARGEST = 500  # token id of a further run, for ids and what is clipped or compared agree on zeros and ones


@dataclass(frozen=True)
class CanonicaliseEmbeddings(Pass):
    """Read every embedding table by a graph input, by canonical positions, or once.

    Gather(table, <Slice, Expand, CumSum ... over the inputs>)  ->  Gather(table, Range(0, sequence))
    Gather(table, zeros)                                        ->  table[0]

    What the ids are is read off runs on random inputs at two sizes.
    """

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph) -> Report:
        sliced = [node for node in graph.nodes if _is_slice(node)]
        lookups = [node for node in graph.nodes if _is_lookup(node)] + sliced
        inputs = {t.name for t in graph.inputs}
        open_ = [n for n in lookups if n.op == "Slice" or (
            n.inputs[1].name not in inputs and match_positions(n.inputs[1]) is None)]  # fmt: skip
        done = len(lookups) - len(open_)
        if not open_:
            return Report(detail={"matched": f"{done}/{done}"} if done else {})
        reason = probe.annotate(graph)
        if reason is not None:
            return Report(detail={"matched": f"{done}/{len(lookups)}"},
                          notes=(f"embeddings not matched, the graph could not be run: {reason}",))  # fmt: skip
        notes: list[str] = []
        changed = 0
        for node in open_:
            try:
                changed += _slice(graph, node) if node.op == "Slice" else _canonicalise(graph, node, notes)
            except NmcompileError as error:
                notes.append(f"{node.name}: embedding not matched, its ids cannot be computed alone: {error}")
        if changed:
            g.cleanup(graph)
        return Report(changed=changed, detail={"matched": f"{done + changed}/{len(lookups)}"}, notes=tuple(notes))


def _is_lookup(node: gs.Node) -> bool:
    if node.op != "Gather" or node.attrs.get("axis", 0) != 0 or not isinstance(node.inputs[0], gs.Constant):
        return False
    table, ids = node.inputs
    rank = len(ids.shape) if ids.shape is not None else 2
    return len(table.shape) == 2 and table.dtype == np.float32 and g.constant(ids) is None and rank in (1, 2)


def _is_slice(node: gs.Node) -> bool:
    """A table cut to the sequence's length, as some exporters read positions."""
    if node.op != "Slice" or not isinstance(node.inputs[0], gs.Constant) or not node.outputs[0].shape:
        return False
    table, shape = node.inputs[0], node.outputs[0].shape
    return len(table.shape) == 2 and table.dtype == np.float32 and not isinstance(shape[0], int)


def _slice(graph: gs.Graph, node: gs.Node) -> int:
    table, y = node.inputs[0], node.outputs[0]
    for draw in DRAWS:
        feeds = probe.binary_feeds(graph, draw)
        value = probe.evaluate(graph, [y.name], feeds)[y.name]
        tokens = [t for t in graph.inputs if feeds[t.name].ndim == 2]
        source = next((t for t in tokens if feeds[t.name].shape[1] == len(value)), None)
        if source is None or not _equal(value, table.values[: len(value)]):
            return 0
    b = Builder(graph, node.name)
    new = b("Gather", table, build_positions(b, Positions(), source), axis=0, shape=y.shape)
    g.rewire(graph, y, new)
    return 1


def _canonicalise(graph: gs.Graph, node: gs.Node, notes: list[str]) -> int:
    table, ids = node.inputs
    values, feeds = [], []
    for draw, largest in (*((draw, 1) for draw in DRAWS), (0, LARGEST)):
        feeds.append(probe.binary_feeds(graph, draw, largest))
        values.append(probe.evaluate(graph, [ids.name], feeds[-1])[ids.name])
    sources = [t for t in graph.inputs if t.name in feeds[0] and feeds[0][t.name].ndim == 2]
    for source in sources:
        if all(_equal(v, f[source.name]) for v, f in zip(values, feeds, strict=True)):
            node.inputs[1] = source
            return 1
    added = all(user.op == "Add" for user in g.consumers(node.outputs[0])) and not g.is_output(graph, node.outputs[0])
    fixed = not probe.read(graph, ids)  # by no input's values, whatever the runs show
    if fixed and added and all(np.ptp(v) == 0 for v in values) and values[0].flat[0] == values[1].flat[0]:
        row = Builder(graph, node.name).constant(table.values[int(values[0].flat[0])].copy(), "row")
        g.rewire(graph, node.outputs[0], row)
        return 1
    found = _positions(values, feeds, sources)
    if found is None or not sources or (found.ids is None and not (added and fixed)):
        notes.append(f"{node.name}: embedding not matched, its ids are neither an input nor positions")
        return 0
    like = found.ids if found.ids is not None else sources[0]
    node.inputs[1] = build_positions(Builder(graph, node.name), found, like)
    node.outputs[0].shape = None
    return 1


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _positions(
    values: Sequence[np.ndarray], feeds: Sequence[probe.Feeds], sources: Sequence[gs.Tensor]
) -> Positions | None:
    first = int(values[0].reshape(-1)[0])
    if all(_equal(v, np.broadcast_to(np.arange(v.shape[-1]) + first, v.shape)) for v in values):
        lengths = {f[sources[0].name].shape[1] for f in feeds} if sources else set()
        return Positions(first=first) if lengths == {v.shape[-1] for v in values} else None
    for source in sources:
        for pad in (1, 0):
            wanted = []
            for f in feeds:
                real = (f[source.name] != pad).astype(np.int64)
                wanted.append(np.cumsum(real, axis=1) * real + pad)
            if all(_equal(v, w) for v, w in zip(values, wanted, strict=True)):
                return Positions(ids=source, pad=pad)
    return None
