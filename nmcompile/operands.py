"""Attention's operands and result: which features of which tensor they are, as derived.

q, k, v    [batch, heads, tokens, size], a tensor [batch, tokens, features] split by heads
y          the product with the values, merged by heads again
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.derive import Derivation
from nmcompile.symbolic import Element, Index, evaluate, floor_divided, poly

# Operators that move or scale values without mixing them: what may stand between a projection and its scores.
CARRY = {"Reshape", "Transpose", "Mul", "Div", "Unsqueeze", "Squeeze", "Identity", "Cast", "Split", "Slice", "Gather",
         "Expand", "Tile"}  # fmt: skip


class Miss(Exception):
    """Why something is no part of a self-attention that we know."""


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


def read_operand(d: Derivation, tensor: gs.Tensor, keys: bool) -> Operand:
    """Where a [batch, heads, tokens, size] operand (keys: [.., size, tokens]) comes from."""
    shape = d.value(tensor).shape
    if len(shape) != 4:
        raise Miss(f"{tensor.name} has not four dimensions")
    heads, size = shape[1].integer, shape[2 if keys else 3].integer
    if heads is None or size is None:
        raise Miss(f"the heads of {tensor.name} are not known, its shape is [{', '.join(map(str, shape))}]")
    source: gs.Tensor | None = tensor
    nodes: list[gs.Node] = []
    for _ in range(14):
        node = g.producer(source) if source is not None else None
        if node is None or node.op not in CARRY:
            break
        nodes.insert(0, node)
        source = next((x for x in node.inputs if g.constant(x) is None), None)
        lead = d.shape(source) if source is not None else None
        if source is None or lead is None or len(lead) != 3 or lead[:2] != (shape[0], shape[3 if keys else 2]):
            continue
        found = _features(d.cut([source], nodes), source, tensor, keys, (heads, size))
        if found is not None:
            return found
    raise Miss(f"{tensor.name} is not a projection split by heads, {_where(d, source, tensor)}")


def _where(d: Derivation, source: gs.Tensor | None, tensor: gs.Tensor) -> str:
    """What stands between an operand and its projection."""
    stop = d.stopped((source or tensor).name)
    node = g.producer(source) if source is not None else None
    turned = node is not None and node.op in ("Add", "Concat", "RotaryEmbedding") and _turns(node)
    return f"it is turned by position at {stop} (rotary embeddings)" if turned else f"it is computed by {stop}"


def _turns(node: gs.Node) -> bool:
    """x * cos + turned(x) * sin: a sum of two products, or the two halves of one."""
    if node.op == "RotaryEmbedding":
        return True
    makers = [g.producer(x) for x in node.inputs if g.constant(x) is None]
    if node.op == "Concat":
        return any(maker is not None and maker.op in ("Add", "Sub") and _turns_half(maker) for maker in makers)
    return _turns_half(node)


def _turns_half(node: gs.Node) -> bool:
    makers = [g.producer(x) for x in node.inputs]
    return len(makers) == 2 and all(maker is not None and maker.op == "Mul" for maker in makers)


def _features(
    d: Derivation, source: gs.Tensor, tensor: gs.Tensor, keys: bool, wanted: tuple[int, int]
) -> Operand | None:
    """Which feature of the source each head's place holds, and by what it is multiplied."""
    names = "bhit" if keys else "bhti"
    at = {name: Index(name, size) for name, size in zip(names, d.value(tensor).shape, strict=True)}
    value = d.element(tensor, tuple(poly(at[name]) for name in names))
    if len(value.terms) != 1:
        return None
    ((monomial, scale),) = value.terms.items()
    atoms = [(atom, power) for atom, power in monomial]
    if len(atoms) != 1 or atoms[0][1] != 1 or not isinstance(atoms[0][0], Element):
        return None
    atom = atoms[0][0]
    if atom.tensor != source.name or atom.index[:2] != (poly(at["b"]), poly(at["t"])):
        return None
    grid = {at["h"]: np.arange(wanted[0])[:, None], at["i"]: np.arange(wanted[1])[None, :]}
    features = evaluate(atom.index[2], grid)
    if features is None:
        return None
    return Operand(source, np.broadcast_to(features, wanted).astype(np.int64), float(scale))


def merged_below(d: Derivation, context: gs.Node, heads: int, size: int) -> gs.Tensor:
    """The tensor after the context product that holds it merged by heads: [batch, tokens, width] rather than flat."""
    found, tensor = [], context.outputs[0]
    for _ in range(4):
        users = g.consumers(tensor)
        if len(users) != 1 or users[0].op not in ("Transpose", "Reshape", "Identity", "Cast"):
            break
        tensor = users[0].outputs[0]
        shape = d.shape(tensor)
        if shape is not None and len(shape) in (2, 3) and shape[-1].integer == heads * size:
            found.append(tensor)
    if not found:
        raise Miss("its result is not merged by heads")
    for tensor in sorted(found, key=lambda t: -len(d.value(t).shape)):
        if _is_merged(d, tensor, context.outputs[0], heads, size):
            return tensor
    raise Miss("what follows the softmax is not softmax(q k) v merged by heads")


def _is_merged(d: Derivation, tensor: gs.Tensor, context: gs.Tensor, heads: int, size: int) -> bool:
    """tensor[b, t, f] is context[b, f // size, t, f % size]."""
    shape, tokens = d.value(tensor).shape, d.value(context).shape[2]
    place = tuple(poly(Index(name, extent)) for name, extent in zip("btf"[3 - len(shape) :], shape, strict=True))
    if len(shape) == 2:
        place = (poly(Index("n", shape[0])), place[1])
    value = d.element(tensor, place)
    atom = next(iter(value.atoms), None)
    if not isinstance(atom, Element) or value != poly(atom) or atom.tensor != context.name:
        return False
    batch, token = place[:2] if len(shape) == 3 else floor_divided(place[0], tokens)
    column = Index("f", shape[-1])
    grid = {column: np.arange(heads * size)}
    head, part = evaluate(atom.index[1], grid), evaluate(atom.index[3], grid)
    return (atom.index[0] == batch and atom.index[2] == token and head is not None and part is not None
            and bool((head == grid[column] // size).all() and (part == grid[column] % size).all()))  # fmt: skip
