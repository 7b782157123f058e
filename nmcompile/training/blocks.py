"""Where a graph can be cut: the tensors that alone carry all that the pruned layers have computed so far.

In a Transformer these are the residual stream behind each half of a layer, so a block is attention with its residual
and normalisation, or the feed-forward layers with theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.torch.steps import parameters, reached


@dataclass(frozen=True)
class Block:
    """From `start` ("" for the first, which starts at the inputs) to `end`; layers: names of those that are trained."""

    start: str
    end: str
    layers: tuple[str, ...]


def blocks(graph: gs.Graph, layers: Collection[str]) -> tuple[Block, ...]:
    """The blocks of a sorted graph, in order, with the linear layers named; what comes without a layer belongs to the
    block before it. Empty where the graph cannot be cut behind any layer."""
    found = [layer for layer in g.linear_layers(graph) if layer.name in layers]
    nodes = {id(layer.node): layer.name for layer in found}
    given = [tensor.name for layer in found for tensor in layer.node.outputs]
    after = reached(graph, [*_streams(graph, found), *given])
    last = _last_uses(graph.nodes)
    live: set[str] = set()
    cuts: list[Block] = []
    start, inside = "", list[str]()
    for index, node in enumerate(graph.nodes):
        if id(node) in nodes:
            inside.append(nodes[id(node)])
        if id(node) in after:
            live |= {tensor.name for tensor in node.outputs if last.get(tensor.name, -1) > index}
        live = {name for name in live if last[name] > index}
        if len(live) != 1 or id(node) not in after:
            continue
        (end,) = live
        if cuts and not inside and not _alike(node.outputs[0], found[0].x):
            continue  # a pooler's vector tells nothing of the other tokens
        if inside:
            cuts.append(Block(start, end, tuple(inside)))
            start, inside = end, []
        elif cuts and not inside:
            cuts[-1] = Block(cuts[-1].start, end, cuts[-1].layers)
            start = end
    return tuple(cuts)


def _streams(graph: gs.Graph, layers: Sequence[g.Linear]) -> list[str]:
    """Tensors of the form of what the first layer reads, [..., features]: embeddings, which are a residual as well.
    What all layers share beside them (a table of position biases) has another form."""
    shape = layers[0].x.shape if layers else None
    if shape is None or not isinstance(shape[-1], int):
        return []
    inner = reached(graph, parameters(graph))
    return [tensor.name for node in graph.nodes if id(node) in inner for tensor in node.outputs
            if tensor.shape and len(tensor.shape) == len(shape) and tensor.shape[-1] == shape[-1]]  # fmt: skip


def _alike(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Of the same rank and number of features, as far as known."""
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and a.shape[-1] == b.shape[-1]


def _last_uses(nodes: Sequence[gs.Node]) -> dict[str, int]:
    """By tensor, the place of the last node that reads it."""
    return {tensor.name: index for index, node in enumerate(nodes) for tensor in node.inputs}
