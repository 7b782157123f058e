"""Shapes of a graph as they are derived, and runs of its parts at odd sizes as a second opinion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.derive import Derivation
from nmcompile.ir.budget import check_dims
from nmcompile.roles import kind_of
from nmcompile.tensorinfo import TensorInfo

Feeds = dict[str, np.ndarray]
# Sizes given to free dimensions, one column per dimension name: coprime, small and unlike any usual constant.
SIZES = ((2, 5, 7, 9, 11), (3, 7, 5, 11, 13))


def free_sizes(infos: Sequence[TensorInfo], draw: int) -> dict[str, int]:
    """A size for every free dimension name of the inputs; names differ in size, so that they can be told apart."""
    names = list(dict.fromkeys(dim for info in infos for dim in info.shape if isinstance(dim, str)))
    row = SIZES[draw % len(SIZES)]
    return {name: row[i] if i < len(row) else 2 * i + 5 + 2 * draw for i, name in enumerate(names)}


def annotate(graph: gs.Graph) -> Derivation:
    """Set the shape of every tensor of a sorted graph to what is derived; the derivation, for more questions.

    A dimension that is a free one of the inputs has its name, a constant its number, any other None.
    """
    g.infer_shapes(graph)
    d = Derivation(graph)
    write(graph, d)
    return d


def write(graph: gs.Graph, d: Derivation) -> None:
    """Set the shape of every tensor to what is derived."""
    for node in graph.nodes:
        for y in node.outputs:
            if y.name and isinstance(y, gs.Variable):
                dims = d.dims(y)
                check_dims(y.name, (dim for dim in dims or () if isinstance(dim, int) and dim > 0), "tensor")
                y.shape = dims if dims is not None else _numbers(y.shape)


def _numbers(shape: Sequence[int | str | None] | None) -> list[int | None] | None:
    """What inference found, less the names that it gives to sizes it does not know."""
    return None if shape is None else [dim if isinstance(dim, int) else None for dim in shape]


def concrete(shape: Sequence[int | str | None] | None, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape with its free dimensions replaced by their sizes; None when one is not known."""
    if shape is None:
        return None
    dims = [sizes.get(dim) if isinstance(dim, str) else dim for dim in shape]
    return None if any(dim is None for dim in dims) else tuple(int(dim) for dim in dims if dim is not None)


def binary_feeds(graph: gs.Graph, draw: int) -> Feeds:
    """Seeded values for the graph's inputs in which integer and boolean [batch, tokens] inputs hold 0 and 1.

    That is in range for token ids and tells apart masks wherever they come from; column 0 is 1, so no row is empty.
    """
    infos = g.inputs(graph)
    feeds = g.random_feeds(infos, seed=draw, dims=free_sizes(infos, draw))
    rng = np.random.default_rng(977 + draw)
    for info in infos:
        if len(info.shape) == 2 and (info.dtype.kind in "iub" or kind_of(info) == "mask"):
            values = rng.integers(0, 2, feeds[info.name].shape)
            values[:, 0] = 1
            feeds[info.name] = values.astype(info.dtype)
    return feeds


def evaluate(
    graph: gs.Graph, outputs: Sequence[str], feeds: Mapping[str, np.ndarray], cut: Sequence[str] = ()
) -> Feeds:
    """Values of `outputs`, computed from the graph's inputs and the tensors at which it is `cut`."""
    inputs = [*cut, *(info.name for info in g.inputs(graph) if info.name not in cut)] if cut else None
    part = g.extract(graph, outputs, inputs)
    needed = {info.name for info in g.inputs(part)}
    return g.run(part, {name: value for name, value in feeds.items() if name in needed}, outputs)
