"""Does anything after a native segment look at padding? Its rows are zeros there, not what the model would compute.

Followed from operator to operator. A tensor that comes from token rows still holds each row by itself, or the mask has
taken padding out of it, or only its first token is left. Whatever cannot be followed looks at padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import onnx_graphsurgeon as gs

from nmcompile.derive import Derivation, Underived
from nmcompile.derive.elementwise import ELEMENTWISE
from nmcompile.derive.movement import MOVEMENT, axes_of
from nmcompile.roles import HIDDEN
from nmcompile.symbolic import (
    ONE,
    ZERO,
    AtLeast,
    Element,
    Index,
    Infinity,
    IsZero,
    Poly,
    mentioned,
    poly,
    substitute,
)

FUNCTIONS = {"QuantizeLinear", "DequantizeLinear", "Dropout", "Identity"}  # of each element, beside ELEMENTWISE
FOLLOWED = set(MOVEMENT) - {"CumSum", "Concat"} | set(ELEMENTWISE) | FUNCTIONS
ALONG_LAST = {"LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "LpNormalization"}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ArgMax", "ArgMin"}


Content: TypeAlias = Literal["rows", "scores", "hidden", "probabilities"]


class Leak(Exception):
    """The operator at which padding gets into what is computed."""


@dataclass(frozen=True)
class Reading:
    """leak: where padding is read, "" where it is not. first: whether the first token is read, padding or not. keys:
    whether padding is hidden from another attention, which needs a key that is not."""

    leak: str = ""
    first: bool = False
    keys: bool = False


@dataclass(frozen=True)
class Rows:
    """Token rows lie along an axis, None where they are merged with others for the time being.

    holds: "rows" as they are, "scores" as keys of queries that are no such rows, "hidden" the same where the mask hides
    padding, "probabilities" after the softmax, where padding has none.
    """

    axis: int | None
    holds: Content = "rows"


def reads_padding(graph: gs.Graph, d: Derivation, mask: str, tensors: Sequence[str]) -> Reading:
    """What the graph makes of the rows of these token tensors, [batch, tokens, ...], where the mask is 0."""
    known = graph.tensors()
    sources = [known[name] for name in tensors if len(known[name].shape or []) == 3]
    walk = _Walk(d.cut(sources, graph.nodes), mask, {t.name: Rows(1) for t in sources})
    try:
        for node in graph.nodes:
            if any(x.name in walk.rows for x in node.inputs) and not any(y.name in walk.rows for y in node.outputs):
                walk.through(node)
        for tensor in graph.outputs:
            if walk.rows.get(tensor.name, Rows(1)) != Rows(1):
                raise Leak(f"output {tensor.name}")
    except (Leak, Underived) as stop:
        return Reading(str(stop), walk.first, walk.keys)
    return Reading("", walk.first, walk.keys)


class _Walk:
    """Which tensors hold token rows, and how, as one node after another is passed."""

    def __init__(self, d: Derivation, mask: str, rows: dict[str, Rows]) -> None:
        self.d, self.mask, self.rows = d, mask, rows
        self.roots = dict(rows)  # of them, those that stand for themselves in the derivation
        self.first = self.keys = False

    def through(self, node: gs.Node) -> None:
        if node.op in ("Shape", "Size"):
            return
        if node.op in FOLLOWED:
            for y in node.outputs:
                found = self._followed(node, y)
                if found is not None:
                    self.rows[y.name] = found
            return
        found = self._product(node) if node.op == "MatMul" else self._along(node)
        if found is not None:
            for y in node.outputs:
                self.rows[y.name] = self.roots[y.name] = found

    def _followed(self, node: gs.Node, y: gs.Tensor) -> Rows | None:
        """By the elements of what the node makes; None where the mask has taken padding out, or one token is left."""
        shape = self.d.value(y).shape
        place = tuple(ZERO if size == ONE else poly(Index(f"i{axis}", size)) for axis, size in enumerate(shape))
        value = self.d.element(y, place)
        if value == poly(Element(y.name, place, self.d.value(y).kind)):  # a function of elements, or what has no rule
            return self._function(node, y)
        hidden = self._without_padding(value)
        left = [atom for atom in mentioned(value) if isinstance(atom, Element) and atom.tensor in self.roots]
        kinds = {self.roots[atom.tensor].holds for atom in left}
        if kinds == {"rows"}:
            left = [atom for atom in left if atom in mentioned(hidden)]
        if not left:
            return None
        columns = {atom.index[self._axis(atom)] for atom in left}
        if columns == {ZERO} and kinds == {"rows"}:
            self.first = True
            return None
        picked = any(isinstance(atom, Element) for column in columns for atom in mentioned(column))
        if len(kinds) > 1 or picked or any(column.number is not None and column != ZERO for column in columns):
            raise Leak(f"{node.op} '{node.name}'")
        (holds,) = kinds
        if holds == "scores" and _vanishes(hidden):
            holds = "hidden"
        column = columns.pop()
        straight = not columns and column in place and all(atom.index[0] == place[0] for atom in left)
        return Rows(place.index(column) if straight else None, holds)

    def _axis(self, atom: Element) -> int:
        axis = self.roots[atom.tensor].axis
        assert axis is not None
        return axis

    def _without_padding(self, value: Poly) -> Poly:
        """The element where the mask is 0, in every row that it comes from."""
        found = mentioned(value)
        rows = {(atom.index[0], atom.index[self._axis(atom)]) for atom in found
                if isinstance(atom, Element) and atom.tensor in self.roots}  # fmt: skip
        masks = [atom for atom in found
                 if isinstance(atom, Element) and atom.tensor == self.mask and atom.index in rows]  # fmt: skip
        return substitute(value, {atom: ZERO for atom in masks})

    def _function(self, node: gs.Node, y: gs.Tensor) -> Rows:
        if node.op not in ELEMENTWISE and node.op not in FUNCTIONS:
            raise Leak(f"{node.op} '{node.name}'")
        entering = [x for x in node.inputs if x.name in self.rows]
        rank = len(self.d.value(y).shape)
        places = {(state.holds, None if state.axis is None else state.axis - len(self.d.value(x).shape))
                  for x in entering for state in [self.rows[x.name]]}  # fmt: skip
        (holds, back), *others = places
        if others or back is None or holds in ("scores", "hidden"):
            raise Leak(f"{node.op} '{node.name}'")
        self.roots[y.name] = Rows(rank + back, holds)
        return self.roots[y.name]

    def _product(self, node: gs.Node) -> Rows | None:
        """Rows times a matrix; queries times rows as keys; probabilities times rows as values."""
        ranks = [len(self.d.value(x).shape) for x in node.inputs]
        left, right = (self.rows.get(x.name) for x in node.inputs)
        by_matrix = right is None and ranks[1] == 2
        if left is not None and left.axis is not None and left.holds == "rows" and by_matrix:
            if left.axis > ranks[0] - 2:
                raise Leak(f"{node.op} '{node.name}'")
            return left
        if left is None and right == Rows(ranks[1] - 1):
            return Rows(len(self.d.value(node.outputs[0]).shape) - 1, "scores")
        if left == Rows(ranks[0] - 1, "probabilities") and right == Rows(ranks[1] - 2):
            self.keys = True
            return None
        raise Leak(f"{node.op} '{node.name}'")

    def _along(self, node: gs.Node) -> Rows:
        """Operators along other axes than the tokens', and the softmax over keys."""
        own = next(x for x in node.inputs if x.name in self.rows)
        state, shape = self.rows[own.name], self.d.value(own).shape
        last = node.attrs.get("axis", -1) in (-1, len(shape) - 1)
        if state.axis is not None and node.op in ALONG_LAST and last:
            if state.holds == "rows" and state.axis <= len(shape) - 2:
                return state
            if state.holds == "hidden" and node.op == "Softmax" and state.axis == len(shape) - 1:
                return Rows(state.axis, "probabilities")
        if state.axis is not None and state.holds == "rows" and node.op in REDUCTIONS:
            axes = self._reduced(node, len(shape))
            if axes and min(axes) > state.axis:
                return state
        raise Leak(f"{node.op} '{node.name}'")

    def _reduced(self, node: gs.Node, rank: int) -> list[int]:
        """The axes that a reduction goes over; none where they are all, or not known."""
        if node.op in ("ArgMax", "ArgMin"):
            axis = int(node.attrs.get("axis", 0))
            return [axis + rank * (axis < 0)]
        args = [None if x.is_empty() else self.d.value(x) for x in node.inputs]
        return axes_of(node, args, 1, rank) or []


def _vanishes(score: Poly) -> bool:
    """Whether so much is taken from a score that nothing is left of its probability."""
    added = 0.0
    for monomial, factor in score.terms.items():
        if all(isinstance(atom, Infinity) for atom, _ in monomial):
            added += float(factor) * (float("inf") if monomial else 1.0)
    return added <= HIDDEN and not any(isinstance(atom, (AtLeast, IsZero)) for atom in score.atoms)
