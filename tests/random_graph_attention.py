"""Attention as exporters write it: in plain operators, or as one of onnxruntime's or of ONNX's fused operators."""

from __future__ import annotations

from collections.abc import Iterable
from math import e, sqrt

import numpy as np
from random_graph_masks import Applied, Frame, bias_of, kept, masked
from random_graph_nodes import Nodes
from random_graphs import Both, Causal, Keep, Mask, Padding, Recipe

MICROSOFT = "com.microsoft"


def attention(
    b: Nodes, recipe: Recipe, x: str, other: str, mask: Mask | None, frame: Frame, past: tuple[str, ...] = ()
) -> tuple[str, Applied]:
    """Of tokens x over tokens `other`, with its output layer; past: keys and values before them."""
    fused, inner = recipe.style.fused, recipe.heads * recipe.size
    if fused == "microsoft" and x == other and not past and recipe.factor.kind == "constant":
        y, applied = _packed(b, recipe, x, mask, frame)
    else:
        q, k, v = _projected(b, recipe, x, other)
        if fused == "mha" and not past and recipe.share == 1:
            y, applied = _multi_head(b, recipe, (q, k, v), mask, frame)
        elif fused == "onnx":
            y, applied = _onnx(b, recipe, (q, k, v), mask, frame, past)
        else:
            y, applied = _plain(b, recipe, (q, k, v), mask, frame, past)
    return b.linear(y, inner, recipe.hidden, gain=2.0), applied


def _projected(b: Nodes, recipe: Recipe, x: str, other: str) -> tuple[str, str, str]:
    inner = recipe.heads * recipe.size
    if recipe.style.merged and x == other and recipe.share == 1:
        q, k, v = b.split(b.linear(x, recipe.hidden, 3 * inner), 3, axis=2)
    else:
        fewer = inner // recipe.share
        q, k, v = (b.linear(y, recipe.hidden, n) for y, n in ((x, inner), (other, fewer), (other, fewer)))
    return q, k, v


# ---- in plain operators ------------------------------------------------------------------------------------------


def _plain(
    b: Nodes, recipe: Recipe, qkv: tuple[str, str, str], mask: Mask | None, frame: Frame, past: tuple[str, ...]
) -> tuple[str, Applied]:
    style, on, op = recipe.style, recipe.factor.on, recipe.factor.op
    factor = _factor(b, recipe, frame)
    q, k, v = qkv
    q, v = _split(b, recipe, q), _repeated(b, recipe, _joined(b, past[1:], _split(b, recipe, v)), frame)
    if past or recipe.share > 1 or style.keys == "twice":
        k = _repeated(b, recipe, _joined(b, past[:1], _split(b, recipe, k)), frame)
        k = b("Transpose", k, perm=[0, 1, 3, 2])
    else:
        k = _split(b, recipe, k, (0, 2, 3, 1))
    q = b(op, q, factor) if on in ("q", "both") else q
    k = b(op, k, factor) if on in ("k", "both") else k
    scores, applied = b("MatMul", q, k), Applied()
    if mask is not None and mask.early:
        scores, applied = masked(b, mask, scores, frame)
    if on == "scores":
        scores = b(op, scores, factor)
    if mask is not None and not mask.early:
        scores, applied = masked(b, mask, scores, frame)
    share = b("Softmax", scores, axis=-1 if style.keys == "once" or b.opset < 13 else 3)
    if style.guard:
        share = b("Where", b("IsNaN", share), b.real(0.0), share)
    return _merged(b, recipe, b("MatMul", share, v)), applied


