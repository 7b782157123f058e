"""ExpandFused: onnxruntime's fused operators and ONNX Attention, written out in plain operators again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.contract import Context, Pass, Report
from nmcompile.mask_form import build_mask
from nmcompile.masks import LOWEST, Mask

MICROSOFT = "com.microsoft"
# Inputs that each operator needs; onnx knows nothing of onnxruntime's, so nobody has checked them.
NEEDED = {"FusedMatMul": 2, "FusedGemm": 2, "BiasGelu": 2, "Gelu": 1, "FastGelu": 1, "QuickGelu": 1,
          "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3, "EmbedLayerNormalization": 1,
          "Attention": 2, "MultiHeadAttention": 1}  # fmt: skip
TYPES: dict[str, type | tuple[type, ...]] = {
    "num_heads": int, "q_num_heads": int, "kv_num_heads": int, "unidirectional": int, "is_causal": int,
    "do_rotary": int, "transA": int, "transB": int, "transBatchA": int, "transBatchB": int, "qkv_hidden_sizes": list,
    "epsilon": (int, float), "scale": (int, float), "alpha": (int, float), "beta": (int, float),
    "softcap": (int, float), "activation": str,
}  # fmt: skip


class Keep(Exception):
    """Why a fused node stays as it is."""


@dataclass(frozen=True)
class ExpandFused(Pass):
    """Decompose fused nodes, so that the matching passes see one set of operators.

    com.microsoft.SkipLayerNormalization(x, skip, gamma, beta)  ->  LayerNormalization(x + skip, gamma, beta)
    Attention(q, k, v, mask)                                    ->  Softmax(q k^T * scale + mask) v
    """

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: Context) -> Report:
        notes: list[str] = []
        changed = 0
        for node in list(graph.nodes):
            expand = EXPANSIONS.get((node.domain or "", node.op))
            if expand is None:
                if node.domain == MICROSOFT:
                    notes.append(f"{node.name}: {MICROSOFT}.{node.op} kept, it runs on onnxruntime")
                continue
            count = len(graph.nodes)
            try:
                _check(node)
                outputs = expand(Builder(graph, node.name), node)
            except Keep as reason:
                _undo(graph, count)
                notes.append(f"{node.name}: {node.op} kept, {reason}")
                continue
            for old, new in zip(list(node.outputs), outputs, strict=False):
                if new is not None:
                    g.rewire(graph, old, new)
            changed += 1
        if changed:
            g.cleanup(graph)
        return Report(changed=changed, notes=tuple(notes))


def _check(node: gs.Node) -> None:
    """Keep, unless the node has the inputs that its operator needs, and attributes of the types that it knows."""
    for index in range(NEEDED[node.op]):
        if _input(node, index) is None:
            raise Keep(f"its input {index} is missing")
    for name, value in node.attrs.items():
        known = TYPES.get(name, object)
        if name in TYPES and (not isinstance(value, known) or isinstance(value, onnx.AttributeProto)):
            raise Keep(f"its attribute {name} is of the wrong type")
        if (name.endswith("num_heads") and value < 1) or (name == "qkv_hidden_sizes" and min(value, default=0) < 1):
            raise Keep(f"its attribute {name} is {value}")


def _undo(graph: gs.Graph, count: int) -> None:
    """Take back the nodes that were built before the reason to keep a node was found."""
    for built in graph.nodes[count:]:
        built.inputs.clear()
        built.outputs.clear()
    del graph.nodes[count:]


def _input(node: gs.Node, index: int) -> gs.Tensor | None:
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def _used(graph: gs.Graph, y: gs.Tensor) -> bool:
    return bool(g.consumers(y)) or g.is_output(graph, y)


def _unused(b: Builder, node: gs.Node, first: int, end: int | None = None) -> None:
    for index, y in enumerate(node.outputs[first:end]):
        if not y.is_empty() and _used(b.graph, y):
            raise Keep(f"its output {first + index} is used")


def _like(x: gs.Tensor) -> dict[str, Any]:
    return {"dtype": x.dtype or np.float32}


def _transpose_last(b: Builder, x: gs.Tensor) -> gs.Tensor:
    value = g.constant(x)
    if value is not None:
        axes = list(range(value.ndim))
        return b.derived(x, "transposed", g.Transpose((*axes[:-2], axes[-1], axes[-2])))
    rank = len(x.shape) if x.shape is not None else 4
    return b("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2], **_like(x))


def _fused_matmul(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        raise Keep("it transposes batches")
    a, w = node.inputs[:2]
    a = _transpose_last(b, a) if node.attrs.get("transA", 0) else a
    w = _transpose_last(b, w) if node.attrs.get("transB", 0) else w
    y = b("MatMul", a, w, **_like(a))
    alpha = float(node.attrs.get("alpha", 1.0))
    return [y if alpha == 1.0 else b("Mul", y, b.scalar(alpha, a.dtype or np.float32), **_like(a))]


def _fused_gemm(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    activation = str(node.attrs.get("activation", ""))
    if activation not in ("Tanh", "Relu", "Sigmoid"):
        raise Keep(f"its activation is {activation or 'missing'}")
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    return [b(activation, b("Gemm", *node.inputs, **attrs))]


def _bias_gelu(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    x, bias = node.inputs[0], _input(node, 1)
    if b.graph.opset < 20:
        raise Keep(f"Gelu needs opset 20, the graph has {b.graph.opset}")
    approximate = "tanh" if node.op == "FastGelu" else "none"
    if bias is not None:
        x = b("Add", x, bias, **_like(x), shape=x.shape)
    return [b("Gelu", x, approximate=approximate, **_like(x), shape=x.shape)]


def _quick_gelu(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    x = node.inputs[0]
    alpha = b.scalar(float(node.attrs.get("alpha", 1.702)))
    return [b("Mul", x, b("Sigmoid", b("Mul", x, alpha)))]


def _skip_layer_norm(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    _unused(b, node, 1, 3)
    rms = "Simplified" in node.op
    x, skip, gamma = node.inputs[:3]
    beta = None if rms else _input(node, 3)
    bias = _input(node, 3 if rms else 4)
    if bias is not None:
        x = b("Add", x, bias, **_like(x))
    total = b("Add", x, skip, **_like(x))
    y = _norm(b, total, gamma, beta, float(node.attrs.get("epsilon", 1e-12)), rms)
    return [y, None, None, total]


def _norm(b: Builder, x: gs.Tensor, gamma: gs.Tensor, beta: gs.Tensor | None, eps: float, rms: bool) -> gs.Tensor:
    op, needed = ("RMSNormalization", 23) if rms else ("LayerNormalization", 17)
    if b.graph.opset < needed:
        raise Keep(f"{op} needs opset {needed}, the graph has {b.graph.opset}")
    if rms:
        return b("RMSNormalization", x, gamma, axis=-1, epsilon=eps, **_like(x))
    if beta is None:
        value = g.constant(gamma)
        if value is None:
            raise Keep("its scale is not constant")
        beta = b.constant(np.zeros_like(value), "beta")
    return b("LayerNormalization", x, gamma, beta, axis=-1, epsilon=eps, **_like(x))


def _embed(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    ids, types, words, positions, segments, gamma, beta = (_input(node, i) for i in range(7))
    if ids is None or words is None or positions is None or gamma is None:
        raise Keep("an embedding table is missing")
    given, mask = _input(node, 8), _input(node, 7)
    index = node.outputs[1] if len(node.outputs) > 1 and not node.outputs[1].is_empty() else None
    if index is not None and mask is None and _used(b.graph, index):
        raise Keep("its count of tokens is used, and it has no mask")
    shape = b("Shape", ids, dtype=np.int64)
    length = b("Gather", shape, b.scalar(1, np.int64), dtype=np.int64, axis=0)
    where = given or b("Range", b.scalar(0, np.int64), length, b.scalar(1, np.int64), dtype=np.int64)
    total = b("Add", b("Gather", words, ids, axis=0), b("Gather", positions, where, axis=0))
    if segments is not None and types is not None:
        total = b("Add", total, b("Gather", segments, types, axis=0))
    count = None  # of the ones in each row of the mask
    if mask is not None and index is not None:
        ones = b("Cast", b("Equal", mask, b.scalar(1, np.dtype(mask.dtype)), dtype=bool), dtype=np.int32, to=6)
        count = b("ReduceSum", ones, b.ints(1), dtype=np.int32, keepdims=0)
    return [_norm(b, total, gamma, beta, float(node.attrs.get("epsilon", 1e-12)), False), count, total]


def _microsoft_attention(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    _unused(b, node, 1)
    if any(_input(node, i) is not None for i in (4, 6)) or node.attrs.get("do_rotary", 0):
        raise Keep("it uses past keys or rotary embeddings")
    x, weight, bias, mask = node.inputs[0], g.constant(node.inputs[1]), _input(node, 2), _input(node, 3)
    offsets = g.constant(bias) if bias is not None else None
    if weight is None or (bias is not None and offsets is None):
        raise Keep("its weights are not constant")
    heads = _heads(node, "num_heads")
    if weight.ndim != 2:
        raise Keep(f"its weight has {weight.ndim} dimensions")
    sizes = list(node.attrs.get("qkv_hidden_sizes", [])) or [weight.shape[1] // 3] * 3
    if len(sizes) != 3 or sum(sizes) != weight.shape[1] or any(size % heads or not size for size in sizes) or (
            offsets is not None and offsets.shape != (sum(sizes),)):  # fmt: skip
        raise Keep(f"its sizes {sizes}, {heads} heads and weight {list(weight.shape)} do not fit")
    parts, start = [], 0
    for size in sizes:
        y = b("MatMul", x, b.derived(node.inputs[1], "weight", g.Slice(1, start, start + size)), **_like(x))
        if bias is not None:
            y = b("Add", y, b.derived(bias, "bias", g.Slice(0, start, start + size)), **_like(x))
        parts.append(y)
        start += size
    scale = float(node.attrs.get("scale", 0) or (sizes[0] // heads) ** -0.5)
    causal = bool(node.attrs.get("unidirectional", 0))
    return [_attend(b, parts, _Plain(heads, sizes, scale, _padding(node, mask), causal, _input(node, 5)))]


def _multi_head(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    _unused(b, node, 1)
    if any(_input(node, i) is not None for i in (6, 7, 8, 9)):
        raise Keep("it uses past keys")
    q, k, v = (_input(node, i) for i in range(3))
    if q is None or k is None or v is None or any(len(t.shape or []) != 3 for t in (q, k, v)):
        raise Keep("its inputs are packed")
    parts = [q, k, v]
    heads = _heads(node, "num_heads")
    if any(not isinstance(t.shape[-1], int) or t.shape[-1] % heads or not t.shape[-1] for t in parts):
        raise Keep(f"its inputs do not divide into {heads} heads")
    sizes = [int(t.shape[-1]) for t in parts]
    bias = _input(node, 3)
    offsets = g.constant(bias) if bias is not None else None
    if bias is not None and offsets is not None:
        if offsets.shape != (sum(sizes),):
            raise Keep(f"its bias of shape {list(offsets.shape)} does not fit")
        bounds = np.cumsum([0, *sizes])
        parts = [b("Add", t, b.derived(bias, "bias", g.Slice(0, int(s), int(e))), shape=t.shape)
                 for t, s, e in zip(parts, bounds[:-1], bounds[1:], strict=True)]  # fmt: skip
    elif bias is not None:
        raise Keep("its bias is not constant")
    scale = float(node.attrs.get("scale", 0) or (sizes[0] // heads) ** -0.5)
    causal = bool(node.attrs.get("unidirectional", 0))
    return [_attend(b, parts, _Plain(heads, sizes, scale, _padding(node, _input(node, 4)), causal, _input(node, 5)))]


def _heads(node: gs.Node, name: str) -> int:
    if name not in node.attrs:
        raise Keep(f"its attribute {name} is missing")
    return int(node.attrs[name])


def _padding(node: gs.Node, mask: gs.Tensor | None) -> Mask:
    """As onnxruntime computes it: keys are seen where the mask is above 0, others have a number added.

    A mask [batch] is the number of keys that are seen, from the first.
    """
    lowest = float(node.attrs.get("mask_filter_value", -10000.0))
    total = g.producer(mask) if mask is not None else None
    if total is not None and total.op == "ReduceSum":  # what an embedding has counted
        ones = g.producer(total.inputs[0])
        equal = g.producer(ones.inputs[0]) if ones is not None and ones.op == "Cast" else None
        if equal is not None and equal.op == "Equal":
            return Mask(equal.inputs[0], test="count", lowest=lowest)
    if mask is not None and (mask.shape is None or len(mask.shape) != 2):
        raise Keep(f"its mask has {len(mask.shape or [])} dimensions")
    return Mask(mask, test="positive", lowest=lowest)


def _onnx_attention(b: Builder, node: gs.Node) -> list[gs.Tensor | None]:
    _unused(b, node, 1)
    if any(_input(node, i) is None for i in range(3)):
        raise Keep("one of its queries, keys and values is missing")
    if any(_input(node, i) is not None for i in (4, 5, 6)) or float(node.attrs.get("softcap", 0.0)):
        raise Keep("it uses past keys or a soft cap")
    q, k, v = node.inputs[:3]
    rank = len(q.shape) if q.shape is not None else 0
    known = (t.shape is not None and len(t.shape) == rank and isinstance(t.shape[-1], int) for t in (q, k, v))
    if rank not in (3, 4) or not all(known):
        raise Keep("the shapes of its inputs are not known, or not of one rank")
    if (rank == 3 and "q_num_heads" not in node.attrs) or (
            rank == 4 and not all(isinstance(t.shape[1], int) and t.shape[1] > 0 for t in (q, k, v))):  # fmt: skip
        raise Keep("its heads are not known")
    heads = int(node.attrs.get("q_num_heads", 0) or q.shape[1])
    shared = int(node.attrs.get("kv_num_heads", 0) or k.shape[1])
    if heads != shared:
        raise Keep("groups of heads share their keys")
    sizes = [int(t.shape[-1]) * (heads if rank == 4 else 1) for t in (q, k, v)]
    if any(size % heads or not size for size in sizes):
        raise Keep(f"its inputs do not divide into {heads} heads")
    scale = float(node.attrs.get("scale", 0) or (sizes[0] // heads) ** -0.5)
    bias, causal = _input(node, 3), bool(node.attrs.get("is_causal", 0))
    # onnxruntime gives 0 for a query of which every key is hidden, by the lowest float too
    endless = b.scalar(float("-inf"))
    if bias is not None and bias.dtype == bool:
        bias = b("Where", bias, b.scalar(0.0), endless)
    elif bias is not None:
        bias = b("Where", b("LessOrEqual", bias, b.scalar(LOWEST), dtype=bool), endless, bias)
    mask = Mask(lowest=float("-inf"))
    return [_attend(b, [q, k, v], _Plain(heads, sizes, scale, mask, causal, bias, bias is not None))]


@dataclass(frozen=True)
class _Plain:
    """Attention written out. sizes: features of q, k and v, all heads together. bias: added to the scores before the
    mask is. guarded: queries of which every key is hidden by -inf get 0."""

    heads: int
    sizes: Sequence[int]
    scale: float
    mask: Mask
    causal: bool
    bias: gs.Tensor | None
    guarded: bool = False


def _attend(b: Builder, qkv: Sequence[gs.Tensor], form: _Plain) -> gs.Tensor:
    """Attention over [batch, tokens, heads * size] or [batch, heads, tokens, size] tensors."""
    split = qkv[0].shape is not None and len(qkv[0].shape) == 4
    if split and form.causal:
        raise Keep("a causal mask over four dimensions")
    parts = []
    for tensor, size in zip(qkv, form.sizes, strict=True):
        if split:
            parts.append(tensor)
        else:
            by_head = b("Reshape", tensor, b.ints(0, 0, form.heads, size // form.heads))
            parts.append(b("Transpose", by_head, perm=[0, 2, 1, 3]))
    scores = b("MatMul", parts[0], b("Transpose", parts[1], perm=[0, 1, 3, 2]))
    scores = b("Mul", scores, b.scalar(form.scale))
    triangle = LOWEST if form.causal and form.mask.padding is not None else None
    whole = replace(form.mask, causal=form.causal, triangle=triangle)
    for extra in (form.bias, build_mask(b, whole, qkv[0])):
        if extra is not None:
            scores = b("Add", scores, extra)
    probabilities = b("Softmax", scores, axis=-1)
    if form.guarded:
        probabilities = b("Where", b("IsNaN", probabilities, dtype=bool), b.scalar(0.0), probabilities)
    context = b("MatMul", probabilities, parts[2])
    if split:
        return context
    return b("Reshape", b("Transpose", context, perm=[0, 2, 1, 3]), b.ints(0, 0, form.sizes[2]))


Expansion = Callable[[Builder, gs.Node], "list[gs.Tensor | None]"]
EXPANSIONS: dict[tuple[str, str], Expansion] = {
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "FusedGemm"): _fused_gemm,
    (MICROSOFT, "BiasGelu"): _bias_gelu,
    (MICROSOFT, "Gelu"): _bias_gelu,
    (MICROSOFT, "FastGelu"): _bias_gelu,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
    (MICROSOFT, "SkipLayerNormalization"): _skip_layer_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_layer_norm,
    (MICROSOFT, "EmbedLayerNormalization"): _embed,
    (MICROSOFT, "Attention"): _microsoft_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
    ("", "Attention"): _onnx_attention,
}
