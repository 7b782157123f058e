"""Which parts of a Q/DQ graph the native engine runs: a list of operations over token tensors.

A token tensor is [batch, tokens, features] or, after the first token was taken, [batch, features]. Quantize/dequantize
pairs are not operations of their own; they say in which form an operation reads its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import canonical, probe
from nmcompile import ir as g
from nmcompile.backends.cpu.match_lookups import match_embedding
from nmcompile.backends.cpu.match_patches import match_patches
from nmcompile.backends.cpu.ops import (
    FLOAT,
    AddPositions,
    Affine,
    Attention,
    AttentionFloat,
    Binary,
    First,
    Form,
    LayerNorm,
    Linear,
    LinearFloat,
    Op,
    Read,
    Unary,
    View,
)
from nmcompile.backends.cpu.pack import MAX_INPUTS
from nmcompile.backends.cpu.steps import Layout, layouts
from nmcompile.backends.cpu.steps.attention import Attention as AttentionStep
from nmcompile.backends.cpu.streams import Space, Stream


class Common(TypedDict):
    """What all operations have beside their reads."""

    y: str
    rows: int
    space: Space
    nodes: tuple[gs.Node, ...]
    name: str


UNARY = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul"}


class Matcher:
    """Walks a sorted Q/DQ graph once; `ops` in order, `reasons` for compute nodes that stay outside."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.derived = probe.annotate(graph)
        self.inputs = {t.name for t in graph.inputs}
        self.tensors = graph.tensors()
        self.spaces: dict[str, Space] = {}
        self.ops: list[Op] = []
        self.reasons: dict[str, str] = {}
        self.covered: set[int] = set()
        self.keys = g.layer_keys(graph)
        self.attentions = {found.name: found for found in canonical.attentions(graph, self.derived)}
        attention = {id(n) for found in self.attentions.values() for n in found.nodes}
        last = [node for node in graph.nodes if node.op == "Softmax"]  # they ask how their operands are made
        for node in [*(node for node in graph.nodes if node.op != "Softmax"), *last]:
            match = MATCHES.get(node.op)
            if match is None or id(node) in self.covered or (id(node) in attention and node.op != "Softmax"):
                continue
            found = match(self, node)
            if isinstance(found, str):
                self.reasons[node.name] = found
            elif found is not None:
                self.ops.append(found)
                self.covered |= {id(item) for item in found.nodes}
                self.spaces[found.y] = found.space
        order = {id(node): i for i, node in enumerate(graph.nodes)}
        self.ops.sort(key=lambda op: max(order[id(node)] for node in op.nodes))

    # ---- what a tensor is ----

    def space(self, tensor: gs.Tensor) -> Space | None:
        """The token space of a float tensor, None when it is no token tensor."""
        if tensor.name in self.spaces:
            return self.spaces[tensor.name]
        shape = tensor.shape
        if shape is None or len(shape) != 3 or tensor.dtype != np.float32 or isinstance(tensor, gs.Constant):
            return None
        if not isinstance(shape[2], int) or shape[0] is None or shape[1] is None:
            return None
        return Space(Stream(shape[0], shape[1]))

    def read(self, tensor: gs.Tensor, layout: Layout = "u8") -> Read:
        """The float tensor behind a quantize/dequantize pair and its quantized form, or the tensor as it is."""
        pair = g.read_pair(tensor)
        if pair is None:
            return Read(tensor.name)
        # s8 with zero point z holds the same values as u8 with z + 128
        offset = pair.zero + 128 * pair.signed if layout == "u8" else pair.zero - 128 * (not pair.signed)
        if layout != "u8" and offset != 0:
            return Read(pair.x.name)
        return Read(pair.x.name, Form(layout, pair.scale, offset))

    def _source(self, tensor: gs.Tensor) -> gs.Tensor:
        """The float tensor behind a quantize/dequantize pair: a step in float skips the rounding."""
        return self._tensor(self.read(tensor).tensor)

    # ---- operations ----

    def _linear(self, node: gs.Node) -> Op | str | None:
        weight = self._weight(node.inputs[1])
        if weight is None:
            return None if g.constant(node.inputs[0]) is None else "its first operand is constant"
        matrix, scale = weight
        n, k = matrix.shape
        read = self.read(node.inputs[0])
        source = self._tensor(read.tensor)
        space = self.space(source)
        if space is None:
            return f"its input {source.name} is not [batch, tokens, features] of known sizes"
        if k > MAX_INPUTS:
            return f"K={k} is more than {MAX_INPUTS}"
        nodes, y = [node], node.outputs[0]
        bias: np.ndarray | None = None
        users = g.consumers(y)
        if len(users) == 1 and users[0].op == "Add" and not g.is_output(self.graph, y):
            value = next((v for v in map(g.constant, users[0].inputs) if v is not None), None)
            row = None if value is None else g.per_feature(value, 2 if space.first else 3, n)
            if row is not None:
                bias, y = row.astype(np.float32), users[0].outputs[0]
                nodes.append(users[0])
        common: Common = {"y": y.name, "rows": n, "space": space, "nodes": tuple(nodes), "name": node.name}
        key = self.keys.get(node.name, "")
        if scale is not None and read.form.layout == "u8":
            return Linear(reads=(read,), weight=matrix, scale=scale, bias=bias, key=key, **common)
        if scale is not None:
            matrix = matrix.astype(np.float32) * scale[:, None]
        read = Read(node.inputs[0].name if read.form == FLOAT else read.tensor)
        return LinearFloat(reads=(read,), weight=matrix, bias=bias, key=key, **common)

    def _weight(self, tensor: gs.Tensor) -> tuple[np.ndarray, np.ndarray | None] | None:
        """[N, K] int8 with its scale per output, or float32 with None."""
        value = g.constant(tensor)
        if value is not None:
            return (value.T.astype(np.float32), None) if value.ndim == 2 and value.dtype.kind == "f" else None
        dq = g.producer(tensor)
        if dq is None or dq.op != "DequantizeLinear" or dq.attrs.get("block_size", 0):
            return None
        stored, scale = g.constant(dq.inputs[0]), g.constant(dq.inputs[1])
        zero = g.constant(dq.inputs[2]) if len(dq.inputs) > 2 and not dq.inputs[2].is_empty() else np.zeros(1, np.int8)
        if stored is None or scale is None or zero is None or stored.dtype != np.int8 or stored.ndim != 2 or zero.any():
            return None
        if scale.size not in (1, stored.shape[1]) or (scale.size > 1 and dq.attrs.get("axis", 1) not in (1, -1)):
            return None
        return stored.T, np.broadcast_to(scale.reshape(-1).astype(np.float32), (stored.shape[1],)).copy()

    def _attention(self, node: gs.Node) -> Op | str | None:
        found = self.attentions.get(node.name)
        if found is None:
            return "its attention is not in canonical form"
        if found.quantized_probabilities:
            return "its softmax is quantized, which the engine does by steps of its own"
        read_as = [layouts(AttentionStep, field)[0] for field in ("q", "k", "v")]
        parts = zip(found.operands, (found.q, found.k, found.v), read_as, strict=True)
        reads = tuple(self._operand(*part) for part in parts)
        spaces = [self.space(self._tensor(read.tensor)) for read in reads]
        width = found.q.shape[-1] if found.q.shape is not None else None
        if spaces[0] is None or spaces.count(spaces[0]) != 3 or not isinstance(width, int):
            return "its queries and keys are not the same tokens"
        mask = found.mask
        if mask.padding is not None and list(mask.padding.shape or []) != spaces[0].stream.shape:
            return f"its mask {mask.padding.name} is not [batch, tokens] of its queries"
        if width % found.heads or (width // found.heads) % 4:
            return f"head size {width / found.heads:g} is not a multiple of 4"
        # only a linear layer writes the forms that keys and values are read in
        made = {op.y for op in self.ops if isinstance(op, Linear)}
        quantized = all(read.form != FLOAT for read in reads) and all(read.tensor in made for read in reads[1:])
        kind: type[Attention] | type[AttentionFloat] = Attention if quantized else AttentionFloat
        if not quantized:
            reads = tuple(Read(read.tensor) for read in reads)
        return kind(
            reads=reads, y=found.y.name, rows=width, space=spaces[0], nodes=found.nodes, name=node.name,
            heads=found.heads, scale=found.scale, causal=mask.causal,
            mask=None if mask.padding is None else mask.padding.name, assumes=tuple(mask.assumes),
        )  # fmt: skip

    def _operand(self, operand: gs.Tensor, source: gs.Tensor, layout: Layout) -> Read:
        """q, k or v: quantized right before the product, or already as it left its layer."""
        form = self.read(operand, layout).form
        return Read(source.name, form) if form != FLOAT else self.read(source, layout)

    def _norm(self, node: gs.Node) -> Op | str | None:
        x = self._source(node.inputs[0])
        space, rows = self.space(x), _last(x)
        values = [g.constant(t) for t in node.inputs[1:]]
        rank = len(x.shape) if x.shape is not None else 0
        if space is None or rows is None or node.attrs.get("axis", -1) not in (-1, rank - 1):
            return f"its input {x.name} is not [batch, tokens, features] of known sizes"
        if any(v is None or v.shape != (rows,) for v in values) or any(g.consumers(y) for y in node.outputs[1:]):
            return "its scale or bias is not one constant per feature"
        beta = values[1].astype(np.float32) if len(values) > 1 and values[1] is not None else None
        assert values[0] is not None
        return LayerNorm(
            reads=(Read(x.name),), y=node.outputs[0].name, rows=rows, space=space, nodes=(node,), name=node.name,
            gamma=values[0].astype(np.float32), beta=beta, eps=float(node.attrs.get("epsilon", 1e-5)),
            rms=node.op == "RMSNormalization",
        )  # fmt: skip

    def _elementwise(self, node: gs.Node, x: gs.Tensor, op: str, nodes: tuple[gs.Node, ...]) -> Op | None:
        x = self._source(x)
        space, rows = self.space(x), _last(x)
        if space is None or rows is None:
            return None
        return Unary(reads=(Read(x.name),), y=node.outputs[0].name, rows=rows, space=space, nodes=nodes,
                     name=node.name, op=op)  # fmt: skip

    def _gelu(self, node: gs.Node) -> Op | None:
        tanh = node.attrs.get("approximate", "none") == "tanh"
        return self._elementwise(node, node.inputs[0], "gelu_tanh" if tanh else "gelu", (node,))

    def _unary(self, node: gs.Node) -> Op | None:
        users = g.consumers(node.outputs[0])
        if node.op == "Sigmoid" and len(users) == 1 and users[0].op == "Mul":
            return None  # part of SiLU, which its product matches
        return self._elementwise(node, node.inputs[0], UNARY[node.op], (node,))

    def _binary(self, node: gs.Node) -> Op | None:
        embedding = match_embedding(self.graph, self.derived, node) if node.op == "Add" else None
        found = embedding or (self._gate(node) if node.op == "Mul" else None)
        if found is not None:
            return found
        a, b = (x if isinstance(x, gs.Constant) else self._source(x) for x in node.inputs)
        for x, other in ((a, b), (b, a)):
            value = g.constant(other)
            space, rows = self.space(x), _last(x)
            if value is None or space is None or rows is None or value.dtype.kind != "f":
                continue
            if node.op == "Sub" and x is b:
                return None
            with_constant = self._with_constant(node, x, value, space, rows)
            if with_constant is not None:
                return with_constant
        space, rows = self.space(a), _last(a)
        if space is None or rows is None or self.space(b) != space or _last(b) != rows:
            return None
        return Binary(reads=(Read(a.name), Read(b.name)), y=node.outputs[0].name, rows=rows, space=space, nodes=(node,),
                      name=node.name, op=BINARY[node.op])  # fmt: skip

    def _with_constant(self, node: gs.Node, x: gs.Tensor, value: np.ndarray, space: Space, rows: int) -> Op | None:
        """One number per feature, or a row per position."""
        common: Common = {"y": node.outputs[0].name, "rows": rows, "space": space, "nodes": (node,), "name": node.name}
        reads = (Read(x.name),)
        per_feature = g.per_feature(value, 2 if space.first else 3, rows)
        if per_feature is not None:
            row = per_feature.astype(np.float32)
            added = {"Add": row, "Sub": -row, "Mul": None}[node.op]
            return Affine(reads=reads, mul=row if node.op == "Mul" else None, add=added, **common)
        table = _per_position(value)
        if node.op != "Add" or table is None or space.first or list(table.shape) != [space.stream.tokens, rows]:
            return None
        return AddPositions(reads=reads, table=table.astype(np.float32), **common)

    def _gate(self, node: gs.Node) -> Op | None:
        """x * Sigmoid(x) is SiLU, x * Sigmoid(1.702 x) the quick GELU."""
        for x, other in (node.inputs, node.inputs[::-1]):
            sigmoid = g.producer(other)
            if sigmoid is None or sigmoid.op != "Sigmoid" or len(g.consumers(other)) != 1:
                continue
            if sigmoid.inputs[0] is x:
                return self._elementwise(node, x, "silu", (node, sigmoid))
            factor = g.producer(sigmoid.inputs[0])
            value = g.constant(factor.inputs[1]) if factor is not None and factor.op == "Mul" else None
            scaled = factor is not None and value is not None and value.size == 1 and factor.inputs[0] is x
            if scaled and value is not None and abs(float(value.item()) - 1.702) < 1e-6:
                return self._elementwise(node, x, "quick_gelu", (node, sigmoid))
        return None

    def _gather(self, node: gs.Node) -> Op | None:
        embedded = match_embedding(self.graph, self.derived, node)
        if embedded is not None:
            return embedded
        x, index = self._source(node.inputs[0]), g.constant(node.inputs[1])
        space, rows = self.space(x), _last(x)
        if space is None or space.first or rows is None or index is None or index.ndim or int(index.item()) != 0:
            return None
        if node.attrs.get("axis", 0) != 1:
            return None
        return First(reads=(Read(x.name),), y=node.outputs[0].name, rows=rows, space=space.firsts(), nodes=(node,),
                     name=node.name)  # fmt: skip

    def _view(self, node: gs.Node) -> Op | None:
        """A graph output that is a token tensor renamed, without its last axis of size 1, or in half precision."""
        x, y = self._source(node.inputs[0]), node.outputs[0]
        space, rows = self.space(x), _last(x)
        if space is None or rows is None or not g.is_output(self.graph, y) or g.consumers(y):
            return None
        if node.op == "Squeeze":
            axes = g.constant(node.inputs[1]) if len(node.inputs) > 1 else None
            last = len(x.shape) - 1
            if rows != 1 or axes is None or axes.size != 1 or int(axes.item()) not in (-1, last):
                return None
        elif node.op == "Cast" and y.dtype != np.float16:
            return None
        view = {"Squeeze": "squeeze", "Cast": "float16"}.get(node.op, "same")
        return View(reads=(Read(x.name),), y=y.name, rows=rows, space=space, nodes=(node,), name=node.name, view=view)

    def _tensor(self, name: str) -> gs.Tensor:
        return self.tensors[name]


# What finds an operation at a node of a type. It gives the operation, or why the node runs on onnxruntime, or None
# where that needs no word.
MATCHES: dict[str, Callable[[Matcher, gs.Node], Op | str | None]] = {
    "MatMul": Matcher._linear, "Softmax": Matcher._attention, "LayerNormalization": Matcher._norm,
    "RMSNormalization": Matcher._norm, "Gelu": Matcher._gelu, "Relu": Matcher._unary, "Tanh": Matcher._unary,
    "Sigmoid": Matcher._unary, "Add": Matcher._binary, "Sub": Matcher._binary, "Mul": Matcher._binary,
    "Gather": Matcher._gather, "Conv": lambda matcher, conv: match_patches(conv, matcher.inputs),
    "Squeeze": Matcher._view, "Cast": Matcher._view, "Identity": Matcher._view,
}  # fmt: skip


def _per_position(value: np.ndarray) -> np.ndarray | None:
    """A constant [tokens, features], the same for every sequence of the batch."""
    if value.ndim not in (2, 3) or (value.ndim == 3 and not (value == value[:1]).all()):
        return None
    return value if value.ndim == 2 else value[0]


def _last(tensor: gs.Tensor) -> int | None:
    shape = tensor.shape
    return shape[-1] if shape and isinstance(shape[-1], int) else None
