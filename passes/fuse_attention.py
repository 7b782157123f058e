"""FuseAttention: bring every self-attention to the canonical form, matched by what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import probe
from nmcompile.builder import Builder
from nmcompile.canonical import Attention, attentions, build_attention
from nmcompile.contract import DERIVATION, Context, Pass, Report
from nmcompile.derive import Derivation, Underived
from nmcompile.errors import NmcompileError
from nmcompile.mask_form import build_mask, is_built
from nmcompile.masks import Mask, read_scores
from nmcompile.operands import Miss, Operand, merged_below, read_operand

BETWEEN = {"Add", "Mul", "Div", "Where", "Cast", "Identity", "Sub"}
DRAWS = (0, 1)
Masks: TypeAlias = "dict[tuple[object, ...], gs.Tensor | None]"  # built so far, by what they are


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Rewrite self-attention in its canonical decomposed form, with a canonical mask.

    Softmax(MatMul(q, k^T) * s + <mask sub-graph>), MatMul(., v)
        ->  the same over Reshape/Transpose by heads, mask = Where(keep, 0, lowest)

    The operands' layout, the scale and the mask are derived from the sub-graph (nmcompile.derive), so merged
    projections, exporters' mask arithmetic and scaled q and k all match, and what is derived holds at every length. Two
    runs are a second opinion. Rotary embeddings and learned position biases do not match.
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (DERIVATION,)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        softmaxes = [node for node in graph.nodes if node.op == "Softmax"]
        known = {item.name: item for item in attentions(graph, context.shapes)} if softmaxes else {}
        roots = [node for node in softmaxes if node.name not in known]
        done = len(softmaxes) - len(roots)
        masks: Masks = {}
        spelt = sum(_spell_mask(graph, item, masks) for item in known.values())
        if spelt:
            g.cleanup(graph)
        if not roots:
            return Report(changed=spelt, detail={"matched": f"{done}/{done}"} if done else {})
        d = context.derive(graph)
        notes: list[str] = []
        found: list[tuple[gs.Node, _Found]] = []
        attention = 0
        for root in roots:
            try:
                found.append((root, _find(graph, d, root)))
            except (Miss, Underived, NmcompileError) as miss:
                if not str(miss):
                    continue
                notes.append(f"{root.name}: attention not matched, {miss}")
            attention += 1
        for root, item in found:
            _replace(graph, root, item, masks)
        if found:
            g.cleanup(graph)
        detail = {"matched": f"{len(found) + done}/{attention + done}"} if attention + done else {}
        return Report(changed=len(found) + spelt, detail=detail, notes=tuple(notes))


@dataclass(frozen=True)
class _Found:
    q: Operand
    k: Operand
    v: Operand
    y: gs.Tensor
    scale: float
    mask: Mask
    guarded: bool


def _find(graph: gs.Graph, d: Derivation, root: gs.Node) -> _Found:
    product = _product_above(root)
    context, guarded = _context_below(root)
    q, k, v = (read_operand(d, t, keys) for t, keys in zip(
        (product.inputs[0], product.inputs[1], context.inputs[1]), (False, True, False), strict=True))  # fmt: skip
    lead = d.value(q.source).shape[:2]
    if d.value(k.source).shape[:2] != lead or d.value(v.source).shape[:2] != lead:
        raise Miss("queries and keys come from different sequences (cross-attention)")
    if q.features.shape != k.features.shape or v.features.shape != q.features.shape:
        raise Miss(f"heads differ: q {q.features.shape}, k {k.features.shape}, v {v.features.shape}")
    if v.scale != 1.0:
        raise Miss("its values are scaled")
    scale, mask = read_scores(d, root.inputs[0], product.outputs[0].name)
    y = merged_below(d, context, *q.features.shape)
    found = _Found(q, k, v, y, scale * q.scale * k.scale, mask, guarded and mask.lowest == float("-inf"))
    _agrees(graph, found)
    return found


def _product_above(root: gs.Node) -> gs.Node:
    """The q k^T product that the scores come from; a Miss without a reason where the softmax is over no keys."""
    why = "is not over the last of four axes"
    if root.attrs.get("axis", -1) in (-1, 3):
        tensor = root.inputs[0]
        for _ in range(8):
            node = g.producer(tensor)
            if node is None:
                why = f"is over {tensor.name}"
                break
            why = _made_by(node)
            if node.op == "MatMul":
                if not any(g.constant(x) is not None for x in node.inputs) and len(node.outputs[0].shape or []) == 4:
                    return node
                break
            if node.op not in BETWEEN:
                break
            paths = [x for x in node.inputs if g.constant(x) is None and len(x.shape or []) == 4]
            following = next((x for x in paths if _leads_to_product(x)), None)
            if following is None:
                makers = [maker for maker in map(g.producer, paths) if maker is not None and maker.op not in BETWEEN]
                why = _made_by(makers[0]) if makers else why
                break
            tensor = following
    raise Miss(f"its softmax {why}" if _weighs(root.outputs[0]) else "")


def _made_by(node: gs.Node) -> str:
    return f"is over scores made by {node.op} '{node.name}', no product of queries and keys by heads"


def _weighs(probabilities: gs.Tensor, depth: int = 6) -> bool:
    """Whether what a softmax gives is multiplied by a computed matrix, as attention's values are."""
    for user in g.consumers(probabilities) if depth else []:
        if user.op == "MatMul" and user.inputs[0] is probabilities and g.constant(user.inputs[1]) is None:
            maker = g.producer(user.inputs[1])
            return maker is None or maker.op != "DequantizeLinear" or g.constant(maker.inputs[0]) is None
        passed_on = user.op in ("Where", "Cast", "Identity", "Dropout", "Reshape", "Transpose")
        if passed_on and _weighs(user.outputs[0], depth - 1):
            return True
    return False


