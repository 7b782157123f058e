"""Embeddings: sums of look-ups whose ids are inputs of the graph or follow from their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.cpu.ops import Embed, Lookup
from nmcompile.backends.cpu.streams import Space, Stream
from nmcompile.derive import Derivation, Underived
from nmcompile.lookups import read_ids
from nmcompile.symbolic import Poly


@dataclass(frozen=True)
class Term:
    """One look-up of a sum, the nodes it stands for, and the sizes of its ids unless they are one row."""

    lookup: Lookup
    nodes: tuple[gs.Node, ...]
    sizes: tuple[Poly, ...] | None


def match_embedding(graph: gs.Graph, d: Derivation, node: gs.Node) -> Embed | None:
    """A sum of look-ups, matched at its last Add (or at a lone Gather)."""
    y = node.outputs[0]
    if any(user.op == "Add" and _terms(graph, d, user.outputs[0]) is not None for user in g.consumers(y)):
        return None  # a larger sum holds this one
    terms = _terms(graph, d, y)
    shape = d.shape(y)
    if not terms or shape is None or len(shape) != 3:
        return None
    source = next((term.lookup.source for term in terms if term.lookup.source is not None), None)
    if source is None:
        return None
    lead = shape[:2]
    if any(term.sizes is not None and term.sizes != lead[-len(term.sizes) :] for term in terms):
        return None  # by an input of other tokens than the rest
    ids = d.inputs[source]
    if ids.shape is None or None in ids.shape:
        return None
    nodes = {id(item): item for term in terms for item in term.nodes}
    lookups = tuple(term.lookup for term in terms)
    space = Space(Stream(ids.shape[0], ids.shape[1]))
    return Embed(reads=(), y=y.name, rows=int(lookups[0].table.shape[-1]), space=space, nodes=tuple(nodes.values()),
                 name=node.name, lookups=lookups)  # fmt: skip


def _terms(graph: gs.Graph, d: Derivation, tensor: gs.Tensor) -> list[Term] | None:
    """The terms of a sum of look-ups; None when one of them is something else."""
    value = g.constant(tensor)
    if value is not None:
        row = value.ndim == 1 and value.dtype == np.float32
        return [Term(Lookup("row", value.reshape(1, -1)), (), None)] if row else None
    node = g.producer(tensor)
    if node is None:
        return None
    if node.op == "Add":
        if len(g.consumers(tensor)) == 0 and not g.is_output(graph, tensor):
            return None
        left, right = _terms(graph, d, node.inputs[0]), _terms(graph, d, node.inputs[1])
        if left is None or right is None:
            return None
        return [Term(term.lookup, (*term.nodes, node), term.sizes) for term in (*left, *right)]
    table = g.constant(node.inputs[0]) if node.op == "Gather" and node.attrs.get("axis", 0) == 0 else None
    if table is None or table.ndim != 2 or table.dtype != np.float32:
        return None
    try:
        ids = read_ids(d, node.inputs[1])
    except Underived:
        return None
    shape = d.value(node.inputs[1]).shape
    if ids.kind == "position":
        return [Term(Lookup("position", table, first=ids.first), (node,), (ids.length,))]
    if ids.source is None or len(shape) != 2:
        return None
    return [Term(Lookup(ids.kind, table, ids.source.name, ids.first), (node,), shape)]
