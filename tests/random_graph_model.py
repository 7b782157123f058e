"""The ONNX model of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from random_graph_attention import MICROSOFT, attention, trimmed
from random_graph_masks import Applied, Frame, positioned, row_ids
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
    if recipe.style.embed:
        return _embedded(b, recipe, x, tokens, frame)
    y = b("Gather", b.table(ids.words, recipe.hidden), row_ids(b, ids, x), axis=0)
    if recipe.positions is not None:
        mask = recipe.inputs[0] if recipe.positions.kind in COUNTED else None
        table = b.table(recipe.positions.rows, recipe.hidden)
        y = b("Add", y, positioned(b, recipe.positions, table, frame, (x, ids.dtype), mask))
    if recipe.types:
        y = b("Add", y, _types(b, recipe, x, tokens))
    return b.norm(y, recipe.hidden, recipe.style.fused_norm), frame


def _embedded(b: Nodes, recipe: Recipe, x: str, tokens: int | str, frame: Frame) -> tuple[str, Frame]:
    """com.microsoft.EmbedLayerNormalization: all look-ups, their norm, and how many tokens are real."""
    assert recipe.positions is not None
    width, typed, ids = recipe.hidden, recipe.types == "input", row_ids(b, recipe.ids, x)
    tables = [b.table(recipe.ids.words, width), b.table(recipe.positions.rows, width)]
    types = b.input("token_type_ids", recipe.ids.dtype, [BATCH, tokens]) if typed else ""
    gain, bias = b.constant(np.ones(width), np.float32, "gain"), b.constant(np.zeros(width), np.float32, "bias")
    mask = next((item for item in recipe.inputs if "mask" in item.name and item.shape == "bs"), None)
    places = "position_ids" if recipe.positions.kind == "given" else ""
    inputs = [ids, types, *tables, b.table(2, width) if typed else "", gain, bias]
    inputs += [b.cast(mask.name, "int32") if mask is not None else "", places]
    y, counts = b.several("EmbedLayerNormalization", 2, *trimmed(*inputs), domain=MICROSOFT, epsilon=1e-5)
    return y, frame if mask is None else replace(frame, counts=(mask.name, counts))


def _frame(b: Nodes, recipe: Recipe, x: str, past: bool) -> Frame:
    batch, count = b.size(x, 0), b.size(x, 1)
    q = b.range(count)
    if not past:
        return Frame(batch, count, count, q, q, given=recipe.inputs)
    for index in range(len(recipe.masks)):
        for part in ("key", "value"):
            b.input(f"past_{part}_{index}", "float32", [BATCH, recipe.heads // recipe.share, PAST, recipe.size])
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
        return attention(b, recipe, y, y, mask, frame, past)

    return _residual(b, recipe, x, attend)


def _residual(b: Nodes, recipe: Recipe, x: str, attend: Callable[[str], tuple[str, Applied]]) -> tuple[str, Applied]:
    """x + attention, and that + feed-forward layers, normalised before or after."""
    width, fused, early = recipe.hidden, recipe.style.fused_norm, recipe.style.pre_norm
    y, applied = attend(b.norm(x, width, fused) if early else x)
    x = b("Add", x, y) if early else _added(b, recipe, x, y)
    y = b.norm(x, width, fused) if early else x
    y = b.linear(_activated(b, recipe, b.linear(y, width, recipe.feed)), recipe.feed, width)
    return b("Add", y, x) if early else _added(b, recipe, y, x), applied


def _added(b: Nodes, recipe: Recipe, x: str, y: str) -> str:
    """The sum, normalised."""
    width = recipe.hidden
    if recipe.style.fused not in ("microsoft", "mha"):
        return b.norm(b("Add", x, y), width, recipe.style.fused_norm)
    gain = b.constant(1 + 0.1 * b.rng.standard_normal(width), np.float32, "gain")
    bias = b.constant(0.1 * b.rng.standard_normal(width), np.float32, "bias")
    return b("SkipLayerNormalization", x, y, gain, bias, domain=MICROSOFT, epsilon=1e-5)


def _activated(b: Nodes, recipe: Recipe, x: str) -> str:
    if recipe.style.fused not in ("microsoft", "mha") or recipe.style.gelu == "Relu":
        return b.gelu(x, recipe.style.gelu)
    bias = b.constant(0.1 * b.rng.standard_normal(recipe.feed), np.float32, "bias")
    return b("BiasGelu" if recipe.style.gelu == "erf" else "FastGelu", x, bias, domain=MICROSOFT)


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
    y, _ = _residual(b, recipe, y, lambda z: attention(b, recipe, z, z, mask, own))
    over = _padding_only(recipe) if recipe.decoder.masked else None
    across = Frame(own.batch, own.queries, frame.keys, own.q, frame.k, given=recipe.inputs)
    y, _ = _residual(b, recipe, y, lambda z: attention(b, recipe, z, states, over, across))
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
