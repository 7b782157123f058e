"""Where a constant comes from: which initializer of the source file, and how that was cut, turned and scaled since.

    weight = derived(stored, "query/weight", Transpose((1, 0)), Slice(1, 0, 384))
    source(weight)             Source(("qkv.weight",), (Transpose((1, 0)), Slice(1, 0, 384)))
    source(weight).of(file)    the same values again, from the file's initializers

A constant carries its Source as an attribute; copies and extracts keep it, files do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.edit import SOURCE, source_constant

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Transpose:
    """As the operator of that name."""

    perm: tuple[int, ...]

    def apply(self, values: Array) -> Array:
        return values.transpose(self.perm)


@dataclass(frozen=True)
class Slice:
    """From `start` up to `stop` of an axis: the rows or columns that are kept."""

    axis: int
    start: int
    stop: int

    def apply(self, values: Array) -> Array:
        return values[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


@dataclass(frozen=True)
class Take:
    """Some of an axis, in this order."""

    axis: int
    order: tuple[int, ...]

    def apply(self, values: Array) -> Array:
        return values.take(np.array(self.order, np.int64), axis=self.axis)


@dataclass(frozen=True)
class Permute(Take):
    """All of an axis, in this order."""


@dataclass(frozen=True)
class Reshape:
    """The same elements in order."""

    shape: tuple[int, ...]

    def apply(self, values: Array) -> Array:
        return values.reshape(self.shape)


@dataclass(frozen=True)
class Broadcast:
    """Repeated along axes of size 1 or none."""

    shape: tuple[int, ...]

    def apply(self, values: Array) -> Array:
        return np.broadcast_to(values, self.shape)


@dataclass(frozen=True)
class Scale:
    """Times a number, in the values' own type."""

    factor: float

    def apply(self, values: Array) -> Array:
        return np.asarray(values * values.dtype.type(self.factor))


@dataclass(frozen=True)
class Cast:
    """To another type of floats, by numpy's name."""

    dtype: str

    def apply(self, values: Array) -> Array:
        return values.astype(np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)))


Operation: TypeAlias = Transpose | Slice | Take | Reshape | Broadcast | Scale | Cast


@dataclass(frozen=True)
class Source:
    """What a constant was made of.

    initializers: their names in the source file; a Constant operator counts as one, by what it gives. operations: what
    was done to the only one, in order. computed: it comes from several, or from arithmetic that no operation tells.
    changed: other values were set since (pruning, rounding); each is still in the place that the operations say.
    """

    initializers: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    computed: bool = False
    changed: bool = False

    def of(self, initializers: Mapping[str, Array]) -> Array:
        """The constant out of the file's initializers: bit for bit, unless it was changed since. GraphError for what is
        computed."""
        if self.computed:
            raise GraphError(f"a constant computed from {', '.join(self.initializers)} cannot be traced to its source")
        return applied(initializers[self.initializers[0]], self.operations)

    def put(self, stored: Array, values: Array) -> Array:
        """The initializer with the constant's values where the constant came from: `of` backwards. Of what the
        operations repeat, the last counts; rounded to the initializer's type. GraphError for what is computed."""
        if self.computed:
            raise GraphError(f"a constant computed from {', '.join(self.initializers)} cannot be put back")
        factor = math.prod(step.factor for step in self.operations if isinstance(step, Scale))
        moves = [step for step in self.operations if not isinstance(step, (Scale, Cast))]
        given, made = (values if factor == 1 else values / factor).astype(stored.dtype), np.array(stored, order="C")
        view = reduce(lambda array, operation: operation.apply(array), moves, made)
        if view.flags.writeable and np.may_share_memory(view, made):
            view[...] = given
        else:
            places = applied(np.arange(stored.size).reshape(stored.shape), moves)
            made.reshape(-1)[places.reshape(-1)] = given.reshape(-1)
        return made

    @property
    def key(self) -> str:
        """The initializer and what was kept of it, each axis as it is in the file: "qkv.weight[1: 0-384]"."""
        if self.computed:
            return " ".join(self.initializers)
        axes: list[int] | None = []
        text = self.initializers[0]
        for operation in self.operations:
            if isinstance(operation, Transpose):
                axes = [_axis(axes, place) for place in operation.perm] if axes is not None else None
            elif isinstance(operation, (Reshape, Broadcast)):
                axes, text = None, f"{text} as {'x'.join(map(str, operation.shape))}"
            elif isinstance(operation, Slice):
                text += f"[{_axis(axes, operation.axis)}: {operation.start}-{operation.stop}]"
            elif isinstance(operation, Take) and not isinstance(operation, Permute):
                text += f"[{_axis(axes, operation.axis)}: {_ranges(operation.order)}]"
        return text


