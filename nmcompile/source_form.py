"""What was changed of a canonical graph, put back into the initializers of the model that it was made of.

    model.onnx -> canonicalise -> prune, train -> in_source_form -> model.onnx, other weights

The nodes, names and opset of the file stay, so it runs wherever the model did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.errors import GraphError

EXACT = 1e-6  # relative: what multiplying by a factor and dividing by it may move a number


def in_source_form(source: gs.Graph, graph: gs.Graph, canonical: Callable[[gs.Graph], gs.Graph]) -> gs.Graph:
    """A copy of the source that holds the weights of `graph`, which was made of it by `canonical` and changed since.

    Each constant that was changed goes where its Source says that it came from. The proof is `canonical` again: it must
    make `graph` of the result, up to the rounding of the source's own types. GraphError names the first constant for
    which it does not: one that was computed of several, whose initializer something else reads as well, or whose
    features were put into another order, where the zeros would not lie in their pattern.
    """
    made = g.copy(source)
    held = {tensor.name: tensor for tensor in made.tensors().values() if isinstance(tensor, gs.Constant)}  # fmt: skip
    for tensor in _changed(graph):
        known = g.source(tensor)
        assert known is not None
        if known.computed or known.initializers[0] not in held:
            raise GraphError(f"'{tensor.name}' is computed from {', '.join(known.initializers)}, which cannot take it "
                             "back")  # fmt: skip
        stored = held[known.initializers[0]]
        stored.values = known.put(np.asarray(stored.values), np.asarray(tensor.values))
    found = canonical(made)
    for given, wanted in _pairs(found, graph):
        known = g.source(wanted)
        stored = None if known is None else held.get(known.initializers[0])
        if not _same(np.asarray(given.values), np.asarray(wanted.values), None if stored is None else stored.dtype):
            names = wanted.name if known is None else ", ".join(known.initializers)
            raise GraphError(f"'{wanted.name}' cannot be put back: something else reads {names} as well, or its "
                             "features stand in another order")  # fmt: skip
    return made


def _changed(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Each once."""
    for tensor in graph.tensors().values():
        known = g.source(tensor) if isinstance(tensor, gs.Constant) else None
        if known is not None and known.changed:
            yield tensor


def _pairs(a: gs.Graph, b: gs.Graph) -> Iterator[tuple[gs.Constant, gs.Constant]]:
    """The constants in the same places of two graphs. GraphError where these are not the same but for them."""
    if len(a.nodes) != len(b.nodes):
        raise GraphError(f"the graph has {len(b.nodes)} nodes, with its weights in the source it has {len(a.nodes)}")
    for mine, other in zip(a.nodes, b.nodes, strict=True):
        if (mine.op, mine.name, len(mine.inputs)) != (other.op, other.name, len(other.inputs)):
            raise GraphError(f"node '{other.name}' ({other.op}) has no place in the source")
        for given, wanted in zip(mine.inputs, other.inputs, strict=True):
            constants = isinstance(given, gs.Constant), isinstance(wanted, gs.Constant)
            if all(constants):
                yield given, wanted
            elif any(constants) or given.name != wanted.name:
                raise GraphError(f"node '{other.name}' reads '{wanted.name}', which has no place in the source")
    for given, wanted in zip(a.outputs, b.outputs, strict=True):
        if isinstance(given, gs.Constant) and isinstance(wanted, gs.Constant):
            yield given, wanted


def _same(a: np.ndarray, b: np.ndarray, stored: np.dtype[Any] | None) -> bool:
    """Whether the values are the same, zeros exactly, but for rounding to the type that they are stored in."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    narrow = stored is not None and stored.itemsize < 4
    info: Any = ml_dtypes.finfo(stored) if narrow else None  # type: ignore[no-untyped-call]
    rtol, atol = (float(info.eps), float(info.smallest_subnormal)) if narrow else (EXACT, 0.0)
    return bool(np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True) and not np.any(a[b == 0]))
