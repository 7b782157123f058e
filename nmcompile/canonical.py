"""The canonical form: the few shapes of sub-graph that passes produce and backends read.

Linear      MatMul(x, W[K,N]) -> Add(bias[N])                                     (graph.linear_layers)
Attention   q, k, v by heads -> MatMul -> Mul(scale) -> Add(bias) -> Softmax -> MatMul -> Transpose -> Reshape
Mask        Where(keep, 0, lowest)      keep from a [batch, keys] input, from the causal triangle, or both
Positions   Range(first, first + sequence); RoBERTa: CumSum(ids != pad) * (ids != pad) + pad

Every form is made of plain ONNX operators, so that any runtime can run the graph between any two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g

LOWEST = float(np.finfo(np.float32).min)  # added to a score: its key is never seen


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: where `padding` [batch, keys] is not 0, and none after it if `causal`."""

    padding: gs.Tensor | None = None
    causal: bool = False

    def __str__(self) -> str:
        words = [f"padding by {self.padding.name}"] if self.padding is not None else []
        return " and ".join(words + ["causal"] * self.causal) or "none"


@dataclass(frozen=True)
class Attention:
    """One multi-head attention: q, k, v and y are [batch, tokens, heads * size], `nodes` all that is between.

    `operands` are q, k and v as the products read them: by heads, behind a quantize/dequantize pair if there is one.
    """

    name: str
    q: gs.Tensor
    k: gs.Tensor
    v: gs.Tensor
    y: gs.Tensor
    heads: int
    scale: float
    mask: Mask
    nodes: tuple[gs.Node, ...]
    operands: tuple[gs.Tensor, gs.Tensor, gs.Tensor]
    quantized_shares: bool = False  # a pair stands behind the softmax too

    @property
    def readers(self) -> tuple[tuple[gs.Node, int], ...]:
        """The product and the input of it that reads each operand."""
        first, second = (node for node in self.nodes if node.op == "MatMul")
        return (first, 0), (first, 1), (second, 1)


@dataclass(frozen=True)
class Positions:
    """Token positions: `first + column`; with `ids` [batch, sequence], RoBERTa's count of tokens that are not `pad`."""

    first: int = 0
    ids: gs.Tensor | None = None
    pad: int = 0


class Builder:
    """Appends nodes to a graph; each call returns the node's output tensor."""

    def __init__(self, graph: gs.Graph, stem: str) -> None:
        self.graph = graph
        self.stem = stem
        self._given: set[str] = set()  # names of constants that no node reads yet

    def fresh(self, stem: str) -> str:
        """A name that neither the graph nor a constant of this builder has."""
        name = g.fresh(self.graph, f"{self.stem}/{stem}")
        if name in self._given:
            name = g.unused(self._given | g.names(self.graph), f"{self.stem}/{stem}")
        self._given.add(name)
        return name

    def constant(self, values: np.ndarray, stem: str = "const") -> gs.Constant:
        return gs.Constant(self.fresh(stem), np.asarray(values))

    def ints(self, *values: int) -> gs.Constant:
        return self.constant(np.array(values, np.int64), "ints")

    def scalar(self, value: float | int, dtype: type | np.dtype = np.float32) -> gs.Constant:
        return self.constant(np.array(value, dtype), "scalar")

    def __call__(
        self,
        op: str,
        *inputs: gs.Tensor,
        dtype: type | np.dtype | None = np.float32,
        shape: Sequence[int | str | None] | None = None,
        domain: str | None = None,
        **attrs: object,
    ) -> gs.Variable:
        name = self.fresh(op)
        kind = None if dtype is None else np.dtype(dtype)
        y = gs.Variable(f"{name}_out", dtype=kind, shape=None if shape is None else list(shape))
        self.graph.nodes.append(gs.Node(op, name, dict(attrs), list(inputs), [y], domain=domain))
        return y


# ---- masks and positions -------------------------------------------------------------------------------------


def build_mask(b: Builder, mask: Mask, like: gs.Tensor) -> gs.Tensor | None:
    """The additive bias of a mask, broadcastable to [batch, heads, queries, keys]; `like` is [batch, tokens, ...]."""
    keep: gs.Tensor | None = None
    if mask.padding is not None:
        keep = b("Unsqueeze", b("Cast", mask.padding, dtype=bool, to=9), b.ints(1, 2), dtype=bool)
    if mask.causal:
        index = b("Range", b.scalar(0, np.int64), sequence_length(b, like), b.scalar(1, np.int64), dtype=np.int64)
        below = b("LessOrEqual", b("Unsqueeze", index, b.ints(0), dtype=np.int64),
                  b("Unsqueeze", index, b.ints(1), dtype=np.int64), dtype=bool)  # fmt: skip
        keep = below if keep is None else b("And", keep, below, dtype=bool)
    return None if keep is None else b("Where", keep, b.scalar(0.0), b.scalar(LOWEST))


def sequence_length(b: Builder, like: gs.Tensor) -> gs.Tensor:
    """Size of axis 1 of `like`, a scalar."""
    shape = b("Shape", like, dtype=np.int64)
    return b("Gather", shape, b.scalar(1, np.int64), dtype=np.int64, axis=0)


