"""SimplifyShapes: replace arithmetic on shapes by constants, and read free sizes from the graph's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import DERIVATION, Context, Pass, Report


@dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Give every Reshape a constant shape and let no size be read from the middle of the graph.

    Reshape(x, Concat(Gather(Shape(x), 0), ...))  ->  Reshape(x, [0, 0, 12, 64])
    Gather(Shape(hidden), 1)                      ->  Gather(Shape(input_ids), 1)
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (DERIVATION,)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        context.derive(graph)
        training = [node.name for node in graph.nodes if _trains(node)]
        changed = sum(_drop(graph, node) for node in list(graph.nodes))
        changed += sum(_reshape(graph, node) for node in graph.nodes if node.op == "Reshape")
        sizes = _input_sizes(graph)
        changed += sum(_size(graph, node, sizes) for node in list(graph.nodes) if node.op == "Shape")
        if changed:
            g.cleanup(graph)
        notes: list[str] = []
        if training:
            notes.append(f"{training[0]} and {len(training) - 1} more drop values at random: the model was exported in "
                         "training mode; they are taken as identity, export after model.eval()")  # fmt: skip
        return Report(changed=changed, notes=tuple(notes))


def _trains(node: gs.Node) -> bool:
    value = g.constant(node.inputs[2]) if node.op == "Dropout" and len(node.inputs) > 2 else None
    return value is not None and bool(value.any())


def _drop(graph: gs.Graph, node: gs.Node) -> int:
    """Remove a node that hands its input on unchanged."""
    if not node.inputs or not node.outputs:
        return 0
    x, y = node.inputs[0], node.outputs[0]
    perm = node.attrs.get("perm")
    same = (
        node.op in ("Identity", "Dropout")
        or (node.op == "Cast" and x.dtype is not None and x.dtype == y.dtype)
        or (node.op == "Transpose" and perm is not None and list(perm) == sorted(perm))
        or (node.op in ("Expand", "Reshape") and _same_shape(x, y))
    )
    if not same or any(g.consumers(extra) or g.is_output(graph, extra) for extra in node.outputs[1:]):
        return 0
    if g.is_output(graph, y) and (isinstance(x, gs.Constant) or not g.producer(x) or g.is_output(graph, x)):
        return 0  # a graph output must keep its name and a producer of its own
    g.rewire(graph, y, x)
    return 1


def _same_shape(x: gs.Tensor, y: gs.Tensor) -> bool:
    if x.shape is None or y.shape is None or None in x.shape:
        return False
    return list(x.shape) == list(y.shape)


def _reshape(graph: gs.Graph, node: gs.Node) -> int:
    x, y = node.inputs[0], node.outputs[0]
    if node.attrs.get("allowzero", 0) or y.shape is None:
        return 0
    given = list(x.shape) if x.shape is not None else []
    target: list[int] = []
    for axis, dim in enumerate(y.shape):
        if axis < len(given) and isinstance(dim, str) and given[axis] == dim:
            target.append(0)
        else:
            target.append(int(dim) if isinstance(dim, (int, np.integer)) else -1)
    value = g.constant(node.inputs[1])
    if value is not None and value.dtype.kind not in "iu":
        return 0
    old = None if value is None else [int(v) for v in value.reshape(-1)]
    if target.count(-1) > 1 or 0 in y.shape or (old is not None and _meant(old, given) == _meant(target, given)):
        return 0
    if value is not None and -1 in target and 0 not in target:
        return 0
    node.inputs[1] = gs.Constant(g.fresh(graph, f"{node.name}/shape"), np.array(target, np.int64))
    return 1


def _meant(target: Sequence[int], given: Sequence[int | str | None]) -> list[int | str | None]:
    """The shape a Reshape's target stands for: 0 copies the dimension of its input."""
    return [given[axis] if dim == 0 and axis < len(given) else dim for axis, dim in enumerate(target)]


def _input_sizes(graph: gs.Graph) -> dict[str, tuple[gs.Tensor, int]]:
    """Name of a free size -> the graph input and axis that carry it."""
    sizes: dict[str, tuple[gs.Tensor, int]] = {}
    for tensor in graph.inputs:
        for axis, dim in enumerate(tensor.shape or []):
            if isinstance(dim, str) and dim:
                sizes.setdefault(dim, (tensor, axis))
    return sizes


def _size(graph: gs.Graph, node: gs.Node, sizes: dict[str, tuple[gs.Tensor, int]]) -> int:
    """Shape of an inner tensor: a constant where it is known, else the same sizes read from graph inputs."""
    x, y = node.inputs[0], node.outputs[0]
    if x.shape is None or g.is_output(graph, y):
        return 0
    dims = list(x.shape)
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(dims))
    dims = dims[slice(start, end)]
    if all(isinstance(dim, (int, np.integer)) for dim in dims):
        y.inputs.clear()
        y.to_constant(np.array(dims, np.int64))
        return 1
    if isinstance(x, gs.Constant) or not g.producer(x):
        return 0  # already an input
    changed = 0
    for user in g.consumers(y):
        index = g.constant(user.inputs[1]) if user.op == "Gather" and user.inputs[0] is y else None
        if index is None or index.size != 1:
            continue
        dim = dims[int(index.item())] if -len(dims) <= int(index.item()) < len(dims) else None
        if isinstance(dim, str) and dim in sizes:
            source, axis = sizes[dim]
            shape = gs.Variable(g.fresh(graph, f"{source.name}/shape"), np.dtype(np.int64), [len(source.shape)])
            graph.nodes.append(gs.Node("Shape", g.fresh(graph, f"{user.name}/shape"), inputs=[source], outputs=[shape]))
            where = gs.Constant(g.fresh(graph, f"{user.name}/axis"), np.full(index.shape, axis, np.int64))
            user.inputs = [shape, where]
            changed += 1
        elif isinstance(dim, (int, np.integer)) and not g.is_output(graph, user.outputs[0]):
            value = np.full(index.shape, int(dim), np.int64)
            result = user.outputs[0]
            result.inputs.clear()
            result.to_constant(value)
            changed += 1
    return changed
