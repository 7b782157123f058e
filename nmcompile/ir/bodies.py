"""The graphs inside a graph: bodies of If, Loop and Scan. Few graphs have any, so asking is quick where there are
none (GraphSurgeon's own walk costs more than what is done with its result)."""

from __future__ import annotations

import onnx_graphsurgeon as gs

Graph = gs.Graph


def bodies(node: gs.Node) -> list[gs.Graph]:
    """The graphs that are attributes of a node."""
    return [value for value in node.attrs.values() if isinstance(value, Graph)] if node.attrs else []


def inner_graphs(graph: gs.Graph) -> list[gs.Graph]:
    """All graphs inside, at any depth, each before those in it."""
    own = [value for node in graph.nodes for value in node.attrs.values() if isinstance(value, Graph)]
    return [inner for body in own for inner in (body, *inner_graphs(body))] if own else own
