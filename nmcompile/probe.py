"""Learn what a part of a graph means by running it: shapes, index maps, masks.

Exporters spell the same thing in a hundred ways; what it computes is one. A few runs at odd sizes tell
`[batch, sequence, 4, 16]` where symbolic inference gives up, and whether a forest of Expand, GatherND and Where is a
padding mask.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile.errors import BudgetError, NmcompileError
from nmcompile.tensorinfo import TensorInfo

Feeds = dict[str, np.ndarray]
# Sizes given to free dimensions, one column per dimension name: coprime, small and unlike any usual constant.
SIZES = ((2, 5, 7, 9, 11), (3, 7, 5, 11, 13))


def free_sizes(infos: Sequence[TensorInfo], draw: int) -> dict[str, int]:
    """A size for every free dimension name of the inputs; names differ in size, so that they can be told apart."""
    names = list(dict.fromkeys(dim for info in infos for dim in info.shape if isinstance(dim, str)))
    row = SIZES[draw % len(SIZES)]
    return {name: row[i] if i < len(row) else 2 * i + 5 + 2 * draw for i, name in enumerate(names)}


def annotate(graph: gs.Graph) -> str | None:
    """Set the shape of every tensor from two runs at different sizes; None when that worked, else why it did not.

    A size that equals a free dimension of the inputs in both runs gets its name, one that never changes its value,
    any other becomes None.
    """
    g.infer_shapes(graph)
    infos = g.inputs(graph)
    if any(dim is None for info in infos for dim in info.shape):
        return "an input has dimensions without a name"
    names = [y.name for node in graph.nodes for y in node.outputs if y.name and not isinstance(y, gs.Constant)]
    try:
        run = g.runner(graph, names)
        sizes = [free_sizes(infos, draw) for draw in (0, 1)]
        shapes = [
            {n: np.shape(v) for n, v in run(g.random_feeds(infos, seed=i, dims=sizes[i])).items()} for i in (0, 1)
        ]
    except BudgetError:
        raise  # no other way of looking at the graph would take less
    except NmcompileError as error:
        return str(error)
    tensors = graph.tensors()
    for name in names:
        first, second = shapes[0].get(name), shapes[1].get(name)
        tensor = tensors.get(name)
        if first is None or second is None or len(first) != len(second) or not isinstance(tensor, gs.Variable):
            continue
        tensor.shape = [_dimension(a, b, sizes) for a, b in zip(first, second, strict=True)]
    return None


def _dimension(a: int, b: int, sizes: Sequence[Mapping[str, int]]) -> int | str | None:
    for name, size in sizes[0].items():
        if (a, b) == (size, sizes[1][name]):
            return name
    return int(a) if a == b else None


def concrete(shape: Sequence[int | str | None] | None, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape with its free dimensions replaced by their sizes; None when one is not known."""
    if shape is None:
        return None
    dims = [sizes.get(dim) if isinstance(dim, str) else dim for dim in shape]
    return None if any(dim is None for dim in dims) else tuple(int(dim) for dim in dims if dim is not None)


def binary_feeds(graph: gs.Graph, draw: int, largest: int = 1) -> Feeds:
    """Seeded values for the graph's inputs in which integer and boolean [batch, tokens] inputs hold 0 and 1.

    That is in range for token ids and tells apart masks wherever they come from; column 0 is 1, so no row is empty.
    `largest`: integers go up to it instead, which tells ids from what is computed from them.
    """
    infos = g.inputs(graph)
    feeds = g.random_feeds(infos, seed=draw, dims=free_sizes(infos, draw))
    rng = np.random.default_rng(977 + draw)
    for info in infos:
        if len(info.shape) == 2 and (info.dtype.kind in "iub" or "mask" in info.name):
            values = rng.integers(0, 2 if info.dtype.kind == "b" else largest + 1, feeds[info.name].shape)
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


def read(graph: gs.Graph, tensor: gs.Tensor, cut: Collection[str] = ()) -> set[str]:
    """Names of the graph inputs whose values, not just whose shapes, a tensor is computed from; not through `cut`.

    Runs on a few values cannot show that others would not change the result; this can.
    """
    seen = {tensor.name}
    todo = [tensor]
    while todo:
        node = g.producer(todo.pop())
        if node is None or node.op in ("Shape", "Size"):
            continue
        picks = node.op in ("Gather", "GatherElements", "GatherND") and _uniform(node.inputs[0])
        new = {t.name: t for t in node.inputs[: 1 if picks else None] if t.name not in seen and t.name not in cut}
        seen |= set(new)
        todo += new.values()
    return seen & {t.name for t in graph.inputs}


def _uniform(tensor: gs.Tensor) -> bool:
    """All elements are one and the same constant, so that it does not matter which are picked."""
    value = g.constant(tensor)
    if value is not None:
        return value.size > 0 and bool((value == value.flat[0]).all())
    node = g.producer(tensor)
    if node is None or node.op not in ("Expand", "Slice", "Cast", "Reshape", "Unsqueeze", "ConstantOfShape"):
        return False
    return node.op == "ConstantOfShape" or _uniform(node.inputs[0])
