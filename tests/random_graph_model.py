"""The ONNX model of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import e, sqrt

import numpy as np
import onnx
from random_graph_masks import Applied, Frame, masked, positioned, row_ids
from random_graph_nodes import BATCH, TOKENS, Nodes
from random_graphs import COUNTED, Causal, Mask, Padding, Recipe

LABELS = 16  # outputs of a classifier
TOTAL, PAST, TARGETS = "total", "past", "targets"  # free sizes


@dataclass(frozen=True)
class Built:
    """A model, and for each output [batch, tokens, ...] what hides keys in each layer that computes it."""

    model: onnx.ModelProto
    applied: dict[str, tuple[Applied, ...]]


def build(recipe: Recipe) -> Built:
    style = recipe.style
    b = Nodes(style.opset, recipe.seed, style.sizes, style.folded, style.swapped)
    tokens = recipe.static or TOKENS
    x, frame = _sequence(b, recipe, "input_ids", tokens, recipe.past)
    states, applied = x, []
    for index, mask in enumerate(recipe.masks):
        states, found = _layer(b, recipe, states, mask, frame, index)
        applied.append(found)
        if index == 0 and recipe.constant is not None:
            states = _times_constant(b, recipe, states)
    if recipe.decoder is None:
        for kind in recipe.outputs:
            _head(b, recipe, kind, states, frame, tokens)
        return Built(b.model(), {"tokens": tuple(applied)})
    b.output(states, "encoder", [BATCH, tokens, recipe.hidden])
    y, own = _decoded(b, recipe, states, frame)
    for kind in recipe.outputs:
        _head(b, recipe, "first" if kind in ("masked mean", "last") else kind, y, own, TARGETS)
    return Built(b.model(), {"encoder": tuple(applied)})


# ---- embeddings --------------------------------------------------------------------------------------------------


def _sequence(b: Nodes, recipe: Recipe, name: str, tokens: int | str, past: bool) -> tuple[str, Frame]:
    """Embedded tokens [batch, tokens, hidden], and their places."""
    ids = recipe.ids
    x = b.input(name, ids.dtype, [BATCH, tokens])
    for given in recipe.inputs:
        last: int | str = tokens if given.name == "position_ids" or not past else TOTAL
        lead: int | str = 1 if given.shape == "1s" else BATCH
        b.input(given.name, given.dtype, [lead, 1, 1, last] if given.shape == "b11s" else [lead, last])
    frame = _frame(b, recipe, x, past)
    y = b("Gather", b.table(ids.words, recipe.hidden), row_ids(b, ids, x), axis=0)
    if recipe.positions is not None:
        mask = recipe.inputs[0] if recipe.positions.kind in COUNTED else None
        table = b.table(recipe.positions.rows, recipe.hidden)
        y = b("Add", y, positioned(b, recipe.positions, table, frame, (x, ids.dtype), mask))
    if recipe.types:
        y = b("Add", y, _types(b, recipe, x, tokens))
    return b.norm(y, recipe.hidden, recipe.style.fused_norm), frame


def _frame(b: Nodes, recipe: Recipe, x: str, past: bool) -> Frame:
    batch, count = b.size(x, 0), b.size(x, 1)
    q = b.range(count)
    if not past:
        return Frame(batch, count, count, q, q, given=recipe.inputs)
    for index in range(len(recipe.masks)):
        for part in ("key", "value"):
            b.input(f"past_{part}_{index}", "float32", [BATCH, recipe.heads, PAST, recipe.size])
    before = b.size("past_key_0", 2)
    keys = b("Add", before, count)
    return Frame(batch, count, keys, b("Add", q, before), b.range(keys), before, recipe.inputs)


def _types(b: Nodes, recipe: Recipe, x: str, tokens: int | str) -> str:
    table = b.table(2, recipe.hidden)
    if recipe.types == "input":
        return b("Gather", table, b.input("token_type_ids", recipe.ids.dtype, [BATCH, tokens]), axis=0)
    if recipe.types == "buffer":
        zeros = b.slice(b.constant(np.zeros((1, 1000), np.int64)), b.integer(0), b.size(x, 1), 1)
        return b("Gather", table, b("Expand", zeros, b("Shape", x)), axis=0)
    one = b("Expand", b.integer(int(recipe.types == "one")), b("Shape", x))
    return b("Gather", table, one, axis=0)


# ---- layers ------------------------------------------------------------------------------------------------------


def _layer(b: Nodes, recipe: Recipe, x: str, mask: Mask | None, frame: Frame, index: int) -> tuple[str, Applied]:
    past = (f"past_key_{index}", f"past_value_{index}") if frame.past else ()

    def attend(y: str) -> tuple[str, Applied]:
        return _attention(b, recipe, y, y, mask, frame, past)

    return _residual(b, recipe, x, attend)


def _residual(b: Nodes, recipe: Recipe, x: str, attend: Callable[[str], tuple[str, Applied]]) -> tuple[str, Applied]:
    """x + attention, and that + feed-forward layers, normalised before or after."""
    width, fused, early = recipe.hidden, recipe.style.fused_norm, recipe.style.pre_norm
    y, applied = attend(b.norm(x, width, fused) if early else x)
    x = b("Add", x, y)
    x = x if early else b.norm(x, width, fused)
    y = b.norm(x, width, fused) if early else x
    y = b.linear(b.gelu(b.linear(y, width, recipe.feed), recipe.style.gelu), recipe.feed, width)
    x = b("Add", y, x)
    return x if early else b.norm(x, width, fused), applied


def _attention(
    b: Nodes, recipe: Recipe, x: str, other: str, mask: Mask | None, frame: Frame, past: tuple[str, ...] = ()
) -> tuple[str, Applied]:
    """Of tokens x over tokens `other`, with its output layer."""
    heads, size, style = recipe.heads, recipe.size, recipe.style
    inner = heads * size
    if style.merged and x == other:
        y = b.linear(x, recipe.hidden, 3 * inner)
        q, k, v = b.split(y, 3, axis=2)
    else:
        q, k, v = (b.linear(source, recipe.hidden, inner) for source in (x, other, other))
    factor = _factor(b, recipe, frame)
    q, v = _split(b, recipe, q), _split(b, recipe, v)
    if past:
        k = b("Concat", past[0], _split(b, recipe, k), axis=2)
        k = b("Transpose", k, perm=[0, 1, 3, 2])
        v = b("Concat", past[1], v, axis=2)
    elif style.keys == "twice":
        k = b("Transpose", _split(b, recipe, k), perm=[0, 1, 3, 2])
    else:
        k = _split(b, recipe, k, [0, 2, 3, 1])
    on = recipe.factor.on
    q = b(recipe.factor.op, q, factor) if on in ("q", "both") else q
    k = b(recipe.factor.op, k, factor) if on in ("k", "both") else k
    scores = b("MatMul", q, k)
    applied = Applied()
    if mask is not None and mask.early:
        scores, applied = masked(b, mask, scores, frame)
    if on == "scores":
        scores = b(recipe.factor.op, scores, factor)
    if mask is not None and not mask.early:
        scores, applied = masked(b, mask, scores, frame)
    share = b("Softmax", scores, axis=-1 if style.keys == "once" or b.opset < 13 else 3)
    if style.guard:
        share = b("Where", b("IsNaN", share), b.real(0.0), share)
    y = b("Transpose", b("MatMul", share, v), perm=[0, 2, 1, 3])
    y = b("Reshape", y, _sizes(b, style.shapes, y, (inner,)))
    return b.linear(y, inner, recipe.hidden, gain=2.0), applied


def _split(b: Nodes, recipe: Recipe, x: str, perm: tuple[int, ...] | list[int] = (0, 2, 1, 3)) -> str:
    y = b("Reshape", x, _sizes(b, recipe.style.shapes, x, (recipe.heads, recipe.size)))
    return b("Transpose", y, perm=list(perm))


def _sizes(b: Nodes, style: str, x: str, last: tuple[int, ...]) -> str:
    """[batch, tokens, *last] as this style writes it."""
    if style == "computed":
        return b.shape(b.size(x, 0), b.size(x, 1), *last)
    return b.ints(0, -1 if style == "infer" else 0, *last)


def _factor(b: Nodes, recipe: Recipe, frame: Frame) -> str:
    """What the scores, or q or k, are multiplied or divided by."""
    half, divided = recipe.factor.on == "both", recipe.factor.op == "Div"
    scale = 1 / sqrt(recipe.size)
    if recipe.factor.kind == "constant":
        value = sqrt(scale) if half else scale
        return b.real(1 / value if divided else value)
    length = b("Sqrt", b("Log", b("Add", b.cast(frame.keys, "float32"), b.real(e))))
    y = b("Mul", length, b.real(1 / scale)) if divided else b("Div", b.real(scale), length)
    return b("Sqrt", y) if half else y


def _times_constant(b: Nodes, recipe: Recipe, x: str) -> str:
    assert recipe.constant is not None
    sizes = {"h": recipe.hidden, "s": recipe.static, "1": 1}
    shape = [sizes[letter] for letter in recipe.constant.shape]
    values = b.rng.uniform(0.3, 1.7, shape) if recipe.constant.op == "Mul" else b.rng.standard_normal(shape)
    y = b(recipe.constant.op, x, b.constant(values, np.float32))
    return b.axes("Squeeze", y, 0) if len(shape) == 4 else y


def _decoded(b: Nodes, recipe: Recipe, states: str, frame: Frame) -> tuple[str, Frame]:
    """One decoder layer over a second sequence, with cross-attention to the states."""
    assert recipe.decoder is not None
    ids = recipe.ids
    x = b.input("decoder_input_ids", ids.dtype, [BATCH, TARGETS])
    own = _frame(b, recipe, x, False)
    y = b("Gather", b.table(ids.words, recipe.hidden), row_ids(b, ids, x), axis=0)
    if recipe.positions is not None:
        places = own.q if recipe.decoder.own else frame.q
        y = b("Add", y, b("Gather", b.table(recipe.positions.rows, recipe.hidden), places, axis=0))
    y = b.norm(y, recipe.hidden, recipe.style.fused_norm)
    mask = Mask(Causal(), "add", "lowest") if recipe.decoder.causal else None
    y, _ = _residual(b, recipe, y, lambda z: _attention(b, recipe, z, z, mask, own))
    over = _padding_only(recipe) if recipe.decoder.masked else None
    across = Frame(own.batch, own.queries, frame.keys, own.q, frame.k, given=recipe.inputs)
    y, _ = _residual(b, recipe, y, lambda z: _attention(b, recipe, z, states, over, across))
    return y, own


def _padding_only(recipe: Recipe) -> Mask | None:
    """The encoder's padding as cross-attention sees it."""
    mask = next((item for item in recipe.inputs if "mask" in item.name), None)
    return None if mask is None else Mask(Padding(mask.name), "add", "lowest")


