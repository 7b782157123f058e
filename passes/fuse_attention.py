"""FuseAttention: bring every self-attention to the canonical form, matched by what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile import probe
from nmcompile.canonical import Builder, Mask, build_attention, build_mask, match_attention
from nmcompile.errors import NmcompileError
from nmcompile.pipeline import Pass, Report

# Operators that move or scale values without mixing them: what may stand between a projection and its scores.
CARRY = {"Reshape", "Transpose", "Mul", "Div", "Unsqueeze", "Squeeze", "Identity", "Cast", "Split", "Slice", "Gather",
         "Expand", "Tile"}  # fmt: skip
BETWEEN = {"Add", "Mul", "Div", "Where", "Cast", "Identity", "Sub"}
MASKED = -5e3  # a score below this hides its key: exporters add -10000 or the lowest float
DRAWS = (0, 1)


class Miss(Exception):
    """Why a Softmax is not the middle of a self-attention that we know."""


@dataclass(frozen=True)
class Operand:
    """q, k or v, [batch, heads, tokens, size]: `scale * source[..., features]`, one feature per (head, size)."""

    source: gs.Tensor
    features: np.ndarray  # [heads, size]
    scale: float

    @property
    def whole(self) -> bool:
        """The operand is its source split by heads, nothing left out and nothing moved."""
        width = self.source.shape[-1]
        return self.features.size == width and bool((self.features.reshape(-1) == np.arange(width)).all())


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Rewrite self-attention in its canonical decomposed form, with a canonical mask.

    Softmax(MatMul(q, k^T) * s + <mask sub-graph>), MatMul(., v)
        ->  the same over Reshape/Transpose by heads, mask = Where(keep, 0, lowest)

    The operands' layout, the scale and the mask are read off runs of the sub-graph on odd sizes, so merged projections,
    exporters' mask arithmetic and scaled q and k all match. Rotary embeddings and learned position biases do not.
    """

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph) -> Report:
        roots = [node for node in graph.nodes if node.op == "Softmax" and match_attention(node) is None]
        done = sum(node.op == "Softmax" for node in graph.nodes) - len(roots)
        if not roots:
            return Report(detail={"matched": f"{done}/{done}"} if done else {})
        reason = probe.annotate(graph)
        if reason is not None:
            return Report(detail={"matched": f"{done}/{done + len(roots)}"},
                          notes=(f"attention not matched, the graph could not be run: {reason}",))  # fmt: skip
        notes: list[str] = []
        masks: dict[str, gs.Tensor | None] = {}
        fused = attention = 0
        for root in roots:
            try:
                found = _find(graph, root)
            except Miss as miss:
                if str(miss):
                    attention += 1
                    notes.append(f"{root.name}: attention not matched, {miss}")
                continue
            except NmcompileError as error:
                attention += 1
                notes.append(f"{root.name}: attention not matched, its sub-graph does not run alone: {error}")
                continue
            attention += 1
            fused += 1
            _replace(graph, root, found, masks)
        if fused:
            g.cleanup(graph)
        detail = {"matched": f"{fused + done}/{attention + done}"} if attention + done else {}
        return Report(changed=fused, detail=detail, notes=tuple(notes))


@dataclass(frozen=True)
class _Found:
    q: Operand
    k: Operand
    v: Operand
    y: gs.Tensor
    scale: float
    mask: Mask


def _find(graph: gs.Graph, root: gs.Node) -> _Found:
    product = _product_above(root)
    context = _context_below(root)
    qh, kh, vh = product.inputs[0], product.inputs[1], context.inputs[1]
    q, k, v = (_operand(graph, t, keys) for t, keys in ((qh, False), (kh, True), (vh, False)))
    if k.source.shape[:2] != q.source.shape[:2] or v.source.shape[:2] != q.source.shape[:2]:
        raise Miss("queries and keys come from different sequences (cross-attention)")
    if q.features.shape != k.features.shape or v.features.shape != q.features.shape:
        raise Miss(f"heads differ: q {q.features.shape}, k {k.features.shape}, v {v.features.shape}")
    if v.scale != 1.0:
        raise Miss("its values are scaled")
    ys = _merged_below(context, q.features.size)
    scale, mask = None, None
    for draw in DRAWS:
        feeds = probe.binary_feeds(graph, draw)
        sizes = probe.free_sizes(g.inputs(graph), draw)
        rng = np.random.default_rng(draw)
        cut = {t.source.name: t.source for t in (q, k, v)}
        for name, tensor in cut.items():
            shape = probe.concrete(tensor.shape, sizes)
            if shape is None:
                raise Miss(f"the shape of {name} is not known")
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
        names = [product.outputs[0].name, root.inputs[0].name, *(y.name for y in ys)]
        values = probe.evaluate(graph, list(dict.fromkeys(names)), feeds, tuple(cut))
        factor, keep = _scores(values[product.outputs[0].name], values[root.inputs[0].name])
        mask = _explain(graph, keep, feeds, mask)
        if scale is not None and not np.isclose(factor, scale, rtol=1e-3):
            raise Miss("its scale changes with the sequence")
        scale = factor if scale is None else scale
        ys = _agreeing(ys, values, _reference(feeds, q, k, v, factor, keep))
        if not ys:
            raise Miss("what follows the softmax is not softmax(q k) v merged by heads")
    assert scale is not None and mask is not None
    others = probe.read(graph, root.inputs[0], cut) - {mask.padding.name if mask.padding is not None else ""}
    if others:  # in the runs it looked like `mask`, with other values it may not
        raise Miss(f"its mask is computed from {', '.join(sorted(others))}, and not as padding over [batch, tokens]")
    return _Found(q, k, v, ys[0], scale * q.scale * k.scale, mask)


