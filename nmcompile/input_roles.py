"""What each input of a graph is for, by what the graph does with it; by its name where that tells nothing.

An input whose elements index a table is ids, positions or types; one that hides scores of an attention, or takes tokens
out of a mean, is a mask, and what it keeps is derived; one that new keys or values are joined to is a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.derive import Derivation, Underived
from nmcompile.ir.edit import subgraph_tensors
from nmcompile.roles import HIDDEN, HIDES, Role, by_name, called_ids
from nmcompile.symbolic import (
    ONE,
    ZERO,
    AtLeast,
    Atom,
    Element,
    Index,
    Infinity,
    IsZero,
    Poly,
    mentioned,
    poly,
    substitute,
)
from nmcompile.tensorinfo import TensorInfo

FEW_TYPES = 16  # rows that a table of types has at most
MAX_CONDITIONS = 6  # that a mask is taken apart by

SAME = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice"}
MOVED = {*SAME, "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Clip", "Min", "Max", "Mod", "Where", "Tile", "Concat",
         "Split"}  # fmt: skip
PRODUCTS = {"MatMul", "Gemm", "Einsum"}
CACHED = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Slice", "Expand"}

# (operator, its input): the table that a fused operator looks this input up in, as another of its inputs
TABLES = {("EmbedLayerNormalization", 0): 2, ("EmbedLayerNormalization", 1): 4, ("EmbedLayerNormalization", 8): 3}
WAVES = {("Cos", 0), ("Sin", 0), ("RotaryEmbedding", 1), ("RotaryEmbedding", 3)}  # what turns by an angle per position
# what hides where it is 0, and what is added to scores (or hides where it is False)
PADDED = {("Attention", 3), ("MultiHeadAttention", 4), ("EmbedLayerNormalization", 7)}
ADDED = {("Attention", 3), ("Attention", 5), ("MultiHeadAttention", 5)}
PAST = {("Attention", 4), ("Attention", 5), ("MultiHeadAttention", 6), ("MultiHeadAttention", 7),
        ("GroupQueryAttention", 3), ("GroupQueryAttention", 4)}  # fmt: skip
MICROSOFT = "com.microsoft"


def inputs(graph: gs.Graph) -> tuple[TensorInfo, ...]:
    """What a sorted graph takes, each input with its role."""
    infos = g.inputs(graph)
    uses = _Uses(graph, infos)
    found: dict[str, Role] = {**uses.looked_up(), **uses.caches()}
    masks = uses.masks([info for info in infos if info.name not in found])
    roles = {**masks, **found}
    return tuple(replace(info, role=roles.get(info.name) or by_name(info)) for info in infos)


@dataclass(frozen=True)
class _Lookup:
    """rows of the table; exact: by the input's elements as they are; result: the tensor that is looked up; waves: the
    table holds sines or cosines of positions."""

    rows: int
    exact: bool
    result: gs.Tensor | None
    waves: bool


class _Uses:
    """What a graph does with its inputs. `_valued`: tensors that depend on what inputs hold, and not on sizes alone."""

    def __init__(self, graph: gs.Graph, infos: Sequence[TensorInfo]) -> None:
        self._graph, self._infos = graph, infos
        self._tensors: dict[str, gs.Tensor] = {t.name: t for t in graph.inputs}
        self._valued = _valued(graph)

    # ---- what is looked up ----

    def looked_up(self) -> dict[str, Role]:
        """Ids, positions and types: told apart by the tables, and by names where these leave it open."""
        lookups: dict[str, list[_Lookup]] = {}
        turned: set[str] = set()
        for info in self._infos:
            if info.dtype.kind in "iu":
                found, waves = self._lookups(self._tensors[info.name])
                lookups |= {info.name: found} if found else {}
                turned |= {info.name} if waves or any(item.waves for item in found) else set()
        rows = {name: max(item.rows for item in found) for name, found in lookups.items()}
        roles = {}
        for info in self._infos:
            if info.name not in lookups and info.name not in turned:
                continue
            exact = [item.rows for item in lookups.get(info.name, ()) if item.exact]
            kind = "positions" if info.name in turned else self._kind(info, rows, lookups)
            roles[info.name] = Role(kind, min(exact, default=None))
        return roles

    def _kind(self, info: TensorInfo, rows: Mapping[str, int], lookups: Mapping[str, Sequence[_Lookup]]) -> str:
        own, most = rows[info.name], max(rows.values())
        named = by_name(info).kind
        if named == "positions" or (named == "types" and (own <= FEW_TYPES or own < most)):
            return named
        if own == most or len(info.shape) > 2 or called_ids(info):
            return "ids"
        if own <= FEW_TYPES:
            return "types"
        largest = [item for name, found in lookups.items() if rows[name] == most for item in found]
        return "positions" if any(_summed(a, b) for a in lookups[info.name] for b in largest) else "ids"

    def _lookups(self, tensor: gs.Tensor) -> tuple[list[_Lookup], bool]:
        """(where the values of an input are looked up, whether they turn by an angle)."""
        found, waves = [], False
        for node, place, exact in self._flow(tensor, MOVED | PRODUCTS):
            waves = waves or (node.op, place) in WAVES
            table, axis = self._table(node, place)
            size = None if table is None else _rows(table, axis)
            if size is not None:
                result = node.outputs[0] if node.op == "Gather" else None
                exact = exact and node.op != "OneHot"  # which gives nothing for what it has no row of
                found.append(_Lookup(size, exact, result, table is not None and _of_waves(table)))
        return found, waves

    def _table(self, node: gs.Node, place: int) -> tuple[gs.Tensor | None, int]:
        """(the table that an operator looks its input up in, along which axis)."""
        if node.op == "OneHot" and place == 0:
            return node.inputs[1], -1
        if node.op in ("Gather", "GatherElements") and place == 1:
            table, axis = node.inputs[0], int(node.attrs.get("axis", 0))
            flat = len(table.shape or ()) == 1 and table.dtype is not None and np.dtype(table.dtype).kind not in "iu"
            return (None if table.name in self._valued or flat else table), axis
        where = TABLES.get((node.op, place))
        return (None, 0) if where is None or where >= len(node.inputs) else (node.inputs[where], 0)

    def _flow(self, tensor: gs.Tensor, through: set[str]) -> Iterator[tuple[gs.Node, int, bool]]:
        """Where the values of a tensor go, moved, or changed by what no input holds: (node, which of its inputs,
        whether they are as they were)."""
        todo, seen = [(tensor, True)], {tensor.name}
        while todo:
            tensor, exact = todo.pop()
            for node in dict((id(n), n) for n in g.consumers(tensor)).values():
                for place, x in enumerate(node.inputs):
                    if x is not tensor:
                        continue
                    yield node, place, exact
                    if self._passes(node, place, through):
                        same = exact and node.op in {*SAME, "Concat", "Split", "Tile"}
                        todo += [(y, same) for y in node.outputs if y.name and y.name not in seen]
                        seen |= {y.name for y in node.outputs}

    def _passes(self, node: gs.Node, place: int, through: set[str]) -> bool:
        if node.op in ("Gather", "GatherElements", "GatherND") and place == 0:  # some of them
            return True
        if node.op == "Gather" and place == 1:  # ids that become others
            table = node.inputs[0]
            return table.name not in self._valued and len(table.shape or ()) == 1 and _integers(table)
        if node.op not in through or (node.op == "Where" and place == 0) or (node.op in SAME and place > 0):
            return False
        others = [x for i, x in enumerate(node.inputs) if i != place]
        free = node.op in ("Where", "Concat") or node.op in SAME
        return free or not any(x.name in self._valued for x in others)

    # ---- caches ----

    def caches(self) -> dict[str, Role]:
        """Numbers [batch, heads, tokens, size] that others, which are computed, are joined to."""
        found = {}
        for info in self._infos:
            if info.dtype.kind not in "fV" or len(info.shape) != 4:
                continue
            if any(self._joined(node, place) for node, place, _ in self._flow(self._tensors[info.name], CACHED)):
                found[info.name] = Role("cache")
        return found

    def _joined(self, node: gs.Node, place: int) -> bool:
        if (node.op, place) in PAST:
            return node.op != "Attention" or place == 4 or node.domain != MICROSOFT
        computed = any(x.name in self._valued and x.name not in self._tensors
                       for i, x in enumerate(node.inputs) if i != place)  # fmt: skip
        return node.op == "Concat" and int(node.attrs.get("axis", 0)) in (2, -2) and computed

    # ---- masks ----

    def masks(self, infos: Sequence[TensorInfo]) -> dict[str, Role]:
        """Of these inputs, those that hide scores, or features of tokens."""
        left = {info.name: info for info in infos if len(info.shape) >= 2 and info.dtype.kind in "biufV"}
        reached = {name: [*self._reached(self._tensors[name])] for name in left}
        found: dict[str, Role] = {}
        if not any(reached.values()):
            return found
        d = Derivation(self._graph)
        for name, ports in reached.items():
            for port in ports:
                keeps = _keeps(d, left[name], port)
                if keeps is not None:
                    found[name] = Role("mask", keeps=keeps)
                    break
        return found

    def _reached(self, tensor: gs.Tensor) -> Iterator[_Port]:
        """Where a tensor hides: in softmax, in attention, and in products of features with a factor for each token."""
        todo, seen, pooled, whole = [tensor], {tensor.name}, [], _integers(tensor)
        while todo:
            here = todo.pop(0)
            for node in dict((id(n), n) for n in g.consumers(here)).values():
                for place, x in enumerate(node.inputs):
                    if x is not here:
                        continue
                    port = _port(node, place, x)
                    if port is not None:
                        yield port
                    elif whole and node.op in ("Mul", "Where") and self._of_features(node, place, seen):
                        pooled.append(_factor(node, place))
                    if port is None and node.op not in STOPS:
                        todo += [y for y in node.outputs if y.name and y.name not in seen]
                        seen |= {y.name for y in node.outputs}
        yield from pooled

    def _of_features(self, node: gs.Node, place: int, seen: set[str]) -> bool:
        """Whether another operand is [batch, tokens, features] that are computed, and not from this one."""
        if node.op == "Where" and place > 0:
            return False
        others = [x for i, x in enumerate(node.inputs) if i != place]
        return any(x.name in self._valued and x.name not in seen and len(x.shape or ()) == 3 and not _integers(x)
                   for x in others)  # fmt: skip


def _valued(graph: gs.Graph) -> set[str]:
    found = {t.name for t in graph.inputs}
    for node in graph.nodes:
        inner = subgraph_tensors(node)
        if node.op not in ("Shape", "Size") and any(x.name in found for x in (*node.inputs, *inner)):
            found |= {y.name for y in node.outputs if y.name}
    return found


def _integers(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iub"


def _rows(table: gs.Tensor, axis: int) -> int | None:
    """How many rows a table has, or says that it has (OneHot's depth)."""
    if axis == -1 and not table.shape:
        depth = g.constant(table)
        return None if depth is None or depth.size != 1 else int(depth.reshape(()))
    shape = table.shape or ()
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    return int(size) if isinstance(size, (int, np.integer)) else None


def _of_waves(table: gs.Tensor) -> bool:
    """Sines or cosines of 0, 1, 2, ... times frequencies: the first row holds 0 and 1, none holds more than 1."""
    values = g.constant(table)
    if values is None or values.ndim < 2 or values.dtype.kind != "f" or len(values) < 2 or not values.size:
        return False
    return bool(np.isin(values[0], (0, 1)).all() and np.abs(values).max() <= 1 and np.any(values[1] != values[0]))


def _summed(one: _Lookup, other: _Lookup) -> bool:
    """Whether two lookups meet in a sum: rows of one are added to rows of the other."""
    if one.result is None or other.result is None:
        return one.result is other.result  # of one fused operator
    reached = [_elementwise(item.result) for item in (one, other) if item.result is not None]
    return bool(reached[0] & reached[1])


def _elementwise(tensor: gs.Tensor) -> set[int]:
    """The nodes Add that a tensor reaches through sums and factors."""
    todo, found = [tensor], set()
    while todo:
        for node in g.consumers(todo.pop()):
            if node.op not in (*CACHED, "Add", "Mul", "Dropout", "DequantizeLinear") or id(node) in found:
                continue
            found |= {id(node)} if node.op == "Add" else set()
            todo += node.outputs
    return found


# ---- what a mask keeps ---------------------------------------------------------------------------------------------

# Operators that make tokens' features or other numbers of what they read, beyond which nothing is a mask by itself.
STOPS = {"MatMul", "Gemm", "Einsum", "Conv", "FusedMatMul", "LSTM", "GRU", "LayerNormalization", "RMSNormalization",
         "SkipLayerNormalization", "Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention",
         "EmbedLayerNormalization", "Shape", "Size", "ReduceSum", "ReduceMean", "ReduceMax", "TopK", "Gelu", "Erf",
         "Tanh"}  # fmt: skip


@dataclass(frozen=True)
class _Port:
    """A tensor that hides. shown: whether it does not, of (its number, how often infinity is added); scores: whether
    masks that are added may be there."""

    tensor: gs.Tensor
    shown: Callable[[float, float], bool]
    scores: bool = True


def _seen(number: float, endless: float) -> bool:
    return endless >= 0 and number > HIDDEN


def _positive(number: float, endless: float) -> bool:
    return endless >= 0 and number > 0


def _port(node: gs.Node, place: int, x: gs.Tensor) -> _Port | None:
    if node.op == "Softmax":
        return _Port(x, _seen)
    here, microsoft = (node.op, place), node.domain == MICROSOFT
    if here in ADDED and (microsoft == (here != ("Attention", 3))):
        return _Port(x, _positive, False) if x.dtype is not None and np.dtype(x.dtype).kind == "b" else _Port(x, _seen)
    return _Port(x, _positive, False) if here in PADDED and microsoft else None


def _factor(node: gs.Node, place: int) -> _Port:
    """Features times a factor, or chosen by a condition: where it does not hold, if they are the second choice."""
    if node.op == "Where" and g.constant(node.inputs[1]) is not None:
        return _Port(node.inputs[place], lambda number, endless: number == 0, False)
    return _Port(node.inputs[place], lambda number, endless: number != 0, False)


def _keeps(d: Derivation, info: TensorInfo, port: _Port) -> str | None:
    """At which values of an input a token is seen there; None where that does not depend on them."""
    joined = g.producer(port.tensor)  # scores of an operator without a rule have no shape; what is added to them has
    tensors = [port.tensor, *(joined.inputs if joined is not None and joined.op == "Add" and port.scores else ())]
    return next(filter(None, (_keeps_in(d, info, replace(port, tensor=tensor)) for tensor in tensors)), None)


def _keeps_in(d: Derivation, info: TensorInfo, port: _Port) -> str | None:
    shape = d.shape(port.tensor)
    if shape is None:
        return None
    place = tuple(ZERO if size == ONE else poly(Index(f"i{axis}", size)) for axis, size in enumerate(shape))
    try:
        value = d.element(port.tensor, place)
        own = [atom for atom in mentioned(value) if isinstance(atom, Element) and atom.tensor == info.name]
        if len(own) != 1:
            return None
        shown = {number: _shown(value, own[0], number, port) for number in (0.0, 1.0)}
        if shown[1.0] != shown[0.0]:
            return None if None in shown.values() else "nonzero" if shown[1.0] else "zero"
        added = info.dtype.kind in "fV" and port.scores and _spread(own[0], place)
        return "added" if added and shown[0.0] and _shown(value, own[0], HIDES, port) is False else None
    except (Underived, RecursionError):
        return None


def _spread(atom: Element, place: Sequence[Poly]) -> bool:
    """Whether all heads or all queries read the same element, of scores [..., heads, queries, keys]."""
    axes = (-3, -2) if len(place) > 3 else (-2,) if len(place) == 3 else ()
    return any(place[axis] == ZERO or place[axis] not in atom.index for axis in axes)


def _shown(value: Poly, atom: Element, number: float, port: _Port) -> bool | None:
    """Whether any choice of the other conditions leaves it shown, with this value of the mask; None where they are too
    many, or what is left is no number."""
    whole = int(number)
    value = substitute(value, {atom: poly(whole)})
    others = [other for other in mentioned(value) if isinstance(other, Element)]
    flags: list[Atom] = [other for other in others if other.kind != "f"]
    value = substitute(value, {other: ZERO for other in others if other.kind == "f"})
    flags = [other for other in flags if other in mentioned(value)]
    if len(flags) > MAX_CONDITIONS:
        return None
    for bits in itertools.product((0, 1), repeat=len(flags)):
        case = substitute(value, {flag: poly(bit) for flag, bit in zip(flags, bits, strict=True)})
        places: list[Atom] = [a for a in case.atoms if isinstance(a, (AtLeast, IsZero))]
        if len(flags) + len(places) > MAX_CONDITIONS:
            return None
        for more in itertools.product((0, 1), repeat=len(places)):
            end = substitute(case, {a: poly(bit) for a, bit in zip(places, more, strict=True)})
            added = sum(float(factor) for monomial, factor in end.terms.items() if not monomial)
            endless = sum(float(f) for monomial, f in end.terms.items() if monomial == frozenset({(Infinity(), 1)}))
            if port.shown(added, endless):
                return True
    return False
