"""Derivation: one walk over a graph, operator by operator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.derive.elementwise import ELEMENTWISE
from nmcompile.derive.movement import MOVEMENT
from nmcompile.derive.sizes import SIZES
from nmcompile.derive.value import At, Shape, Underived, Value, constant, opaque
from nmcompile.symbolic import Poly, Size, poly

RULES = {**SIZES, **MOVEMENT, **ELEMENTWISE}
SAME = {"Identity", "Dropout"}


class Derivation:
    """What each tensor of a sorted graph holds; made once for a graph that does not change meanwhile.

    `why` says of a tensor without a shape at which operator its derivation stopped. `read`: the constants whose
    elements were asked for, and a checksum of what they held then; of others only the shapes count.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._values: dict[str, Value] = {}
        self.why: dict[str, str] = {}
        self.read: dict[str, tuple[gs.Constant, bytes]] = {}
        self._makers: dict[str, gs.Node] = {}
        self.inputs: dict[str, gs.Tensor] = {t.name: t for t in graph.inputs}
        for tensor in graph.inputs:
            self._input(tensor)
        for node in graph.nodes:
            self._node(node)

    # ---- asking ----

    def value(self, tensor: gs.Tensor) -> Value:
        """Underived, with the operator at which it stopped, where the tensor has no derived shape."""
        found = self._values.get(tensor.name)
        if found is None and isinstance(tensor, gs.Constant):
            found = self._values[tensor.name] = self._constant(tensor)
        if found is None:
            raise Underived(self.why.get(tensor.name, f"{tensor.name} is of no known shape"))
        return found

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """The derived shape, None where there is none."""
        try:
            return self.value(tensor).shape
        except Underived:
            return None

    def element(self, tensor: gs.Tensor, index: Sequence[Poly]) -> Poly:
        """The element at an index. Underived where there is no expression for it."""
        return self.value(tensor).element(index)

    def dims(self, tensor: gs.Tensor) -> list[int | str | None] | None:
        """The shape as the graph writes it: numbers, names of free dimensions, None for what is computed from them."""
        shape = self.shape(tensor)
        return None if shape is None else [_dim(size) for size in shape]

    def stopped(self, name: str) -> str:
        """The operator that makes a tensor which stands for itself: where following it ended."""
        node = self._makers.get(name)
        return name if node is None else f"{node.op} '{node.name}'"

    def cut(self, sources: Sequence[gs.Tensor], nodes: Sequence[gs.Node]) -> Derivation:
        """The same with each of `sources` an element of its own, and what `nodes`, producers first, make of them."""
        other = object.__new__(Derivation)
        other.__dict__ = {**self.__dict__, "_values": dict(self._values), "why": dict(self.why)}
        for source in sources:
            known = self.value(source)
            other._values[source.name] = opaque(source.name, known.shape, known.kind)
        names = {source.name for source in sources}
        for node in nodes:
            if not any(y.name in names for y in node.outputs):
                other._node(node)
        return other

    # ---- walking ----

    def _constant(self, tensor: gs.Constant) -> Value:
        def read() -> np.ndarray:
            values = np.asarray(tensor.values)  # now, not when the graph was walked: weights may be bound anew
            if tensor.name not in self.read:
                self.read[tensor.name] = tensor, checksum(values)
            return values

        values = np.asarray(tensor.values)
        return constant(tensor.name, values.shape, values.dtype.kind, read)

    def _input(self, tensor: gs.Tensor) -> None:
        if tensor.shape is None or tensor.dtype is None:
            self.why[tensor.name] = f"input {tensor.name} has no known rank"
            return
        sizes = (dim if isinstance(dim, (int, np.integer)) else dim or f"{tensor.name}.{axis}"
                 for axis, dim in enumerate(tensor.shape))  # fmt: skip
        shape = tuple(poly(Size(size)) if isinstance(size, str) else poly(int(size)) for size in sizes)
        self._values[tensor.name] = opaque(tensor.name, shape, _kind(tensor))

    def _node(self, node: gs.Node) -> None:
        made = [y for y in node.outputs if y.name]
        self._makers.update({y.name: node for y in made})
        try:
            values = self._derived(node)
        except Underived as stop:
            values = []
            reason = str(stop)
        except MALFORMED as error:
            values = []
            reason = f"{type(error).__name__}"
        else:
            reason = "no rule for it"
        for place, y in enumerate(node.outputs):
            if not y.name:
                continue
            value = values[place] if place < len(values) else None
            if value is None:
                fixed = _fixed(y)
                if fixed is not None:
                    self._values[y.name] = opaque(y.name, fixed, _kind(y))
                else:
                    text = reason if " '" in reason else f"{node.op} '{node.name}': {reason}"
                    self.why.setdefault(y.name, text)
            else:
                self._values[y.name] = value

    def _derived(self, node: gs.Node) -> list[Value | None]:
        """A value for each output, None where there is none."""
        if node.domain not in (None, "", "ai.onnx"):
            return []
        if node.op in SAME:
            return [self.value(node.inputs[0])]
        rule = RULES.get(node.op)
        if rule is None:
            return []
        args = [None if x.is_empty() else self.value(x) for x in node.inputs]
        found: list[Value | None] = []
        for y, (shape, at) in zip(node.outputs, rule(node, args), strict=False):
            kind = _kind(y)
            found.append(_made(y.name, shape, at, kind))
        return found


# what rules raise for attributes and inputs that the standard does not allow
MALFORMED = (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError)


def _made(name: str, shape: Shape, at: At | None, kind: str) -> Value:
    """With the rule's elements; where those stop, elements that stand for themselves."""
    itself = opaque(name, shape, kind)
    if at is None:
        return itself

    def element(index: Shape) -> Poly:
        try:
            return at(index)
        except (Underived, RecursionError, *MALFORMED):
            return itself.at(index)

    return Value(shape, kind, element)


def checksum(values: np.ndarray) -> bytes:
    """Of an array's elements, so that a constant which is written into is seen to have changed."""
    plain = repr(values.tolist()).encode() if values.dtype.hasobject else np.ascontiguousarray(values).tobytes()
    return hashlib.blake2b(plain, digest_size=16).digest()


def _kind(tensor: gs.Tensor) -> str:
    kind = np.dtype(tensor.dtype).kind if tensor.dtype is not None else "f"
    return "i" if kind == "u" else kind if kind in "bi" else "f"


def _fixed(tensor: gs.Tensor) -> Shape | None:
    """A shape of numbers alone, which inference proves from the operators' definitions."""
    if tensor.shape is None or any(not isinstance(dim, (int, np.integer)) for dim in tensor.shape):
        return None
    return tuple(poly(int(dim)) for dim in tensor.shape)


def _dim(size: Poly) -> int | str | None:
    if size.integer is not None:
        return size.integer
    if len(size.terms) == 1:
        ((monomial, factor),) = size.terms.items()
        ((atom, power),) = list(monomial) if len(monomial) == 1 else [(None, 0)]
        if isinstance(atom, Size) and power == factor == 1:
            return atom.name
    return None
