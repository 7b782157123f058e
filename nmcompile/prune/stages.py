"""The stages of a graph: the tensors that linear layers read, in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import ir as g


@dataclass(frozen=True)
class Stage:
    """The layers that read `tensor`, and the residual that is added to what a layer gives, by the layer's name.

    normalised: a LayerNormalization with a constant gain and bias makes the tensor; then there may be no layers.
    """

    tensor: str
    layers: tuple[g.Linear, ...]
    residuals: Mapping[str, str]
    normalised: bool = False


def stages(graph: gs.Graph, layers: Sequence[g.Linear], norms: bool = False) -> list[Stage]:
    """The stages of some of the graph's layers, in the order of the nodes. norms: normalisations after the first of
    them are stages too, without layers where none reads them (the last one of an encoder)."""
    readers: dict[str, list[g.Linear]] = {}
    for layer in layers:
        readers.setdefault(layer.x.name, []).append(layer)
    found: list[Stage] = []
    first = {id(group[0].node): name for name, group in readers.items()}
    for node in graph.nodes:
        if id(node) in first:
            name = first[id(node)]
            residuals = {layer.name: residual for layer in readers[name]
                         if (residual := residual_of(graph, layer)) is not None}  # fmt: skip
            found.append(Stage(name, tuple(readers[name]), residuals, norm_before(readers[name][0].x) is not None))
        elif norms and found and node.outputs and norm_before(node.outputs[0]) and node.outputs[0].name not in readers:
            found.append(Stage(node.outputs[0].name, (), {}, True))
    return found


def norm_before(tensor: gs.Tensor) -> gs.Node | None:
    """The LayerNormalization with a constant gain and bias that makes a tensor, if one does."""
    node = g.producer(tensor)
    if node is None or node.op != "LayerNormalization" or len(node.inputs) < 3:
        return None
    values = [g.constant(operand) for operand in node.inputs[1:3]]
    return None if any(value is None or value.ndim != 1 for value in values) else node


def residual_of(graph: gs.Graph, layer: g.Linear) -> str | None:
    """The tensor that is added to the layer's output, when nothing else reads that."""
    users = g.consumers(layer.y)
    if len(users) != 1 or users[0].op != "Add" or g.is_output(graph, layer.y):
        return None
    others = [t for t in users[0].inputs if t is not layer.y]
    if len(others) != 1 or g.constant(others[0]) is not None:
        return None
    shapes = [t.shape for t in (others[0], layer.y)]  # one that is broadcast over the batch holds no rows of its own
    alike = None not in shapes and len(shapes[0]) == len(shapes[1]) and all(
        a == b or None in (a, b) for a, b in zip(*shapes, strict=True))  # fmt: skip
    return others[0].name if alike else None