def match_mask(bias: gs.Tensor) -> Mask | None:
    """The mask whose canonical bias this is, or None."""
    where = g.producer(bias)
    if where is None or where.op != "Where":
        return None
    yes, no = g.constant(where.inputs[1]), g.constant(where.inputs[2])
    if yes is None or no is None or yes.size != 1 or no.size != 1 or float(yes.item()) != 0 or float(no.item()) > -1e30:
        return None
    return _match_keep(where.inputs[0])


def _match_keep(keep: gs.Tensor) -> Mask | None:
    node = g.producer(keep)
    if node is None:
        return None
    if node.op == "And":
        left, right = _match_keep(node.inputs[0]), _match_keep(node.inputs[1])
        if left is None or right is None:
            return None
        return Mask(left.padding if left.padding is not None else right.padding, left.causal or right.causal)
    if node.op == "LessOrEqual":
        sides = [g.producer(side) for side in node.inputs]
        if all(side is not None and side.op == "Unsqueeze" for side in sides):
            axes = [_ints(side.inputs[1]) for side in sides if side is not None]
            index = [side.inputs[0] for side in sides if side is not None]
            positions = match_positions(index[0]) if index[0] is index[1] else None
            if positions is not None and positions.ids is None and axes == [[0], [1]]:
                return Mask(causal=True)
        return None
    if node.op == "Unsqueeze" and _ints(node.inputs[1]) == [1, 2]:
        cast = g.producer(node.inputs[0])
        if cast is not None and cast.op == "Cast":
            return Mask(padding=cast.inputs[0])
    return None


def build_positions(b: Builder, positions: Positions, like: gs.Tensor) -> gs.Tensor:
    """Position ids: [sequence], or [batch, sequence] for RoBERTa's."""
    if positions.ids is None:
        first = b.scalar(positions.first, np.int64)
        end = sequence_length(b, like)
        if positions.first:
            end = b("Add", end, first, dtype=np.int64)
        return b("Range", first, end, b.scalar(1, np.int64), dtype=np.int64)
    pad = b.scalar(positions.pad, np.int64)
    ids = positions.ids
    if ids.dtype != np.int64:
        ids = b("Cast", ids, dtype=np.int64, to=7)
    same = b("Equal", ids, pad, dtype=bool)
    real = b("Cast", b("Not", same, dtype=bool), dtype=np.int64, to=7)
    count = b("CumSum", real, b.scalar(1, np.int64), dtype=np.int64)
    return b("Add", b("Mul", count, real, dtype=np.int64), pad, dtype=np.int64)


def match_positions(ids: gs.Tensor) -> Positions | None:
    """The canonical positions this tensor holds, or None."""
    node = g.producer(ids)
    if node is None:
        return None
    if node.op == "Range":
        return _match_range(node)
    if node.op != "Add":
        return None
    pad, product = g.constant(node.inputs[1]), g.producer(node.inputs[0])
    if pad is None or pad.size != 1 or product is None or product.op != "Mul":
        return None
    count, real = g.producer(product.inputs[0]), g.producer(product.inputs[1])
    if count is None or count.op != "CumSum" or count.inputs[0] is not product.inputs[1]:
        return None
    if _ints(count.inputs[1]) != [1] or count.attrs.get("exclusive", 0) or count.attrs.get("reverse", 0):
        return None
    unequal = g.producer(real.inputs[0]) if real is not None and real.op == "Cast" else None
    equal = g.producer(unequal.inputs[0]) if unequal is not None and unequal.op == "Not" else None
    if equal is None or equal.op != "Equal" or _ints(equal.inputs[1]) != [int(pad.item())]:
        return None
    source = equal.inputs[0]
    cast = g.producer(source)
    if cast is not None and cast.op == "Cast":
        source = cast.inputs[0]
    return Positions(ids=source, pad=int(pad.item()))


def _match_range(node: gs.Node) -> Positions | None:
    """Range(first, first + tokens, 1)."""
    first, step = _ints(node.inputs[0]), _ints(node.inputs[2])
    end = g.producer(node.inputs[1])
    if first is None or step != [1] or end is None:
        return None
    if first != [0]:
        if end.op != "Add" or _ints(end.inputs[1]) != first:
            return None
        end = g.producer(end.inputs[0])
    shape = g.producer(end.inputs[0]) if end is not None and end.op == "Gather" else None
    if end is None or shape is None or shape.op != "Shape" or "start" in shape.attrs or _ints(end.inputs[1]) != [1]:
        return None
    return Positions(first=first[0])


# ---- attention -----------------------------------------------------------------------------------------------


