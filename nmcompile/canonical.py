"""The canonical form: the few shapes of sub-graph that passes produce and backends read.

Linear      MatMul(x, W[K,N]) -> Add(bias[N])                                     (graph.linear_layers)
Attention   q, k, v by heads -> MatMul -> Mul(scale) -> Add(bias) -> Softmax -> MatMul -> Transpose -> Reshape
Mask        Where(keep, 0, lowest)      keep from a [batch, keys] input, from the causal triangle, or both
Positions   Range(first, first + sequence); RoBERTa: CumSum(ids != pad) * (ids != pad) + pad

Every form is made of plain ONNX operators, so that any runtime can run the graph between any two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.derive import Derivation
from nmcompile.errors import PassError
from nmcompile.masks import Mask, match_bias


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
    quantized_probabilities: bool = False  # a pair stands behind the softmax too
    guarded: bool = False  # rows without a key, which the softmax makes NaN, become 0

    @property
    def biased(self) -> gs.Node | None:
        """The node that adds the mask to the scores, as its second input."""
        adds = g.producer(next(node for node in self.nodes if node.op == "Softmax").inputs[0])
        return adds if adds is not None and adds.op == "Add" else None

    @property
    def readers(self) -> tuple[tuple[gs.Node, int], ...]:
        """The product and the input of it that reads each operand."""
        first, second = (node for node in self.nodes if node.op == "MatMul")
        return (first, 0), (first, 1), (second, 1)


# ---- before and after ------------------------------------------------------------------------------------------


def as_linear(node: gs.Node) -> str | None:
    """"" for a Gemm that is a linear layer in another form, else why it stays one; None for what is no Gemm."""
    if node.op != "Gemm" or node.domain not in (None, "", "ai.onnx"):
        return None
    weight = g.constant(node.inputs[1])
    biased = len(node.inputs) > 2 and not node.inputs[2].is_empty()
    bias = g.constant(node.inputs[2]) if biased else np.zeros(0)
    if weight is None or bias is None or weight.ndim != 2 or node.attrs.get("transA", 0):
        maker = g.producer(node.inputs[1])
        quantized = maker is not None and maker.op == "DequantizeLinear"
        return "it is quantized" if quantized else "its weight or bias is not constant or A is transposed"
    outputs = weight.shape[0 if node.attrs.get("transB", 0) else 1]
    if bias.size > 1 and (bias.size != outputs or bias.shape[-1] != outputs):
        return f"its bias of shape {list(bias.shape)} is not one value per output"
    return ""


def check_canonical(graph: gs.Graph) -> None:
    """PassError where linear layers stand in a form that `linear_layers` does not find."""
    for node in graph.nodes:
        if as_linear(node) == "":
            raise PassError(f"node '{node.name}' is a Gemm, so the graph is not in canonical form; run the canonical "
                            "passes first (canonicalise-linear among them)")  # fmt: skip


# ---- attention -----------------------------------------------------------------------------------------------


def build_attention(
    b: Builder, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, heads: int, scale: float, bias: gs.Tensor | None,
    guarded: bool = False,
) -> gs.Tensor:  # fmt: skip
    """Decomposed multi-head attention over [batch, tokens, heads * size] tensors; returns the same shape as q.

    guarded: a row of which every key is hidden by -inf gives 0, not NaN.
    """
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
    if guarded:
        share = b("Where", b("IsNaN", share, dtype=bool), b.scalar(0.0), share)
    context = b("MatMul", share, by_head(v, [0, 2, 1, 3]))
    merged = b("Transpose", context, perm=[0, 2, 1, 3])
    return b("Reshape", merged, b.ints(0, 0, heads * size), shape=q.shape)


def match_attention(softmax: gs.Node, d: Derivation) -> Attention | None:
    """The canonical attention around a Softmax node of the graph that was derived, or None."""
    if softmax.op != "Softmax" or softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    nodes = [softmax]
    masked = g.producer(softmax.inputs[0])
    bias: gs.Tensor | None = None
    if masked is not None and masked.op == "Add":
        bias = masked.inputs[1]
        nodes.append(masked)
        masked = g.producer(masked.inputs[0])
    scale = g.constant(masked.inputs[1]) if masked is not None and masked.op == "Mul" else None
    product = g.producer(masked.inputs[0]) if masked is not None and scale is not None and scale.size == 1 else None
    if masked is None or scale is None or product is None or product.op != "MatMul":
        return None
    shares, guard = _guarded(softmax)
    nodes += guard
    context = _only(shares)
    pair = context is not None and context.op == "QuantizeLinear"
    if context is not None and pair:
        dequantize = _only(context.outputs[0])
        context = None if dequantize is None else _only(dequantize.outputs[0])
    merged = _only(context.outputs[0]) if context is not None and context.op == "MatMul" else None
    flat = _only(merged.outputs[0]) if merged is not None and merged.op == "Transpose" else None
    if merged is None or flat is None or flat.op != "Reshape" or merged.attrs.get("perm") != [0, 2, 1, 3]:
        return None
    assert context is not None
    merged_shape = _ints(flat.inputs[1])
    if merged_shape is None or len(merged_shape) != 3 or merged_shape[:2] != [0, 0]:
        return None
    q = _heads(product.inputs[0], [0, 2, 1, 3])
    k = _heads(product.inputs[1], [0, 2, 3, 1])
    v = _heads(context.inputs[1], [0, 2, 1, 3])
    if q is None or k is None or v is None or not q[1:3] == k[1:3] == v[1:3]:
        return None
    mask = Mask() if bias is None else _mask(bias, product.outputs[0], d)
    if mask is None:
        return None
    nodes += [masked, product, context, merged, flat, *q[3], *k[3], *v[3]]
    operands = (product.inputs[0], product.inputs[1], context.inputs[1])
    return Attention(
        softmax.name, q[0], k[0], v[0], flat.outputs[0], q[1], float(scale.item()), mask, tuple(nodes), operands,
        pair, bool(guard),
    )  # fmt: skip


def _mask(bias: gs.Tensor, product: gs.Tensor, d: Derivation) -> Mask | None:
    shape = d.shape(product)
    return None if shape is None or len(shape) != 4 else match_bias(d, bias, shape)


def _guarded(softmax: gs.Node) -> tuple[gs.Tensor, list[gs.Node]]:
    """What the softmax gives, past Where(IsNaN(y), 0, y), and the nodes of that."""
    y = softmax.outputs[0]
    users = g.consumers(y)
    test = next((node for node in users if node.op == "IsNaN"), None)
    choice = _only(test.outputs[0]) if test is not None else None
    if test is None or choice is None or choice.op != "Where" or len(users) != 2 or choice.inputs[2] is not y:
        return y, []
    instead = g.constant(choice.inputs[1])
    if instead is None or instead.size != 1 or instead.any():
        return y, []
    return choice.outputs[0], [test, choice]


def is_probability(tensor: gs.Tensor) -> bool:
    """Made by a softmax, so between 0 and 1 whatever the data."""
    node = g.producer(tensor)
    if node is not None and node.op == "Where":
        node = g.producer(node.inputs[2])
    return node is not None and node.op == "Softmax"


def attentions(graph: gs.Graph, d: Derivation | None = None) -> list[Attention]:
    """Every canonical attention of a sorted graph, in node order; `d` if the graph is derived already."""
    roots = [node for node in graph.nodes if node.op == "Softmax"]
    if not roots:
        return []
    known = d or Derivation(graph)
    found = (match_attention(node, known) for node in roots)
    return [item for item in found if item is not None]


def _heads(tensor: gs.Tensor, perm: list[int]) -> tuple[gs.Tensor, int, int, list[gs.Node]] | None:
    """(what is split by heads, heads, features of each, the nodes that do it)"""
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
    return reshape.inputs[0], shape[2], shape[3], [transpose, reshape]


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