def _axis(axes: Sequence[int] | None, place: int) -> int:
    """The axis of the file that stands at a place now."""
    return axes[place] if axes else place


def _ranges(order: Sequence[int]) -> str:
    """Runs of following numbers: "0-48 144-192"."""
    bounds = [0, *(at for at in range(1, len(order)) if order[at] != order[at - 1] + 1), len(order)]
    return " ".join(f"{order[a]}-{order[b - 1] + 1}" for a, b in pairwise(bounds))


# ---- asking ------------------------------------------------------------------------------------------------


def source(tensor: gs.Tensor) -> Source | None:
    """Where a constant comes from; None for one that a pass has made up, and for what is computed."""
    found = source_constant(tensor)
    known: Source | None = None if found is None else found.__dict__.get(SOURCE)
    return known


def applied(values: Array, operations: Iterable[Operation]) -> Array:
    """What the operations make of an array, in C order."""
    return np.asarray(reduce(lambda array, operation: operation.apply(array), operations, values), order="C")


# ---- recording ---------------------------------------------------------------------------------------------


def derived(tensor: gs.Tensor, name: str, *operations: Operation) -> gs.Constant:
    """A new constant: what the operations make of another, whose source it extends by them."""
    before = source_constant(tensor)
    if before is None:
        raise GraphError(f"tensor '{tensor.name}' is no constant, so nothing can be derived from it")
    values, known = moved(np.asarray(before.values), source(before), operations)
    part = values.size < before.values.size  # which must not hold on to the whole
    made = np.array(values, order="C") if part else np.asarray(values, order="C")
    return with_source(gs.Constant(name, made), known)


def moved(values: Array, known: Source | None, operations: Iterable[Operation]) -> tuple[Array, Source | None]:
    """What operations make of values, a view where that is one, and its source; what changes nothing is left out."""
    found = list(known.operations) if known is not None else []
    for operation in operations:
        after = operation.apply(values)
        kept = _plain(operation, values, after)
        values = after
        if isinstance(kept, Transpose) and found and isinstance(found[-1], Transpose):
            inner = found.pop()
            assert isinstance(inner, Transpose)
            kept = Transpose(tuple(inner.perm[place] for place in kept.perm))
            kept = None if list(kept.perm) == sorted(kept.perm) else kept
        if kept is not None:
            found.append(kept)
    return values, known if known is None or known.computed else replace(known, operations=tuple(found))


def _plain(operation: Operation, before: Array, after: Array) -> Operation | None:
    """The operation in its simplest form; None where it changes nothing."""
    if isinstance(operation, Take):
        order, size = operation.order, before.shape[operation.axis]
        if order and order == tuple(range(order[0], order[0] + len(order))):
            return _plain(Slice(operation.axis, order[0], order[0] + len(order)), before, after)
        return (Permute if sorted(order) == list(range(size)) else Take)(operation.axis, order)
    if isinstance(operation, Scale):
        return None if operation.factor == 1.0 else operation
    if isinstance(operation, Transpose):
        return None if list(operation.perm) == sorted(operation.perm) else operation
    return None if before.shape == after.shape and before.dtype == after.dtype else operation


def with_source(constant: gs.Constant, known: Source | None) -> gs.Constant:
    """The constant, which knows its source from now on."""
    constant.__dict__.pop(SOURCE, None)
    if known is not None:
        constant.__dict__[SOURCE] = known
    return constant


def changed(constant: gs.Constant, tensor: gs.Tensor) -> gs.Constant:
    """The constant, which holds other values for those of another, in the same places (rounded, pruned, scaled)."""
    known = source(tensor)
    return with_source(constant, None if known is None else replace(known, changed=True))


def computed(sources: Iterable[Source | None]) -> Source | None:
    """The source of what arithmetic makes of several constants; None where none of them is of the file."""
    names = dict.fromkeys(name for known in sources if known is not None for name in known.initializers)
    return Source(tuple(names), computed=True) if names else None


def permuted(known: Source | None, order: Sequence[int] | Array, axis: int) -> Source | None:
    """The source of a constant whose axis was put into this order."""
    places = tuple(int(place) for place in order)
    if known is None or known.computed or list(places) == sorted(places):
        return known
    return replace(known, operations=(*known.operations, Permute(axis, places)))
