"""Shapes of a graph, derived once per revision: what passes that require SHAPES are told."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import probe
from nmcompile.derive import Derivation, checksum

State = tuple[Hashable, ...]
Known = dict[int, tuple[gs.Tensor, Hashable]]  # by id


class Shapes:
    """Infers and derives, and does neither again as long as nothing changes that its result depends on.

    That is everything but the elements of large constants, which only count where a derivation has read them: passes
    that set weights do not cost a derivation, those that write into a table of positions do.
    """

    def __init__(self) -> None:
        self._inferred = self._written = self._read = Revision()
        self._found: Derivation | None = None

    def infer(self, graph: gs.Graph) -> None:
        """Shapes and types by onnx's inference, written on the graph's tensors."""
        if not self._inferred.is_of(graph):
            g.infer_shapes(graph)
            self._inferred = revision(graph)

    def derive(self, graph: gs.Graph) -> Derivation:
        """The derivation of a sorted graph whose shapes are inferred before; those that it finds are written on the
        tensors."""
        if self._found is not None and self._written.is_of(graph) and not _rewritten(self._found):
            return self._found
        self.infer(graph)
        found = self.read(graph)
        probe.write(graph, found)
        self._written = revision(graph)
        return found

    def read(self, graph: gs.Graph) -> Derivation:
        """The derivation of a sorted graph as it stands."""
        known = self._found is not None and (self._read.is_of(graph) or self._written.is_of(graph))
        if self._found is None or not known or _rewritten(self._found):
            self._found = Derivation(graph)
            self._read = revision(graph, _numbers)
            self._written = Revision()
        return self._found


@dataclass(frozen=True)
class Revision:
    """A graph at one time. It holds the tensors that it knows by their id, so that no other gets the id of one."""

    state: State = ()
    shape: Callable[[gs.Variable], Hashable] | None = None
    held: Known = field(default_factory=dict)

    def is_of(self, graph: gs.Graph) -> bool:
        return self.shape is not None and _state(graph, {}, self.shape) == self.state


def _whole(tensor: gs.Variable) -> Hashable:
    return None if tensor.shape is None else tuple(tensor.shape)


def _numbers(tensor: gs.Variable) -> Hashable:
    """The shape as a derivation reads it: one of numbers alone. Names are read of the graph's inputs only, for which
    `_state` tells them."""
    shape = tensor.shape
    return None if shape is None or not all(isinstance(dim, (int, np.integer)) for dim in shape) else tuple(shape)


def revision(graph: gs.Graph, shape: Callable[[gs.Variable], Hashable] = _whole) -> Revision:
    """The graph as it is now; of shapes as much as counts."""
    held: Known = {}
    return Revision(_state(graph, held, shape), shape, held)


def _rewritten(found: Derivation) -> bool:
    """Whether a constant that a derivation has read holds something else by now."""
    return any(checksum(np.asarray(tensor.values)) != held for tensor, held in found.read.values())


def _state(graph: gs.Graph, known: Known, shape: Callable[[gs.Variable], Hashable]) -> State:
    """Everything that shapes are derived from, as a value: operators, attributes, names, types, shapes, small
    constants; and which tensors the inputs and the large constants are, as a derivation refers to them."""

    def told(tensors: Sequence[gs.Tensor]) -> tuple[Hashable, ...]:
        for tensor in tensors:
            if id(tensor) not in known:
                known[id(tensor)] = tensor, _tensor(tensor, shape)
        return tuple(known[id(tensor)][1] for tensor in tensors)

    nodes = tuple((node.op, node.domain, node.name, told(node.inputs), told(node.outputs),
                   tuple((name, _attribute(value, known, shape)) for name, value in node.attrs.items()))
                  for node in graph.nodes)  # fmt: skip
    inputs = tuple((id(tensor), _whole(tensor)) for tensor in graph.inputs)
    return graph.opset, inputs, told(graph.inputs), told(graph.outputs), nodes


def _tensor(tensor: gs.Tensor, shape: Callable[[gs.Variable], Hashable]) -> Hashable:
    if not isinstance(tensor, gs.Constant):
        dtype = (tensor.dtype.num,) if isinstance(tensor.dtype, np.dtype) else tensor.dtype
        return tensor.name, shape(tensor), dtype, getattr(tensor, "type", None)
    values = np.asarray(tensor.values)
    # onnx's inference sees the elements of no larger one (nmcompile.ir.weightless)
    seen = values.tobytes() if values.nbytes < g.LARGE and not values.dtype.hasobject else id(tensor)
    return tensor.name, values.shape, values.dtype.num, seen


def _attribute(value: Any, known: Known, shape: Callable[[gs.Variable], Hashable]) -> Hashable:
    found: Hashable = value
    if isinstance(value, gs.Graph):
        found = _state(value, known, shape)
    elif isinstance(value, onnx.AttributeProto):
        found = value.SerializeToString()
    elif isinstance(value, (gs.Tensor, np.ndarray)):
        array = np.asarray(getattr(value, "values", value))
        found = array.shape, array.dtype.num, checksum(array)
    elif isinstance(value, (list, tuple)):
        found = tuple(value)
    return found
