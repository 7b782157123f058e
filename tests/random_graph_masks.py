"""ONNX sub-graphs of a recipe's masks, ids and positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from random_graph_nodes import LOWEST, Nodes
from random_graphs import (
    COUNTED,
    Blocks,
    Both,
    Causal,
    Either,
    Given,
    Ids,
    Keep,
    Mask,
    Padding,
    Positions,
    Prefix,
    Segments,
    Window,
)

TRIANGLE = 260  # rows of a constant triangle: lengths end there


@dataclass(frozen=True)
class Frame:
    """Queries and keys of an attention: their numbers and their places, scalars and [n], in one sequence of `keys`."""

    batch: str
    queries: str
    keys: str
    q: str  # places of the queries, [queries]
    k: str
    past: str = ""  # keys before the first query, a scalar
    given: tuple[Given, ...] = ()
    counts: tuple[str, str] = ("", "")  # an input [batch, tokens], and how many of each row are real by it, [batch]


@dataclass(frozen=True)
class Applied:
    """What hides keys: tensors to be true where a key is seen, tensors added to the scores, and what onnxruntime's
    operators take: integers [batch, keys], above 0 where a key is seen, or [batch], how many keys are."""

    keeps: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.keeps, *self.biases, *self.counts)


def masked(b: Nodes, mask: Mask, scores: str, frame: Frame) -> tuple[str, Applied]:
    """The scores, masked, and by which tensors."""
    value = LOWEST if mask.value == "lowest" else float(mask.value)
    if mask.put in ("where", "fill"):
        assert mask.keep is not None
        keep = kept(b, mask.keep, frame)
        sides = [scores, b.real(value)]
        hidden = [b("Not", keep), *sides[::-1]] if mask.put == "fill" else [keep, *sides]
        return b("Where", *hidden), Applied(keeps=(keep,))
    bias = bias_of(b, mask, frame)
    return b("Add", scores, bias), Applied(biases=(bias,))


def bias_of(b: Nodes, mask: Mask, frame: Frame) -> str:
    """What is added to the scores."""
    value = LOWEST if mask.value == "lowest" else float(mask.value)
    if mask.put == "apart":
        assert isinstance(mask.keep, Both)
        biases = [_where(b, kept(b, side, frame), value) for side in (mask.keep.left, mask.keep.right)]
        bias = b("Add", *biases)
    elif mask.put == "soft":
        bias = _soft(b, mask.soft, value, frame)
        if mask.keep is not None:
            bias = b("Add", bias, _where(b, kept(b, mask.keep, frame), value))
    else:
        assert mask.keep is not None
        bias = _where(b, kept(b, mask.keep, frame), value, mask.put == "times")
    if mask.spread:
        bias = b("Expand", bias, b.shape(frame.batch, 1, frame.queries, frame.keys))
    return bias


def _where(b: Nodes, keep: str, value: float, times: bool = False) -> str:
    if times:
        return b("Mul", b("Sub", b.real(1.0), b.cast(keep, "float32")), b.real(value))
    return b("Where", keep, b.real(0.0), b.real(value))


def _soft(b: Nodes, name: str, value: float, frame: Frame) -> str:
    given = next(item for item in frame.given if item.name == name)
    x = given.name if given.dtype == "float32" else b.cast(given.name, "float32")
    bias = b("Mul", b("Sub", b.real(1.0), x), b.real(value))
    return bias if given.shape == "b11s" else b.axes("Unsqueeze", bias, 1, 2)


def kept(b: Nodes, keep: Keep, frame: Frame) -> str:
    """bool, broadcastable to [batch, heads, queries, keys]."""
    if isinstance(keep, Both | Either):
        sides = (kept(b, side, frame) for side in (keep.left, keep.right))
        return b("And" if isinstance(keep, Both) else "Or", *sides)
    if isinstance(keep, Padding):
        return _padding(b, keep, frame)
    if isinstance(keep, Causal):
        return _causal(b, keep.form, frame)
    if isinstance(keep, Segments):
        queries = keep.source if not frame.past else b.slice(keep.source, frame.past, frame.keys, 1)
        return b("Equal", b.axes("Unsqueeze", queries, 1, 3), b.axes("Unsqueeze", keep.source, 1, 2))
    q, k = b.axes("Unsqueeze", frame.q, 1), b.axes("Unsqueeze", frame.k, 0)
    if isinstance(keep, Prefix):
        return b("Less", k, b.integer(keep.length))
    if isinstance(keep, Blocks):
        return b("Equal", *(b("Div", x, b.integer(keep.size)) for x in (q, k)))
    assert isinstance(keep, Window)
    apart = b("Sub", q, k)
    return b.at_most(b("Abs", apart), b.integer(keep.width)) if keep.both else b("Less", apart, b.integer(keep.width))


def _padding(b: Nodes, keep: Padding, frame: Frame) -> str:
    given = next(item for item in frame.given if item.name == keep.source)
    x = given.name
    if keep.picked:
        x = _picked(b, x, frame)
    elif given.shape != "b11s":
        x = b.axes("Unsqueeze", x, 1, 2)
    if given.dtype == "bool":
        return x if given.shape != "b11s" else b("Identity", x)
    if keep.test == "cast":
        return b.cast(x, "bool")
    if keep.test == "> 0":
        return b("Greater", x, b.constant(0, given.dtype))
    same = b("Equal", x, b.constant(1 if keep.test == "== 1" else 0, given.dtype))
    return same if keep.test == "== 1" else b("Not", same)


def _picked(b: Nodes, x: str, frame: Frame) -> str:
    """x[b, k] as [batch, 1, 1, keys], by GatherND on a grid of indices."""
    grid = b.shape(frame.batch, 1, 1, frame.keys, 1)
    rows = b("Expand", b.axes("Unsqueeze", b.range(frame.batch), 1, 2, 3, 4), grid)
    columns = b("Expand", b.axes("Unsqueeze", frame.k, 0, 1, 2, 4), grid)
    return b("GatherND", x, b("Concat", rows, columns, axis=4))


def _causal(b: Nodes, form: str, frame: Frame) -> str:
    if form == "range":
        return b.at_most(b.axes("Unsqueeze", frame.k, 0), b.axes("Unsqueeze", frame.q, 1))
    if form == "triangle":
        triangle = b.constant(np.tril(np.ones((TRIANGLE, TRIANGLE), bool)))
        rows = b.slice(triangle, frame.past or b.integer(0), frame.keys, 0)
        return b.slice(rows, b.integer(0), frame.keys, 1)
    both = b.shape(frame.queries, frame.keys)
    ones = b("Expand", b.integer(1), both)
    if form == "trilu":
        return b.cast(b("Trilu", ones, frame.past, upper=0) if frame.past else b("Trilu", ones, upper=0), "bool")
    down = b("CumSum", ones, b.integer(0))
    return b.at_most(b("CumSum", ones, b.integer(1)), b("Add", down, frame.past) if frame.past else down)


def row_ids(b: Nodes, ids: Ids, x: str) -> str:
    """Rows of the word table for the ids of an input."""
    at = b.constant(ids.at, ids.dtype)
    if ids.kind == "offset":
        return b("Add", x, at)
    if ids.kind == "unknown":
        return b("Where", b("Less", x, at), x, b.constant(1, ids.dtype))
    if ids.kind == "clip":
        last = b.constant(ids.at - 1, ids.dtype)
        return b("Clip", x, b.constant(0, ids.dtype), last) if b.opset >= 12 else b.least(x, last)
    return b("Mod", x, at) if ids.kind == "mod" else x


def positioned(b: Nodes, at: Positions, table: str, frame: Frame, ids: tuple[str, str], mask: Given | None) -> str:
    """Rows of the position table, to be added to the words'. ids: their name and type."""
    if at.kind == "table" and not frame.past:
        return b.slice(table, b.integer(0), frame.queries, 0)
    rows = _rows(b, at, frame, ids, mask)
    if at.clamped:
        dtype = next((item.dtype for item in frame.given if item.name == rows), "int64")
        rows = b.least(rows, b.constant(at.rows - 1, dtype))
    return b("Gather", table, rows, axis=0)


