"""Names that are free: what a graph's tensors and nodes are called, kept from one question to the next."""

from __future__ import annotations

from collections.abc import Container

import onnx_graphsurgeon as gs

from nmcompile.ir.bodies import bodies

INDEX = "names"  # attribute of a graph


def names(graph: gs.Graph) -> set[str]:
    """Names of all tensors and nodes, in subgraphs too."""
    found = {t.name for t in [*graph.inputs, *graph.outputs]}
    for node in graph.nodes:
        found.add(node.name)
        for tensor in node.inputs:
            found.add(tensor.name)
        for tensor in node.outputs:
            found.add(tensor.name)
        for body in bodies(node):
            found |= names(body)
    return found


def fresh(graph: gs.Graph, stem: str, besides: Container[str] = ()) -> str:
    """`stem`, or `stem_1`, `stem_2`, ...: the first that no tensor or node of the graph is called, and that is not
    among `besides`."""
    index = Index.of(graph)
    name = unused(_Either(index, besides), stem)
    index.give(name)
    return name


def unused(taken: Container[str], stem: str) -> str:
    """`stem`, or the first `stem_N` that is not taken."""
    stem = stem or "unnamed"
    if stem not in taken:
        return stem
    count = 1
    while f"{stem}_{count}" in taken:
        count += 1
    return f"{stem}_{count}"


class _Either(Container[str]):
    def __init__(self, first: Container[str], second: Container[str]) -> None:
        self.first, self.second = first, second

    def __contains__(self, name: object) -> bool:
        return name in self.second or name in self.first


class Index(Container[str]):
    """Who has which name in a graph. Nodes that were appended since the last question are looked at, all others are
    taken to be called what they were; that a name is taken is only said after a look at who has it, and where that
    tells nothing, at the whole graph. A graph with bodies, whose names nobody keeps up with, is looked at every time.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._holders: dict[str, gs.Node | gs.Tensor | None] = {}  # None: given away, and nobody seen with it yet
        self._count, self._edges = 0, (0, 0)
        self._last: gs.Node | None = None
        self._look()

    @classmethod
    def of(cls, graph: gs.Graph) -> Index:
        """The graph's own, up to date."""
        index: Index | None = graph.__dict__.get(INDEX)
        if index is None:
            index = graph.__dict__[INDEX] = cls(graph)
        elif not index._continues():
            index._look()
        else:
            index._add(index._count)
        return index

    def give(self, name: str) -> None:
        """Somebody will be called so."""
        self._holders.setdefault(name, None)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or name not in self._holders:
            return False
        if _has(self._holders[name], name):
            return True
        self._look()
        return name in self._holders

    def _continues(self) -> bool:
        """Whether the nodes are those of the last look, and perhaps more behind them."""
        nodes, edges = self._graph.nodes, (len(self._graph.inputs), len(self._graph.outputs))
        if self._last is None or edges != self._edges or len(nodes) < self._count:
            return False
        return nodes[self._count - 1] is self._last

    def _look(self) -> None:
        self._holders = {t.name: t for t in [*self._graph.inputs, *self._graph.outputs]}
        self._edges = len(self._graph.inputs), len(self._graph.outputs)
        self._add(0)

    def _add(self, start: int) -> None:
        nodes, holders = self._graph.nodes, self._holders
        self._count, self._last = len(nodes), nodes[-1] if nodes else None
        for node in nodes[start:] if start else nodes:
            holders[node.name] = node
            for tensor in node.inputs:
                holders[tensor.name] = tensor
            for tensor in node.outputs:
                holders[tensor.name] = tensor
            for body in bodies(node):
                holders.update(dict.fromkeys(names(body)))
                self._last = None


def _has(holder: gs.Node | gs.Tensor | None, name: str) -> bool:
    """Whether it is still called so, and still part of the graph."""
    return holder is not None and holder.name == name and bool(holder.inputs or holder.outputs)