def _product_above(root: gs.Node) -> gs.Node:
    """The q k^T product that the scores come from."""
    if root.attrs.get("axis", -1) not in (-1, 3):
        raise Miss("")
    tensor = root.inputs[0]
    for _ in range(8):
        node = g.producer(tensor)
        if node is None:
            raise Miss("")
        if node.op == "MatMul":
            if any(g.constant(x) is not None for x in node.inputs) or len(node.outputs[0].shape or []) != 4:
                raise Miss("")  # a softmax over class scores, not over keys
            return node
        if node.op not in BETWEEN:
            raise Miss("")
        paths = [x for x in node.inputs if g.constant(x) is None and len(x.shape or []) == 4]
        tensor = next((x for x in paths if _leads_to_product(x)), None)
        if tensor is None:
            raise Miss("")
    raise Miss("")


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


def _context_below(root: gs.Node) -> gs.Node:
    """The product of the softmax with the values, past guards against NaN and casts."""
    tensor = root.outputs[0]
    for _ in range(5):
        users = [node for node in g.consumers(tensor) if node.op != "IsNaN"]
        if len(users) != 1:
            raise Miss("the softmax has several consumers" if users else "the softmax feeds nothing")
        if users[0].op == "MatMul" and users[0].inputs[0] is tensor:
            return users[0]
        if users[0].op not in ("Where", "Cast", "Identity", "Dropout"):
            raise Miss(f"the softmax feeds a {users[0].op}")
        tensor = users[0].outputs[0]
    raise Miss("no product with the values follows the softmax")


def _operand(graph: gs.Graph, tensor: gs.Tensor, keys: bool) -> Operand:
    """Where a [batch, heads, tokens, size] operand (keys: [.., size, tokens]) comes from."""
    if tensor.shape is None or len(tensor.shape) != 4:
        raise Miss(f"{tensor.name} has not four dimensions")
    batch, heads = tensor.shape[0], tensor.shape[1]
    tokens, size = (tensor.shape[3], tensor.shape[2]) if keys else (tensor.shape[2], tensor.shape[3])
    if not isinstance(heads, int) or not isinstance(size, int):
        raise Miss(f"the heads of {tensor.name} are not known, its shape is {tensor.shape}")
    source: gs.Tensor | None = tensor
    for _ in range(14):
        node = g.producer(source) if source is not None else None
        if node is None or node.op not in CARRY:
            break
        source = next((x for x in node.inputs if g.constant(x) is None), None)
        if source is None or source.shape is None or len(source.shape) != 3:
            continue
        if list(source.shape[:2]) == [batch, tokens] and isinstance(source.shape[2], int):
            found = _features(graph, source, tensor, keys)
            if found is not None and found.features.shape == (heads, size):
                return found
    raise Miss(f"{tensor.name} is not a projection split by heads (rotary embeddings are not supported yet)")


def _features(graph: gs.Graph, source: gs.Tensor, tensor: gs.Tensor, keys: bool) -> Operand | None:
    """Trace features: with ones the operand shows its scale, with 1, 2, 3, ... which feature each place holds."""
    feeds = probe.binary_feeds(graph, 0)
    shape = probe.concrete(source.shape, probe.free_sizes(g.inputs(graph), 0))
    if shape is None:
        return None
    results = []
    for row in (np.ones(shape[2]), np.arange(1.0, shape[2] + 1)):
        feeds[source.name] = np.broadcast_to(row, shape).astype(np.float32)
        value = probe.evaluate(graph, [tensor.name], feeds, (source.name,))[tensor.name].astype(np.float64)
        results.append(value.swapaxes(2, 3) if keys else value)  # [batch, heads, tokens, size]
    ones, counted = results
    scale = float(ones.flat[0])
    if scale == 0 or not np.allclose(ones, scale, rtol=1e-4):
        return None
    traced = counted / scale - 1
    features = np.rint(traced[0, :, 0, :]).astype(np.int64)
    if not np.allclose(traced, features[None, :, None, :], atol=1e-2) or features.min() < 0:
        return None
    return Operand(source, features, 1.0 if np.isclose(scale, 1.0, rtol=1e-6) else scale)


