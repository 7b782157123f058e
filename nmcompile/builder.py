"""Builder: appends nodes to a graph under fresh names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g


class Builder:
    """Appends nodes to a graph; each call returns the node's output tensor."""

    def __init__(self, graph: gs.Graph, stem: str) -> None:
        self.graph = graph
        self.stem = stem
        self._given: set[str] = set()  # names of constants that no node reads yet

    def fresh(self, stem: str) -> str:
        """A name that neither the graph nor a constant of this builder has."""
        name = g.fresh(self.graph, f"{self.stem}/{stem}", self._given)
        self._given.add(name)
        return name

    def constant(self, values: np.ndarray, stem: str = "const") -> gs.Constant:
        return gs.Constant(self.fresh(stem), np.asarray(values))

    def derived(self, tensor: gs.Tensor, stem: str, *operations: g.Operation) -> gs.Constant:
        """A constant made of another, whose source it keeps."""
        return g.derived(tensor, self.fresh(stem), *operations)

    def ints(self, *values: int) -> gs.Constant:
        return self.constant(np.array(values, np.int64), "ints")

    def scalar(self, value: float | int, dtype: type | np.dtype = np.float32) -> gs.Constant:
        return self.constant(np.array(value, dtype), "scalar")

    def __call__(
        self,
        op: str,
        *inputs: gs.Tensor,
        dtype: type | np.dtype | None = np.float32,
        shape: Sequence[int | str | None] | None = None,
        domain: str | None = None,
        **attrs: object,
    ) -> gs.Variable:
        name = self.fresh(op)
        kind = None if dtype is None else np.dtype(dtype)
        y = gs.Variable(f"{name}_out", dtype=kind, shape=None if shape is None else list(shape))
        self.graph.nodes.append(gs.Node(op, name, dict(attrs), list(inputs), [y], domain=domain))
        return y


def sequence_length(b: Builder, like: gs.Tensor, axis: int = 1) -> gs.Tensor:
    """Size of an axis of `like`, a scalar."""
    shape = b("Shape", like, dtype=np.int64)
    return b("Gather", shape, b.scalar(axis, np.int64), dtype=np.int64, axis=0)
