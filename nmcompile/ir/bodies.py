"""The graphs inside a graph: bodies of If, Loop and Scan. Few graphs have any, so asking is quick where there are
none (GraphSurgeon's own walk costs more than what is done with its result)."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs


def bodies(node: gs.Node) -> list[gs.Graph]:
    """The graphs that are attributes of a node."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)] if node.attrs else []


def inner_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """All graphs inside, at any depth."""
    for node in graph.nodes:
        for body in bodies(node):
            yield body
            yield from inner_graphs(body)