def _leads_to_product(tensor: gs.Tensor) -> bool:
    for _ in range(8):
        node = g.producer(tensor)
        if node is None:
            return False
        if node.op == "MatMul":
            return True
        if node.op not in BETWEEN:
            return False
        paths = [x for x in node.inputs if g.constant(x) is None and len(x.shape or []) == 4]
        if not paths:
            return False
        if len(paths) > 1:
            return any(_leads_to_product(x) for x in paths)
        tensor = paths[0]
    return False


def _context_below(root: gs.Node) -> tuple[gs.Node, bool]:
    """(the product of the softmax with the values, whether rows of NaN become 0 before it)"""
    tensor, guarded = root.outputs[0], False
    for _ in range(5):
        users = [node for node in g.consumers(tensor) if node.op != "IsNaN"]
        if len(users) != 1:
            raise Miss("the softmax has several consumers" if users else "the softmax feeds nothing")
        if users[0].op == "MatMul" and users[0].inputs[0] is tensor:
            return users[0], guarded
        if users[0].op == "Where" and _guards(users[0], tensor):
            guarded = True
        elif users[0].op not in ("Cast", "Identity", "Dropout"):
            raise Miss(f"the softmax feeds a {users[0].op}")
        tensor = users[0].outputs[0]
    raise Miss("no product with the values follows the softmax")


def _guards(where: gs.Node, tensor: gs.Tensor) -> bool:
    """Where(IsNaN(tensor), 0, tensor)"""
    test, instead = g.producer(where.inputs[0]), g.constant(where.inputs[1])
    return (test is not None and test.op == "IsNaN" and test.inputs[0] is tensor and where.inputs[2] is tensor
            and instead is not None and not instead.any())  # fmt: skip


# ---- a second opinion ----------------------------------------------------------------------------------------


