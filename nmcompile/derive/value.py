"""A derived tensor: its shape and its elements, both as polynomials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from nmcompile.symbolic import ONE, ZERO, Element, Least, Poly, at_least_zero, poly

Shape: TypeAlias = tuple[Poly, ...]
At: TypeAlias = Callable[[Shape], Poly]
MAX_ENTRIES = 64  # of a list of sizes
MAX_TERMS = 400  # of one element: what grows beyond is no mask or position


class Underived(Exception):
    """Why something is not derived: the operator or the tensor at which it stopped."""


@dataclass(frozen=True, eq=False)
class Value:
    """`at` gives the element at an index; kind is numpy's: "b", "i", "f"."""

    shape: Shape
    kind: str
    at: At

    def element(self, index: Sequence[Poly]) -> Poly:
        """The element at an index of as many parts as the shape has. Underived: it is too long to be worth while."""
        found = self.at(tuple(index))
        if len(found.terms) > MAX_TERMS:
            raise Underived("its expression grows too long")
        return found

    def entries(self) -> list[Poly]:
        """All elements of a scalar or a short list."""
        if not self.shape:
            return [self.element(())]
        count = self.shape[0].integer
        if len(self.shape) != 1 or count is None or not 0 <= count <= MAX_ENTRIES:
            raise Underived("it is no short list of sizes")
        return [self.element((poly(place),)) for place in range(count)]

    def integers(self) -> list[int]:
        """All elements of a short list of constant integers."""
        found = [entry.integer for entry in self.entries()]
        if any(value is None for value in found):
            raise Underived("it is no list of constants")
        return [value for value in found if value is not None]


def opaque(name: str, shape: Shape, kind: str) -> Value:
    """A tensor whose elements stand for themselves."""
    return Value(shape, kind, lambda index: poly(Element(name, index, kind)))


# ---- broadcasting --------------------------------------------------------------------------------------------


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an elementwise operation's result. Underived where it depends on which sizes are 1."""
    rank = max(map(len, shapes))
    padded = [(ONE,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(_common(dims) for dims in zip(*padded, strict=True))


def _common(dims: Sequence[Poly]) -> Poly:
    found = ONE
    for dim in dims:
        if dim in (found, ONE):
            continue
        if found != ONE and not _least_of(found, dim):
            if not _least_of(dim, found):
                raise Underived(f"sizes {found} and {dim} meet, which need not agree")
            continue
        found = dim
    return found


def _least_of(a: Poly, b: Poly) -> bool:
    """Whether a is min(b, number): where they meet they are equal, or the model has no answer. (The least of two free
    sizes may be 1, and then it is broadcast.)"""
    found = next((atom for atom in a.atoms if isinstance(atom, Least)), None)
    if found is None or a != poly(found) or b not in found.values or b.number is not None:
        return False
    return all(value == b or value.number is not None for value in found.values)


def aligned(value: Value, index: Shape) -> Poly:
    """The element of a broadcast operand at an index of the result."""
    own = index[len(index) - len(value.shape) :]
    return value.element([ZERO if dim == ONE else at for dim, at in zip(value.shape, own, strict=True)])


# ---- constants -----------------------------------------------------------------------------------------------


def constant(name: str, shape: Sequence[int], kind: str, read: Callable[[], np.ndarray]) -> Value:
    """A constant: numbers where the index is one, or where all elements follow a rule.

    kind: numpy's. read: gives its array, when somebody asks for elements; most constants are weights, whose elements
    nobody asks for.
    """

    @cache
    def rule() -> At | None:
        return _rule(read()) if kind in "biuf" else None

    def at(index: Shape) -> Poly:
        places = [part.integer for part in index]
        if all(place is not None for place in places):
            item = read()[tuple(place for place in places if place is not None)]
            return number(item)
        followed = rule()
        return poly(Element(name, index, own)) if followed is None else followed(index)

    own = "i" if kind in "iu" else kind
    return Value(tuple(poly(int(size)) for size in shape), own, at)


def number(item: np.generic | float) -> Poly:
    value = item.item() if isinstance(item, np.generic) else item
    if isinstance(value, bool):
        return poly(int(value))
    if value != value:
        raise Underived("it holds NaN")
    return poly(value)


def _rule(array: np.ndarray) -> At | None:
    """All elements alike, counting up along one axis, or one value below a diagonal and another above it."""
    if array.size == 0:
        return None
    first = array.reshape(-1)[0]  # not by `flat`, which stops at 32 dimensions
    if (array == array.dtype.type(first)).all():
        return lambda index: number(first)
    if array.dtype.kind in "iu":
        for axis, size in enumerate(array.shape):
            if size > 1:
                line = np.moveaxis(array, axis, -1)
                step = int(line.reshape(-1, size)[0, 1]) - int(first)
                if (line == int(first) + step * np.arange(size)).all():
                    return lambda index, axis=axis, step=step: poly(int(first)) + index[axis] * step  # type: ignore[misc]
    return _diagonal(array) if array.ndim >= 2 and array.size <= 1 << 26 else None


def _diagonal(array: np.ndarray) -> At | None:
    plane = array.reshape(-1, *array.shape[-2:])
    if not (plane == plane[:1]).all():
        return None
    table = plane[0]
    rows, columns = table.shape
    low, high = table[-1, 0], table[0, -1]
    if low == high:
        return None
    for offset in {int(np.argmax(table[0] == high)) - 1, 0}:  # row + offset >= column below and on the diagonal
        below = np.arange(rows)[:, None] + offset >= np.arange(columns)
        if (table == np.where(below, low, high)).all():
            a, b = number(low), number(high)
            return lambda index, offset=offset: b + at_least_zero(index[-2] - index[-1] + offset) * (a - b)  # type: ignore[misc]
    return None
