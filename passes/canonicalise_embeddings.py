"""CanonicaliseEmbeddings: look-ups by an input, by position, or of one constant row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.contract import DERIVATION, Context, Pass, Report
from nmcompile.derive import Derivation, Underived
from nmcompile.lookups import Ids, build_ids, columns, explained, read_ids
from nmcompile.symbolic import ONE, Element, Index, Poly, poly


@dataclass(frozen=True)
class CanonicaliseEmbeddings(Pass):
    """Read every embedding table by a graph input, by canonical positions, or once.

    Gather(table, <Slice, Expand, CumSum ... over the inputs>)  ->  Gather(table, Range(0, sequence))
    Gather(table, zeros)                                        ->  table[0]

    What the ids are is derived from the sub-graph that computes them; ids that are something else stay as they are.
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (DERIVATION,)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        candidates = [node for node in graph.nodes if _is_lookup(node) or _is_slice(node)]
        inputs = {t.name for t in graph.inputs}
        left = [n for n in candidates
                if n.op == "Slice" or not (n.inputs[1].name in inputs or _is_canonical(n.inputs[1]))]  # fmt: skip
        done = len(candidates) - len(left)
        if not left:
            return Report(detail={"matched": f"{done}/{done}"} if done else {})
        d = context.derive(graph)
        lookups = [node for node in left if node.op != "Slice" or _cuts(d, node)]
        notes: list[str] = []
        changed = 0
        for node in lookups:
            try:
                found = _table_rows(d, node) if node.op == "Slice" else read_ids(d, node.inputs[1])
                _canonicalise(graph, d, node, found)
                changed += 1
            except Underived as stop:
                notes.append(f"{node.name}: embedding not matched, {stop}")
        if changed:
            g.cleanup(graph)
        detail = {"matched": f"{done + changed}/{done + len(lookups)}"} if done + len(lookups) else {}
        return Report(changed=changed, detail=detail, notes=tuple(notes))


def _is_lookup(node: gs.Node) -> bool:
    if node.op != "Gather" or node.attrs.get("axis", 0) != 0 or not isinstance(node.inputs[0], gs.Constant):
        return False
    table, ids = node.inputs
    rank = len(ids.shape) if ids.shape is not None else 2
    return len(table.shape) == 2 and table.dtype == np.float32 and g.constant(ids) is None and rank in (1, 2)


def _is_slice(node: gs.Node) -> bool:
    return node.op == "Slice" and isinstance(node.inputs[0], gs.Constant)


def _cuts(d: Derivation, node: gs.Node) -> bool:
    """A table cut to the sequence's length, as some exporters read positions."""
    if not _is_slice(node):
        return False
    table, shape = node.inputs[0], d.shape(node.outputs[0])
    return (len(table.shape) == 2 and table.dtype == np.float32 and shape is not None
            and shape[0].integer is None and shape[1].integer == table.shape[1])  # fmt: skip


def _is_canonical(ids: gs.Tensor) -> bool:
    """What build_ids makes: a Range, or RoBERTa's Add(Mul(CumSum(real), real), pad)."""
    node = g.producer(ids)
    product = g.producer(node.inputs[0]) if node is not None and node.op == "Add" else None
    count = g.producer(product.inputs[0]) if product is not None and product.op == "Mul" else None
    return node is not None and (node.op == "Range" or (count is not None and count.op == "CumSum"))


def _table_rows(d: Derivation, node: gs.Node) -> Ids:
    """Which rows of its table a Slice gives, in order."""
    table, (rows, width) = node.inputs[0], d.value(node.outputs[0]).shape
    place = poly(Index("t", rows)), poly(Index("f", width))
    atom = next(iter(d.element(node.outputs[0], place).atoms), None)
    if not isinstance(atom, Element) or atom.tensor != table.name or atom.index[1] != place[1]:
        raise Underived("it does not give rows of its table in order")
    return explained(d, atom.index[0], place[:1], (rows,))


def _canonicalise(graph: gs.Graph, d: Derivation, node: gs.Node, found: Ids) -> None:
    """Underived where it may not be: what follows must add a row, or rows by position, by broadcasting."""
    table, y = node.inputs[0], node.outputs[0]
    if found.kind == "input":
        node.inputs[1] = found.source
        return
    if found.kind == "row":
        if not _is_added(graph, d, y, None) or not 0 <= found.first < table.shape[0]:
            raise Underived(f"it always gives row {found.first}, and is not added to other embeddings")
        row = g.Slice(0, found.first, found.first + 1), g.Reshape(tuple(table.shape[1:]))
        g.rewire(graph, y, Builder(graph, node.name).derived(table, "row", *row))
        return
    if found.kind == "position" and not _is_added(graph, d, y, found.length):
        raise Underived("it gives rows by position, and is not added to other embeddings")
    b = Builder(graph, node.name)
    ids = build_ids(b, found, d.inputs)
    if node.op == "Slice":
        g.rewire(graph, y, b("Gather", table, ids, axis=0, shape=[None, table.shape[1]]))
        return
    node.inputs[1] = ids
    y.shape = None


def _is_added(graph: gs.Graph, d: Derivation, y: gs.Tensor, length: Poly | None) -> bool:
    """Whether every reader adds it to a tensor of at least its rank, with as many columns as it has rows."""
    users, shape = g.consumers(y), d.value(y).shape
    if not users or g.is_output(graph, y):
        return False
    for user in users:
        if user.op != "Add":
            return False
        other = d.shape(next((x for x in user.inputs if x is not y), y))
        if other is None or len(other) < len(shape) or len(other) < 2 or other[-1] != shape[-1]:
            return False
        lead = (ONE,) * (len(other) - len(shape)) + shape[:-1]  # what it gives must come from the other operand
        if any(columns(own) not in (ONE, size) for own, size in zip(lead, other[:-1], strict=True)):
            return False
        if length is not None and other[-2] != length:
            return False
    return True