def build_attention(
    b: Builder, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, heads: int, scale: float, bias: gs.Tensor | None
) -> gs.Tensor:
    """Decomposed multi-head attention over [batch, tokens, heads * size] tensors; returns the same shape as q."""
    width = q.shape[-1] if q.shape is not None else None
    size = int(width) // heads if isinstance(width, int) else -1
    split = b.ints(0, 0, heads, size)

    def by_head(x: gs.Tensor, perm: list[int]) -> gs.Tensor:
        return b("Transpose", b("Reshape", x, split), perm=perm)

    scores = b("MatMul", by_head(q, [0, 2, 1, 3]), by_head(k, [0, 2, 3, 1]))
    scores = b("Mul", scores, b.scalar(scale))
    if bias is not None:
        scores = b("Add", scores, bias)
    share = b("Softmax", scores, axis=-1)
    context = b("MatMul", share, by_head(v, [0, 2, 1, 3]))
    merged = b("Transpose", context, perm=[0, 2, 1, 3])
    return b("Reshape", merged, b.ints(0, 0, heads * size), shape=q.shape)


def match_attention(softmax: gs.Node) -> Attention | None:
    """The canonical attention around a Softmax node, or None."""
    if softmax.op != "Softmax" or softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    masked = g.producer(softmax.inputs[0])
    bias: gs.Tensor | None = None
    nodes = [softmax]
    if masked is not None and masked.op == "Add":
        bias = masked.inputs[1]
        nodes.append(masked)
        masked = g.producer(masked.inputs[0])
    mask = Mask() if bias is None else match_mask(bias)
    if mask is None or masked is None or masked.op != "Mul":
        return None
    scale = g.constant(masked.inputs[1])
    product = g.producer(masked.inputs[0])
    context = _only(softmax.outputs[0])
    pair = context is not None and context.op == "QuantizeLinear"
    if context is not None and pair:
        dequantize = _only(context.outputs[0])
        context = None if dequantize is None else _only(dequantize.outputs[0])
    merged = _only(context.outputs[0]) if context is not None and context.op == "MatMul" else None
    flat = _only(merged.outputs[0]) if merged is not None and merged.op == "Transpose" else None
    if scale is None or scale.size != 1 or product is None or product.op != "MatMul" or context is None:
        return None
    if merged is None or flat is None or flat.op != "Reshape" or merged.attrs.get("perm") != [0, 2, 1, 3]:
        return None
    merged_shape = _ints(flat.inputs[1])
    if merged_shape is None or len(merged_shape) != 3 or merged_shape[:2] != [0, 0]:
        return None
    q = _heads(product.inputs[0], [0, 2, 1, 3])
    k = _heads(product.inputs[1], [0, 2, 3, 1])
    v = _heads(context.inputs[1], [0, 2, 1, 3])
    if q is None or k is None or v is None or not q[1] == k[1] == v[1]:
        return None
    nodes += [masked, product, context, merged, flat, *q[2], *k[2], *v[2]]
    operands = (product.inputs[0], product.inputs[1], context.inputs[1])
    return Attention(
        softmax.name, q[0], k[0], v[0], flat.outputs[0], q[1], float(scale.item()), mask, tuple(nodes), operands,
        pair,
    )


def attentions(graph: gs.Graph) -> list[Attention]:
    """Every canonical attention of the graph, in node order."""
    found = (match_attention(node) for node in graph.nodes if node.op == "Softmax")
    return [item for item in found if item is not None]


def _heads(tensor: gs.Tensor, perm: list[int]) -> tuple[gs.Tensor, int, list[gs.Node]] | None:
    transpose = g.producer(tensor)
    if transpose is not None and transpose.op == "DequantizeLinear":
        quantize = g.producer(transpose.inputs[0])
        transpose = g.producer(quantize.inputs[0]) if quantize is not None else None
    if transpose is None or transpose.op != "Transpose" or list(transpose.attrs.get("perm", [])) != perm:
        return None
    reshape = g.producer(transpose.inputs[0])
    if reshape is None or reshape.op != "Reshape":
        return None
    shape = _ints(reshape.inputs[1])
    if shape is None or len(shape) != 4 or shape[:2] != [0, 0]:
        return None
    return reshape.inputs[0], shape[2], [transpose, reshape]


def _ints(tensor: gs.Tensor) -> list[int] | None:
    value = g.constant(tensor)
    return None if value is None else [int(item) for item in value.reshape(-1)]


def _only(tensor: gs.Tensor) -> gs.Node | None:
    users = g.consumers(tensor)
    return users[0] if len(users) == 1 else None


# ---- roles ---------------------------------------------------------------------------------------------------

AFTER_HEAD = {"Squeeze", "Split", "Reshape", "Transpose", "Cast", "Identity", "Softmax", "LogSoftmax", "Sigmoid",
              "Tanh", "Slice"}  # fmt: skip


def role(graph: gs.Graph, layer: g.Linear) -> str:
    """"pooler" for a layer over one vector per sequence, "head" for one that makes a graph output, else ""."""
    shape = layer.x.shape
    tensors = [layer.y]
    for tensor in tensors:
        if g.is_output(graph, tensor):
            return "head"
        users = g.consumers(tensor)
        if len(tensors) < 12 and users and all(node.op in AFTER_HEAD for node in users):
            tensors += [y for node in users for y in node.outputs]
    # [batch, features]; a first size that is no input's may be batch * tokens, flattened
    return "pooler" if shape is not None and len(shape) == 2 and shape[0] is not None else ""