def _agrees(graph: gs.Graph, found: _Found) -> None:
    """Run what was matched next to softmax(q k^T + mask) v in numpy; Miss where they differ.

    A graph that cannot be run on made-up inputs is taken as it was derived.
    """
    for draw in DRAWS:
        feeds = probe.binary_feeds(graph, draw)
        sizes = probe.free_sizes(g.inputs(graph), draw)
        rng = np.random.default_rng(draw)
        cut = {t.source.name: t.source for t in (found.q, found.k, found.v)}
        for name, tensor in cut.items():
            shape = probe.concrete(tensor.shape, sizes)
            if shape is None:
                return
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
        try:
            value = probe.evaluate(graph, [found.y.name], feeds, tuple(cut))[found.y.name]
        except NmcompileError:
            return
        reference = _reference(feeds, found)
        if value.size != reference.size or not np.allclose(value.reshape(reference.shape), reference, atol=1e-3):
            raise Miss(f"a run at {sizes} disagrees with its derivation: {found.mask}, scale {found.scale:g}")


def _reference(feeds: probe.Feeds, found: _Found) -> np.ndarray:
    """softmax(q k^T) v in numpy, merged by heads: [batch, tokens, width]."""
    parts = [feeds[t.source.name].astype(np.float64)[..., t.features] for t in (found.q, found.k, found.v)]
    scores = np.einsum("bqhd,bkhd->bhqk", parts[0], parts[1]) * found.scale  # parts are [b, t, heads, size]
    keep = np.ones(scores.shape, bool)
    if found.mask.padding is not None:
        keep &= found.mask.shows(feeds[found.mask.padding.name])[:, None, None, :]
    if found.mask.causal:
        keep &= np.tril(np.ones(scores.shape[2:], bool))
    scores = np.where(keep, scores, -np.inf)
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", probabilities, parts[2])
    return np.asarray(y.reshape(*y.shape[:2], -1))


def _mask(graph: gs.Graph, mask: Mask, source: gs.Tensor, masks: Masks) -> gs.Tensor | None:
    like = source if mask.padding is None else mask.padding  # an input, rather
    length = like.shape[1] if like.shape is not None and len(like.shape) > 1 else None
    key = (*mask.key, length or like.name)  # a triangle is as long as its tokens
    if key not in masks:
        masks[key] = build_mask(Builder(graph, "mask"), mask, like)
    return masks[key]


def _spell_mask(graph: gs.Graph, item: Attention, masks: Masks) -> int:
    """Write the mask of an attention that is canonical but for that."""
    if item.biased is None or is_built(item.biased.inputs[1], item.mask):
        return 0
    mask = _mask(graph, item.mask, item.q, masks)
    if mask is None:  # it adds nothing: 0 is as good as any spelling
        return 0
    item.biased.inputs[1] = mask
    return 1


def _replace(graph: gs.Graph, root: gs.Node, found: _Found, masks: Masks) -> None:
    stem = root.name.rsplit("/", 1)[0] or root.name
    b = Builder(graph, stem)
    q, k, v = (_project(graph, getattr(found, part), stem, part) for part in "qkv")
    bias = _mask(graph, found.mask, found.q.source, masks)
    y = build_attention(b, q, k, v, found.q.features.shape[0], found.scale, bias, found.guarded)
    if len(found.y.shape) == 2:
        y = b("Reshape", y, b.ints(-1, int(found.y.shape[-1])), shape=found.y.shape)
    g.rewire(graph, found.y, y)


def _project(graph: gs.Graph, operand: Operand, stem: str, part: str) -> gs.Tensor:
    """The operand's source, or a linear layer of just its features when the source holds more than them."""
    if operand.whole:
        return operand.source
    layer = next((item for item in g.linear_layers(graph) if item.y.name == operand.source.name), None)
    order = operand.features.reshape(-1)
    b = Builder(graph, f"{stem}/{part}")
    shape = [*operand.source.shape[:2], len(order)]
    if layer is None or layer.quantized:
        return b("Gather", operand.source, b.constant(order, "features"), axis=-1, shape=shape)
    places = tuple(int(place) for place in order)
    weight = b.derived(layer.node.inputs[1], "weight", g.Take(1, places))
    y = b("MatMul", layer.x, weight, shape=shape)
    offsets = g.bias_of(layer)
    if offsets is None:
        return y
    bias = b.derived(offsets, "bias", g.Take(0, places), g.Cast("float32"), g.Cast(weight.dtype.name))
    return b("Add", y, bias, shape=shape)
