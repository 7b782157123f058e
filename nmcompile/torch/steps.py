"""What a Module runs: a graph's nodes as a straight list of steps, products with a bias and attention as one step each.

The front of a graph, which no parameter reaches (masks, positions, sizes of the inputs), is not among them: onnxruntime
computes it, once per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F

from nmcompile import ir as g
from nmcompile.canonical import Attention, attentions
from nmcompile.errors import UnsupportedError
from nmcompile.torch.operators import OPERATORS

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """One call: values by name -> values by name. "" stands for an input that is left out."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Tensor]) -> None:
        """Compute what it gives and put it beside the rest."""
        given = [values[name] if name else None for name in self.inputs]
        try:
            found = self.function(*given)
        except (TypeError, ValueError, KeyError) as error:
            raise UnsupportedError(f"node '{self.name}' cannot be computed in torch: {error}") from None
        for name, value in zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=False):
            values[name] = value


def steps(graph: gs.Graph, inner: Collection[int], keep: Collection[str]) -> list[Step]:
    """The nodes of `inner` (by id) as steps, in order. keep: tensors that must be there by their names, so nothing that
    computes them is taken together with what reads them. UnsupportedError names what torch has no operator for."""
    nodes = [node for node in graph.nodes if id(node) in inner]
    fused: dict[int, Step] = {}  # by the last node of each group
    gone: set[int] = set()
    for group, step in (*_attentions(graph, inner), *_biased(nodes)):
        inside = [tensor.name for node in group[:-1] for tensor in node.outputs]
        if not gone & {id(node) for node in group} and not set(inside) & set(keep):
            gone |= {id(node) for node in group}
            fused[id(group[-1])] = step
    return [fused[id(node)] if id(node) in fused else _plain(node) for node in nodes
            if id(node) in fused or id(node) not in gone]  # fmt: skip


def pruned(steps: Sequence[Step], outputs: Iterable[str], given: Collection[str]) -> tuple[Step, ...]:
    """Those that lead from what is given to the outputs."""
    wanted = set(outputs) - set(given)
    found = []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            found.append(step)
            wanted.difference_update(step.outputs)
            wanted |= {name for name in step.inputs if name and name not in given}
    return tuple(reversed(found))


def _plain(node: gs.Node) -> Step:
    operator = OPERATORS.get(node.op) if node.domain in (None, "", "ai.onnx") else None
    if operator is None:
        raise UnsupportedError(f"node '{node.name}' is a {node.op}, which has no gradient here; training takes graphs "
                               "of matrix products, normalisations, activations and attention")  # fmt: skip
    attributes: dict[str, Any] = dict(node.attrs)
    if node.op == "Split":
        attributes["outputs"] = len(node.outputs)
    inputs = tuple("" if tensor.is_empty() else tensor.name for tensor in node.inputs)
    return Step(node.name, partial(operator, **attributes), inputs, tuple(tensor.name for tensor in node.outputs))


def _biased(nodes: Sequence[gs.Node]) -> Iterator[tuple[list[gs.Node], Step]]:
    """MatMul by a matrix and the Add of a constant vector behind it."""
    for node in nodes:
        users = g.consumers(node.outputs[0]) if node.op == "MatMul" else []
        if len(users) != 1 or users[0].op != "Add" or g.constant(node.inputs[0]) is not None:
            continue
        others = [tensor for tensor in users[0].inputs if tensor is not node.outputs[0]]
        bias = g.constant(others[0]) if len(others) == 1 else None
        shape = node.inputs[1].shape
        if bias is None or shape is None or len(shape) != 2 or bias.shape != (shape[1],):
            continue
        inputs = (node.inputs[0].name, node.inputs[1].name, others[0].name)
        yield [node, users[0]], Step(node.name, _linear, inputs, (users[0].outputs[0].name,))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] by weight [K, N]."""
    return F.linear(x, weight.t(), bias)


def _attentions(graph: gs.Graph, inner: Collection[int]) -> Iterator[tuple[list[gs.Node], Step]]:
    """Softmax(q k * scale + bias) v as one product of torch's, which holds no scores."""
    for found in attentions(graph):
        if found.guarded or found.quantized_probabilities:
            continue
        nodes = _products(found)
        if not all(id(node) in inner for node in nodes):
            continue
        q, k, v = (operand.name for operand in found.operands)
        biased = found.biased
        inputs = (q, k, v) if biased is None else (q, k, v, biased.inputs[1].name)
        scaled = partial(_scaled_dot_product, scale=found.scale)
        yield nodes, Step(found.name, scaled, inputs, (nodes[-1].outputs[0].name,))


def _products(found: Attention) -> list[gs.Node]:
    """The nodes from the scores to the sums of values, in order."""
    first, second = (node for node in found.nodes if node.op == "MatMul")
    between = [node for node in found.nodes if node.op in ("Mul", "Add", "Softmax")]
    return [first, *between, second]


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float) -> Tensor:
    """q, v [batch, heads, tokens, size], k [batch, heads, size, tokens], bias added to the scores."""
    bias = None if bias is None else bias.to(q.dtype)[(None,) * (4 - bias.ndim)]
    found: Tensor = F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, bias, scale=scale)
    return found


def reached(graph: gs.Graph, names: Collection[str]) -> set[int]:
    """The ids of the nodes that read one of the tensors named, or what such a node gives."""
    known, found = set(names), set()
    for node in graph.nodes:
        if any(tensor.name in known for tensor in node.inputs):
            found.add(id(node))
            known |= {tensor.name for tensor in node.outputs}
    return found


def tied(held: Mapping[str, gs.Constant], apart: Collection[str] = ()) -> dict[str, str]:
    """Of matrices that are one initializer of the source file, as it is and transposed (a table of embeddings and the
    head that scores its rows): the one that follows, and the one that it follows. Both hold the same values; those of
    `apart` have no part in it."""
    by_source: dict[tuple[str, tuple[g.Operation, ...]], str] = {}
    found: dict[str, str] = {}
    for name, constant in held.items():
        known = g.source(constant)
        if name in apart or known is None or known.computed or constant.values.ndim != 2:
            continue
        (initializer,), moves = known.initializers, known.operations
        turned = moves[:-1] if moves[-1:] == (g.Transpose((1, 0)),) else (*moves, g.Transpose((1, 0)))
        other = by_source.get((initializer, turned))
        if other is not None and np.array_equal(np.asarray(held[other].values).T, np.asarray(constant.values)):
            found[name] = other
        by_source.setdefault((initializer, moves), name)
    return found


def parameters(graph: gs.Graph) -> Mapping[str, gs.Constant]:
    """The constants that can be trained: of floats, finite, more than one element; scales of quantization are none."""
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        for place, tensor in enumerate(node.inputs):
            values = g.constant(tensor)
            if values is None or not isinstance(tensor, gs.Constant) or values.dtype.kind != "f" or values.size < 2:
                continue
            if node.op in ("QuantizeLinear", "DequantizeLinear") and place:
                continue
            if tensor.name not in found and np.isfinite(values).all():
                found[tensor.name] = tensor
    return found