def _scores(product: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """The factor between q k^T and the softmax's input where keys are seen, and which keys are seen."""
    keep = np.isfinite(scores) & (scores > MASKED)
    if not keep.any():
        raise Miss("every key is masked")
    a, b = product[keep].astype(np.float64), scores[keep].astype(np.float64)
    factor = float(a @ b / (a @ a))
    if not np.allclose(b, factor * a, atol=1e-3 * float(np.abs(b).max() + 1e-6)):
        raise Miss("a bias other than a mask is added to its scores (relative positions)")
    return factor, keep


def _explain(graph: gs.Graph, keep: np.ndarray, feeds: probe.Feeds, known: Mask | None) -> Mask:
    """The mask that leaves exactly these keys: none, causal, padding by one input, or both."""
    batch, _, queries, keys = keep.shape
    triangle = np.tril(np.ones((queries, keys), bool))[None, None]
    sources = [t for t in graph.inputs if t.name in feeds and feeds[t.name].shape == (batch, keys)]
    candidates = [Mask(None, False), Mask(None, True)]
    candidates += [Mask(source, causal) for source in sources for causal in (False, True)]
    for mask in candidates:
        seen = np.ones_like(keep) if not mask.causal else np.broadcast_to(triangle, keep.shape)
        if mask.padding is not None:
            seen = seen & (feeds[mask.padding.name] != 0)[:, None, None, :]
        if (seen == keep).all() and (known is None or _same(mask, known)):
            return mask
    raise Miss("its mask is neither causal nor the padding given by an input of shape [batch, tokens]")


def _same(a: Mask, b: Mask) -> bool:
    return a.causal == b.causal and (a.padding.name if a.padding else "") == (b.padding.name if b.padding else "")


def _merged_below(context: gs.Node, width: int) -> list[gs.Tensor]:
    """Tensors after the context product that may hold it merged by heads, as [batch, tokens, width] or flat."""
    found, tensor = [], context.outputs[0]
    for _ in range(4):
        users = g.consumers(tensor)
        if len(users) != 1 or users[0].op not in ("Transpose", "Reshape", "Identity", "Cast"):
            break
        tensor = users[0].outputs[0]
        if tensor.shape is not None and len(tensor.shape) in (2, 3) and tensor.shape[-1] == width:
            found.append(tensor)
    if not found:
        raise Miss("its result is not merged by heads")
    return sorted(found, key=lambda t: -len(t.shape))


def _reference(feeds: probe.Feeds, q: Operand, k: Operand, v: Operand, factor: float, keep: np.ndarray) -> np.ndarray:
    """softmax(q k^T) v in numpy, merged by heads: [batch, tokens, width]."""
    parts = [feeds[t.source.name].astype(np.float64)[..., t.features] for t in (q, k, v)]  # [b, t, heads, size]
    scores = np.einsum("bqhd,bkhd->bhqk", parts[0], parts[1]) * factor * q.scale * k.scale
    scores = np.where(keep, scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhd->bqhd", share, parts[2])
    return np.asarray(y.reshape(*y.shape[:2], -1))


def _agreeing(ys: Sequence[gs.Tensor], values: probe.Feeds, reference: np.ndarray) -> list[gs.Tensor]:
    return [y for y in ys if np.allclose(values[y.name].reshape(reference.shape), reference, atol=1e-3)]


def _replace(graph: gs.Graph, root: gs.Node, found: _Found, masks: dict[str, gs.Tensor | None]) -> None:
    stem = root.name.rsplit("/", 1)[0] or root.name
    b = Builder(graph, stem)
    q, k, v = (_project(graph, getattr(found, part), stem, part) for part in "qkv")
    key = str(found.mask)
    if key not in masks:
        like = found.q.source if found.mask.padding is None else found.mask.padding  # an input, rather
        masks[key] = build_mask(Builder(graph, "mask"), found.mask, like)
    y = build_attention(b, q, k, v, found.q.features.shape[0], found.scale, masks[key])
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
    stored = g.constant(layer.node.inputs[1])
    assert stored is not None
    y = b("MatMul", layer.x, b.constant(np.ascontiguousarray(stored[:, order]), "weight"), shape=shape)
    if layer.bias is None:
        return y
    return b("Add", y, b.constant(layer.bias[order].astype(stored.dtype), "bias"), shape=shape)
