"""Undo the flattening of tokens: [batch * tokens, features] becomes [batch, tokens, features] again where it may."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from nmcompile import ir as g

ELEMENTWISE = {"Relu", "Gelu", "Tanh", "Sigmoid", "Erf", "Neg", "Sqrt", "Identity", "HardSwish", "Elu", "LeakyRelu"}
BINARY = {"Add", "Sub", "Mul", "Div", "Pow"}
NORMS = {"LayerNormalization", "RMSNormalization"}


@dataclass
class Region:
    """Nodes between reshapes that flatten and reshapes that restore: each works along the last axis only."""

    lead: list[int | str]  # the sizes that were flattened
    entries: dict[int, gs.Node] = field(default_factory=dict)
    nodes: dict[int, gs.Node] = field(default_factory=dict)
    exits: list[gs.Node] = field(default_factory=list)


def unflatten(graph: gs.Graph) -> int:
    """Lift every such region to the shape it was flattened from; the number of products lifted.

    Reshape [b, s, k] -> [b*s, k], MatMul, Relu, MatMul, Reshape -> [b, s, n]   ->   MatMul, Relu, MatMul
    """
    lifted = 0
    gone: set[int] = set()
    for node in list(graph.nodes):
        if id(node) in gone or not _flattens(node):
            continue
        region = _region(graph, node)
        if region is None or not region.nodes:
            continue
        _lift(graph, region)
        gone |= set(region.entries)
        lifted += sum(inner.op == "MatMul" for inner in region.nodes.values())
    return lifted


def _flattens(node: gs.Node) -> bool:
    """[..., k] -> [*, k]"""
    if node.op != "Reshape":
        return False
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or len(before) < 3 or len(after) != 2 or None in before[:-1]:
        return False
    return isinstance(after[1], int) and before[-1] == after[1]


def _region(graph: gs.Graph, start: gs.Node) -> Region | None:
    """Everything that the flattened tokens reach before they are restored; None when something else is reached."""
    region = Region(list(start.inputs[0].shape[:-1]), {id(start): start})
    todo = [start.outputs[0]]
    inside = {start.outputs[0].name}
    awaited: set[str] = set()  # other operands, which must turn out to lie inside too
    while todo:
        tensor = todo.pop()
        if g.is_output(graph, tensor):
            return None
        for user in g.consumers(tensor):
            if id(user) in region.nodes:
                continue
            shape = user.outputs[0].shape
            if user.op == "Reshape" and user.inputs[0] is tensor:
                if shape is None or list(shape[: len(region.lead)]) != region.lead:
                    return None
                region.exits.append(user)
                continue
            if not _along_last_axis(user):
                return None
            region.nodes[id(user)] = user
            for other in user.inputs:
                maker = g.producer(other)
                if g.constant(other) is not None or other.is_empty() or other.name in inside:
                    continue
                if maker is not None and _flattens(maker) and list(maker.inputs[0].shape[:-1]) == region.lead:
                    region.entries[id(maker)] = maker
                    inside.add(other.name)
                    todo.append(other)
                else:
                    awaited.add(other.name)
            inside.add(user.outputs[0].name)
            todo.append(user.outputs[0])
    return region if awaited <= inside and region.exits else None


def _along_last_axis(node: gs.Node) -> bool:
    values = [g.constant(x) for x in node.inputs]
    if node.op in ELEMENTWISE:
        return True
    if node.op == "MatMul":
        return values[0] is None and values[1] is not None and values[1].ndim == 2
    if node.op in BINARY:
        return all(value is None or value.ndim <= 1 or value.size == 1 for value in values)
    if node.op in NORMS:
        unused = not any(g.consumers(y) for y in node.outputs[1:])
        return unused and node.attrs.get("axis", -1) in (-1, 1) and all(v is not None for v in values[1:])
    return False


def _lift(graph: gs.Graph, region: Region) -> None:
    for node in region.nodes.values():
        if node.op in NORMS:
            node.attrs["axis"] = -1
        last = node.outputs[0].shape[-1] if node.outputs[0].shape else None
        node.outputs[0].shape = None if last is None else [*region.lead, last]
    for entry in region.entries.values():
        g.rewire(graph, entry.outputs[0], entry.inputs[0])
    for node in region.exits:
        if list(node.outputs[0].shape) == list(node.inputs[0].shape or []):
            g.rewire(graph, node.outputs[0], node.inputs[0])
