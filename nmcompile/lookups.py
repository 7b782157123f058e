"""What the ids of an embedding are: a graph input, token positions, a count of real tokens, or one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.builder import Builder, sequence_length
from nmcompile.derive import Derivation, Underived
from nmcompile.symbolic import ONE, ZERO, Element, Index, IsZero, Least, Poly, Running, Size, is_zero, mentioned, poly


@dataclass(frozen=True)
class Ids:
    """input: `source` [batch, tokens] itself. position: `first` + column. row: `first` everywhere.

    cumulative: RoBERTa's count of the tokens in `source` that are not `first`, which padding keeps as its id.
    length: how many columns there are, as the sizes of the graph's inputs have it.
    """

    kind: str
    source: gs.Tensor | None = None
    first: int = 0
    length: Poly = ONE


def read_ids(d: Derivation, ids: gs.Tensor) -> Ids:
    """What these ids, [tokens] or [batch, tokens], are. Underived says what they are where that is none of these."""
    shape = d.value(ids).shape
    place = tuple(ZERO if size == ONE else poly(Index(name, size))
                  for name, size in zip("bt"[2 - len(shape) :], shape, strict=True))  # fmt: skip
    return explained(d, d.element(ids, place), place, shape)


def explained(d: Derivation, value: Poly, place: tuple[Poly, ...], shape: tuple[Poly, ...]) -> Ids:
    """The same for an expression of ids at a place of a tensor of a shape."""
    if value.integer is not None:
        return Ids("row", None, value.integer)
    column, length = place[-1], columns(shape[-1])
    first = value - column
    if first.integer is not None and first.integer >= 0 and not isinstance(column.number, int):
        return Ids("position", None, first.integer, length)
    for atom in sorted(mentioned(value), key=str):
        if not isinstance(atom, Element) or atom.tensor not in d.inputs or len(place) != 2:
            continue
        source = d.inputs[atom.tensor]
        if d.shape(source) != shape:  # a part of the input, or one row of it for all
            continue
        if value == poly(atom) and atom.index == place:
            return Ids("input", source, 0, length)
        for pad in _compared(value):
            if value == _counted(atom.tensor, atom.kind, place, shape, pad):
                return Ids("cumulative", source, pad, length)
    over = ", ".join(map(str, shape))
    raise Underived(f"its ids are {_short(value)} over [{over}], neither an input nor positions")


def columns(size: Poly) -> Poly:
    """The size that min(rows of a table, size) stands for: where the table ends before, the model has no answer."""
    for atom in size.atoms:
        if isinstance(atom, Least) and size == poly(atom):
            return next((item for item in atom.values if any(isinstance(a, Size) for a in item.atoms)), size)
    return size


def _counted(tensor: str, kind: str, place: tuple[Poly, ...], shape: tuple[Poly, ...], pad: int) -> Poly:
    """CumSum(ids != pad) * (ids != pad) + pad"""
    over = Index("#", shape[1])
    here, there = (poly(Element(tensor, (place[0], at), kind)) for at in (place[1], poly(over)))
    real = ONE - is_zero(here - pad)
    return poly(Running(ONE - is_zero(there - pad), over, place[1])) * real + pad


def _compared(value: Poly) -> list[int]:
    """Numbers that an element is compared with."""
    found = []
    for atom in mentioned(value):
        if isinstance(atom, IsZero):
            rest = [poly(f) for m, f in atom.value.terms.items() if not m]
            sign = next(f for m, f in atom.value.terms.items() if m)
            number = (rest[0] if rest else ZERO).integer
            if number is not None:
                found.append(int(-number * sign))
    return sorted(set(found))


def _short(value: Poly) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- the canonical form --------------------------------------------------------------------------------------


def build_ids(b: Builder, ids: Ids, inputs: Mapping[str, gs.Tensor]) -> gs.Tensor:
    """Canonical ids for positions, [tokens], or for a count, [batch, tokens]. Underived: no input has their size."""
    if ids.kind == "position":
        like, axis = _measure(ids.length, inputs)
        first = b.scalar(ids.first, np.int64)
        end = sequence_length(b, like, axis)
        if ids.first:
            end = b("Add", end, first, dtype=np.int64)
        return b("Range", first, end, b.scalar(1, np.int64), dtype=np.int64)
    assert ids.source is not None
    pad = b.scalar(ids.first, np.int64)
    source = ids.source if ids.source.dtype == np.int64 else b("Cast", ids.source, dtype=np.int64, to=7)
    real = b("Cast", b("Not", b("Equal", source, pad, dtype=bool), dtype=bool), dtype=np.int64, to=7)
    count = b("CumSum", real, b.scalar(1, np.int64), dtype=np.int64)
    return b("Add", b("Mul", count, real, dtype=np.int64), pad, dtype=np.int64)


def _measure(length: Poly, inputs: Mapping[str, gs.Tensor]) -> tuple[gs.Tensor, int]:
    """An input and its axis of that size, an axis 1 rather than another."""
    found = [(axis != 1, place, tensor, axis)
             for place, tensor in enumerate(inputs.values()) for axis, dim in enumerate(tensor.shape or [])
             if isinstance(dim, str) and poly(Size(dim)) == length]  # fmt: skip
    if not found:
        raise Underived(f"no input is of the {length} positions that it looks up")
    _, _, tensor, axis = min(found, key=lambda item: item[:2])
    return tensor, axis
