"""Writes masks of attention in their canonical form, of plain operators.

    Where(keep, 0, lowest)        keep from a [batch, keys] input, from the causal triangle, or both
    (1 - padding) * lowest        for a padding that is 0 or 1; with other values it adds something else
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.builder import Builder, sequence_length
from nmcompile.masks import Mask


def build_mask(b: Builder, mask: Mask, like: gs.Tensor) -> gs.Tensor | None:
    """The additive bias of a mask, broadcastable to [batch, heads, queries, keys]; `like` is [batch, tokens, ...]."""
    keep = [] if mask.padding is None else [_shown(b, mask)] if mask.test != "linear" else []
    below = _below(b, like) if mask.causal else None
    if mask.triangle is None and mask.test != "linear":
        keep += [] if below is None else [below]
        return _hiding(b, b("And", *keep, dtype=bool), mask.lowest) if len(keep) == 2 else (
            _hiding(b, keep[0], mask.lowest) if keep else None)  # fmt: skip
    linear = mask.padding is not None and mask.test == "linear"
    by_padding = _linear(b, mask) if linear else _hiding(b, keep[0], mask.lowest) if keep else None
    if below is None:
        return by_padding
    by_place = _hiding(b, below, mask.lowest if mask.triangle is None else mask.triangle)
    return by_place if by_padding is None else b("Add", by_place, by_padding)


def is_built(bias: gs.Tensor, mask: Mask) -> bool:
    """Whether a bias that this mask is has the canonical form: made by the same operators."""
    padding = mask.padding
    dummy = gs.Variable("dummy", None if padding is None else padding.dtype, ["batch", "keys"])
    scratch = gs.Graph()
    build_mask(Builder(scratch, "mask"), replace(mask, padding=None if padding is None else dummy), dummy)
    seen: dict[int, str] = {}
    todo = [bias]
    while todo and len(seen) <= len(scratch.nodes):
        for node in todo.pop().inputs:
            if id(node) not in seen:
                seen[id(node)] = node.op
                todo += [] if node.op == "Shape" else node.inputs
    return sorted(seen.values()) == sorted(node.op for node in scratch.nodes)


def _hiding(b: Builder, keep: gs.Tensor, lowest: float) -> gs.Tensor:
    return b("Where", keep, b.scalar(0.0), b.scalar(lowest))


def _shown(b: Builder, mask: Mask) -> gs.Tensor:
    """Whether each key is seen by the padding: bool [batch, 1, 1, keys]."""
    assert mask.padding is not None
    kind = np.dtype(mask.padding.dtype)
    if mask.test == "count":
        return b("Unsqueeze", _counted_keys(b, mask.padding), b.ints(1, 2), dtype=bool)
    if mask.test == "nonzero":
        shown = b("Cast", mask.padding, dtype=bool, to=9)
    else:
        op, value = ("Equal", 1) if mask.test == "one" else ("Greater", 0)
        shown = b(op, mask.padding, b.scalar(value, kind), dtype=bool)
    return b("Unsqueeze", shown, b.ints(1, 2), dtype=bool)


def _counted_keys(b: Builder, padding: gs.Tensor) -> gs.Tensor:
    """Whether each key stands before the number of ones in its row: bool [batch, keys]."""
    ones = b("Cast", b("Equal", padding, b.scalar(1, np.dtype(padding.dtype)), dtype=bool), dtype=np.int64, to=7)
    count = b("ReduceSum", ones, b.ints(1), dtype=np.int64, keepdims=1)
    at = b("Range", b.scalar(0, np.int64), sequence_length(b, padding), b.scalar(1, np.int64), dtype=np.int64)
    return b("Less", at, count, dtype=bool)


def _linear(b: Builder, mask: Mask) -> gs.Tensor:
    """(1 - padding) * lowest, [batch, 1, 1, keys]."""
    assert mask.padding is not None
    wide = b("Unsqueeze", b("Cast", mask.padding, to=1), b.ints(1, 2))
    return b("Mul", b("Sub", b.scalar(1.0), wide), b.scalar(mask.lowest))


def _below(b: Builder, like: gs.Tensor) -> gs.Tensor:
    """Whether a key stands no further than the query: bool [tokens, tokens]."""
    length = sequence_length(b, like)
    index = b("Range", b.scalar(0, np.int64), length, b.scalar(1, np.int64), dtype=np.int64)
    return b("LessOrEqual", b("Unsqueeze", index, b.ints(0), dtype=np.int64),
             b("Unsqueeze", index, b.ints(1), dtype=np.int64), dtype=bool)  # fmt: skip