def _split(b: Nodes, recipe: Recipe, x: str, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
    """[batch, tokens, heads * size] by heads."""
    y = b("Reshape", x, _sizes(b, recipe.style.shapes, x, (-1 if recipe.share > 1 else recipe.heads, recipe.size)))
    return b("Transpose", y, perm=list(perm))


def _merged(b: Nodes, recipe: Recipe, x: str) -> str:
    y = b("Transpose", x, perm=[0, 2, 1, 3])
    return b("Reshape", y, _sizes(b, recipe.style.shapes, y, (recipe.heads * recipe.size,)))


def _sizes(b: Nodes, style: str, x: str, last: tuple[int, ...]) -> str:
    """[batch, tokens, *last] as this style writes it."""
    if style == "computed":
        return b.shape(b.size(x, 0), b.size(x, 1), *last)
    return b.ints(0, -1 if style == "infer" and -1 not in last else 0, *last)


def _joined(b: Nodes, past: tuple[str, ...], x: str) -> str:
    return b("Concat", past[0], x, axis=2) if past else x


def _repeated(b: Nodes, recipe: Recipe, x: str, frame: Frame) -> str:
    """Each head of keys or values for all the queries that share it."""
    if recipe.share == 1:
        return x
    few = recipe.heads // recipe.share
    wide = b.shape(frame.batch, few, recipe.share, frame.keys, recipe.size)
    y = b("Expand", b.axes("Unsqueeze", x, 2), wide)
    return b("Reshape", y, b.shape(frame.batch, recipe.heads, frame.keys, recipe.size))


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


# ---- fused -------------------------------------------------------------------------------------------------------


def _packed(b: Nodes, recipe: Recipe, x: str, mask: Mask | None, frame: Frame) -> tuple[str, Applied]:
    """com.microsoft.Attention: projections, mask and all."""
    inner = recipe.heads * recipe.size
    weight = b.rng.standard_normal((recipe.hidden, 3 * inner)) / sqrt(recipe.hidden)
    bias = b.constant(b.rng.standard_normal(3 * inner) * 0.1, np.float32, "bias")
    padding, causal, added, applied = _parts(b, mask, frame)
    y = b("Attention", x, b.constant(weight, np.float32, "weight"), bias, *trimmed(padding, "", added),
          domain=MICROSOFT, num_heads=recipe.heads, unidirectional=int(causal), scale=recipe.size**-0.5,
          qkv_hidden_sizes=[inner] * 3)  # fmt: skip
    return y, applied


def _multi_head(
    b: Nodes, recipe: Recipe, qkv: tuple[str, str, str], mask: Mask | None, frame: Frame
) -> tuple[str, Applied]:
    """com.microsoft.MultiHeadAttention: the bias of q, k and v within."""
    inner = recipe.heads * recipe.size
    bias = b.constant(b.rng.standard_normal(3 * inner) * 0.1, np.float32, "bias")
    padding, causal, added, applied = _parts(b, mask, frame)
    y = b("MultiHeadAttention", _scaled(b, recipe, qkv[0], frame), *qkv[1:], *trimmed(bias, padding, added),
          domain=MICROSOFT, num_heads=recipe.heads, unidirectional=int(causal), scale=_scale(recipe))  # fmt: skip
    return y, applied


def _onnx(
    b: Nodes, recipe: Recipe, qkv: tuple[str, str, str], mask: Mask | None, frame: Frame, past: tuple[str, ...]
) -> tuple[str, Applied]:
    """ONNX's Attention of opset 23, over three dimensions, or over four with a cache. Masks are of full size:
    onnxruntime broadcasts them over batch and heads only."""
    terms = _terms(mask.keep if mask is not None else None)
    causal = next((term for term in terms if isinstance(term, Causal)), None) if frame.queries == frame.keys else None
    rest = _all(term for term in terms if term is not causal)
    added, applied = "", Applied()
    if mask is not None and mask.put in ("where", "fill") and rest is not None:
        added = b("Expand", kept(b, rest, frame), b.shape(frame.batch, 1, frame.queries, frame.keys))
        applied = Applied(keeps=(added,))
    elif mask is not None and (rest is not None or mask.soft):
        put = "soft" if mask.soft else "add" if mask.put == "apart" else mask.put
        added = bias_of(b, Mask(rest, put, mask.value, mask.soft, spread=True), frame)
        applied = Applied(biases=(added,))
    q, k, v = _scaled(b, recipe, qkv[0], frame), *qkv[1:]
    scale, only = _scale(recipe), int(causal is not None)
    if not past:
        return b("Attention", q, k, v, *trimmed(added), q_num_heads=recipe.heads,
                 kv_num_heads=recipe.heads // recipe.share, scale=scale, is_causal=only), applied  # fmt: skip
    q, k, v = (_split(b, recipe, x) for x in (q, k, v))
    k, v = _joined(b, past[:1], k), _joined(b, past[1:], v)
    y = b("Attention", q, k, v, *trimmed(added), scale=scale, is_causal=only)
    return _merged(b, recipe, y), applied


def _scale(recipe: Recipe) -> float:
    return recipe.size**-0.5 if recipe.factor.kind == "constant" else 1.0


def _scaled(b: Nodes, recipe: Recipe, q: str, frame: Frame) -> str:
    """Queries times a factor that no attribute can hold."""
    return q if recipe.factor.kind == "constant" else b(recipe.factor.op, q, _factor(b, recipe, frame))


def _parts(b: Nodes, mask: Mask | None, frame: Frame) -> tuple[str, bool, str, Applied]:
    """What onnxruntime's operators take: [batch, keys] of integers, causal or not, a bias of the scores."""
    if mask is None:
        return "", False, "", Applied()
    terms = _terms(mask.keep)
    flat = {item.name for item in frame.given if item.shape == "bs"}
    padding = next((term for term in terms if isinstance(term, Padding) and term.source in flat), None)
    causal = next((term for term in terms if isinstance(term, Causal)), None) if frame.queries == frame.keys else None
    soft = "" if padding is None and mask.soft in flat else mask.soft
    rest = _all(term for term in terms if term is not padding and term is not causal)
    source = padding.source if padding is not None else mask.soft if not soft else ""
    whole = frame.counts[1] if source and source == frame.counts[0] else b.cast(source, "int32") if source else ""
    seen = (whole,) if whole else ()
    if rest is None and not soft:
        return whole, causal is not None, "", Applied(counts=seen)
    put = "soft" if soft else "add" if mask.put == "soft" or isinstance(rest, Both) else mask.put
    put = "add" if put in ("where", "fill", "apart") else put
    added = bias_of(b, Mask(rest, put, mask.value, soft, spread=True), frame)
    return whole, causal is not None, added, Applied(biases=(added,), counts=seen)


def _terms(keep: Keep | None) -> list[Keep]:
    """What must all hold."""
    if keep is None:
        return []
    return [*_terms(keep.left), *_terms(keep.right)] if isinstance(keep, Both) else [keep]


def _all(terms: Iterable[Keep]) -> Keep | None:
    found: Keep | None = None
    for term in terms:
        found = term if found is None else Both(found, term)
    return found


def trimmed(*inputs: str) -> list[str]:
    """Optional inputs without the empty ones at the end."""
    given = list(inputs)
    while given and not given[-1]:
        given.pop()
    return given