# ---- heads -------------------------------------------------------------------------------------------------------


def _head(b: Nodes, recipe: Recipe, kind: str, x: str, frame: Frame, tokens: int | str) -> None:
    if kind in {info.name for info in b.outputs}:
        return
    if kind == "tokens":
        b.output(x, kind, [BATCH, tokens, recipe.hidden])
        return
    pooled = _pooled(b, recipe, kind, x, frame)
    b.output(b.linear(b("Tanh", b.linear(pooled, recipe.hidden, recipe.hidden)), recipe.hidden, LABELS),
             kind.replace(" ", "_"), [BATCH, LABELS])  # fmt: skip


def _pooled(b: Nodes, recipe: Recipe, kind: str, x: str, frame: Frame) -> str:
    """[batch, hidden]."""
    if kind == "first":
        return b("Gather", x, b.integer(0), axis=1)
    if kind == "first slice":
        return b.axes("Squeeze", b.slice(x, b.integer(0), b.integer(1), 1), 1)
    if kind in ("mean", "max"):
        return b.reduce("ReduceMean" if kind == "mean" else "ReduceMax", x, 1)
    mask = recipe.inputs[0]
    real = b.slice(mask.name, frame.past, frame.keys, 1) if frame.past else mask.name
    if kind == "masked mean":
        share = b.axes("Unsqueeze", real if mask.dtype == "float32" else b.cast(real, "float32"), 2)
        count = b("Max", b.reduce("ReduceSum", share, 1), b.real(1e-9))
        return b("Div", b.reduce("ReduceSum", b("Mul", x, share), 1), count)
    last = b("Sub", b.reduce("ReduceSum", b.cast(real, "int64"), 1), b.integer(1))  # [batch] or [1]
    if mask.shape == "1s":
        return b("Gather", x, b.axes("Squeeze", last, 0), axis=1)
    rows = b.range(b.size(x, 0))
    index = b("Concat", b.axes("Unsqueeze", rows, 1), b.axes("Unsqueeze", last, 1), axis=1)
    return b("GatherND", x, index)