def _rows(b: Nodes, at: Positions, frame: Frame, ids: tuple[str, str], mask: Given | None) -> str:
    if at.kind == "given":
        return "position_ids"
    if at.kind == "ids":  # RoBERTa's: 1 is padding
        real = b.cast(b("Not", b("Equal", ids[0], b.constant(1, ids[1]))), "int64")
        return b("Add", b("Mul", b("CumSum", real, b.integer(1)), real), b.integer(1))
    if at.kind in COUNTED:
        assert mask is not None
        real = b.cast(mask.name, "int64")
        counted = b("CumSum", real, b.integer(1))
        if at.kind == "mask":  # OPT's
            counted = b("Add", b("Sub", b("Mul", counted, real), b.integer(1)), b.integer(2))
        else:
            counted = b("Where", b("Equal", real, b.integer(0)), b.integer(1), b("Sub", counted, b.integer(1)))
        return b.slice(counted, frame.past, frame.keys, 1) if frame.past else counted
    if at.kind == "buffer":
        buffer = b.constant(np.arange(at.rows)[None])
        first = b.integer(at.first) if not frame.past else b("Add", frame.past, b.integer(at.first))
        return b.slice(buffer, first, b("Add", frame.keys, b.integer(at.first)), 1)
    places = b("Add", frame.q, b.integer(at.first)) if at.first else frame.q
    if at.kind == "clip":
        return b.least(places, b.integer(at.at))
    if at.kind == "mod":
        return b("Mod", places, b.integer(at.at))
    if at.kind == "reversed":
        return b("Sub", b("Sub", frame.keys, b.integer(1)), places)
    return places
