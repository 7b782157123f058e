"""Does anything after a native segment look at padding? Its rows are zeros there, not what the model would compute.

Followed from operator to operator: a tensor that comes from token rows either still holds each row by itself, or padding
has been taken out of it by the mask, or only its first token is left. Whatever cannot be followed looks at padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile.derive import Derivation, Underived
from nmcompile.derive.value import aligned
from nmcompile.symbolic import ONE, ZERO, Element, Index, Poly, mentioned, poly, substitute

BY_ELEMENT = {"Relu", "Tanh", "Sigmoid", "Gelu", "Erf", "Exp", "Neg", "Sqrt", "Abs", "Identity", "Dropout", "Cast", "Elu",
              "LeakyRelu", "HardSwish", "Pow", "Add", "Sub", "Div", "Clip", "QuantizeLinear", "DequantizeLinear",
              "Softplus", "Reciprocal", "Sin", "Cos", "Min", "Max"}  # fmt: skip
ALONG_LAST = {"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "LpNormalization"}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ArgMax", "ArgMin"}


class Leak(Exception):
    """The operator at which padding gets into what is computed."""


@dataclass(frozen=True)
class Reading:
    """leak: where padding is read, "" where it is not. first: whether the first token is, padding or not."""

    leak: str = ""
    first: bool = False


def reads_padding(graph: gs.Graph, d: Derivation, mask: str, tensors: Sequence[str]) -> Reading:
    """What the graph makes of the rows of these token tensors, [batch, tokens, ...], where the mask is 0."""
    known = graph.tensors()
    rows = {name: 1 for name in tensors if len(known[name].shape or []) == 3}  # tensor -> the axis its tokens lie along
    first = False
    try:
        for node in graph.nodes:
            entering = {x.name for x in node.inputs if x.name in rows}
            if not entering or any(y.name in rows for y in node.outputs):
                continue
            axis, reads_first = _through(d, node, rows, mask)
            first = first or reads_first
            if axis is not None:
                rows.update({y.name: axis for y in node.outputs if y.name})
        for tensor in graph.outputs:
            if rows.get(tensor.name, 1) != 1:
                return Reading(f"output {tensor.name}", first)
    except (Leak, Underived) as stop:
        return Reading(str(stop), first)
    return Reading("", first)


def _through(d: Derivation, node: gs.Node, rows: dict[str, int], mask: str) -> tuple[int | None, bool]:
    """(the axis of tokens in what the node makes, None where padding is out of it; whether it takes the first token)"""
    own = next(x for x in node.inputs if x.name in rows)
    axis, shape = rows[own.name], d.value(own).shape
    back = axis - len(shape)  # counted from the end
    name = f"{node.op} '{node.name}'"
    if node.op in ("Shape", "Size"):
        return None, False
    if node.op in ("Mul", "Where", *BY_ELEMENT):
        rank = len(d.value(node.outputs[0]).shape)
        if any(rows[x.name] - len(d.value(x).shape) != back for x in node.inputs if x.name in rows):
            raise Leak(name)
        if node.op in ("Mul", "Where") and _hides(d, node, rows, mask, back):
            return None, False
        return rank + back, False
    if node.op == "MatMul" and node.inputs[0] is own and node.inputs[1].name not in rows and back <= -2:
        if len(d.value(node.inputs[1]).shape) == 2:
            return axis, False
    if node.op in ALONG_LAST and node.attrs.get("axis", -1) in (-1, len(shape) - 1) and back <= -2:
        return axis, False
    if node.op in ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand"):
        after = d.value(node.outputs[0]).shape
        if after[: axis + 1] == shape[: axis + 1]:
            return axis, False
    if node.op == "Transpose":
        perm = list(node.attrs.get("perm", range(len(shape))[::-1]))
        return perm.index(axis), False
    if node.op in ("Split", "Concat", "Gather", "Slice") or node.op in REDUCTIONS:
        found = _part(d, node, axis, shape)
        if found is not None:
            return found
    raise Leak(name)


def _part(d: Derivation, node: gs.Node, axis: int, shape: Sequence[Poly]) -> tuple[int | None, bool] | None:
    """What picks or reduces along other axes leaves the rows; a Gather or Slice may take the first token."""
    after = d.value(node.outputs[0]).shape
    along = int(node.attrs.get("axis", 0))
    along += len(shape) * (along < 0)
    if node.op in ("Split", "Concat"):
        return (axis, False) if along != axis else None
    if node.op == "Gather":
        index = g.constant(node.inputs[1])
        if along == axis:
            return (None, True) if index is not None and not index.any() else None
        rank = 1 if index is None else index.ndim
        return (axis if along > axis else axis + rank - 1), False
    if node.op == "Slice":
        if after[axis] == shape[axis]:
            return axis, False
        starts, ends = g.constant(node.inputs[1]), g.constant(node.inputs[2])
        plain = starts is not None and ends is not None and starts.size == 1 and not starts.any()
        return (None, True) if plain and after[axis] == ONE else None
    reduced = len(shape) - len(after)
    if reduced == 0:
        return (axis, False) if after[axis] == shape[axis] and shape[axis] != ONE else None
    return (axis, False) if after[: axis + 1] == tuple(shape[: axis + 1]) else None


def _hides(d: Derivation, node: gs.Node, rows: dict[str, int], mask: str, back: int) -> bool:
    """Whether the mask takes padding out: a factor that is 0 there, or a choice that takes the other side there."""
    shape = d.value(node.outputs[0]).shape
    place = tuple(ZERO if size == ONE else poly(Index(f"i{axis}", size)) for axis, size in enumerate(shape))
    others = [x for x in node.inputs if x.name not in rows]
    if node.op == "Where":
        others = [node.inputs[0]] if node.inputs[0].name not in rows else []
    for x in others:
        try:
            value = aligned(d.value(x), place)
        except Underived:
            continue
        here = [atom for atom in mentioned(value) if isinstance(atom, Element) and atom.tensor == mask
                and atom.index == (place[0], place[len(shape) + back])]  # fmt: skip
        hidden = substitute(value, {atom: ZERO for atom in here})
        if not here or hidden.number is None:
            continue
        if node.op == "Mul":
            return hidden.number == 0
        chosen = node.inputs[1 if hidden.number else 2]
        return chosen.name not in rows
    return False
