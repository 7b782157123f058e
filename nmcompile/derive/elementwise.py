"""Rules of operators that work element by element, on numbers and conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import onnx_graphsurgeon as gs

from nmcompile.derive.value import At, Shape, Underived, Value, aligned, broadcast
from nmcompile.symbolic import (
    ONE,
    Element,
    Infinity,
    Poly,
    above_zero,
    at_least_zero,
    floor_divided,
    is_zero,
    never_negative,
    poly,
)

Made = list[tuple[Shape, At | None]]
Rule = Callable[[gs.Node, Sequence[Value | None]], Made]
HALF = 65504.0  # the largest number of half precision
FLOATS = {1, 10, 11, 16}  # onnx.TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16


def given(args: Sequence[Value | None], place: int) -> Value:
    """An input that must be there."""
    value = args[place] if place < len(args) else None
    if value is None:
        raise Underived("it lacks an input")
    return value


def _combined(node: gs.Node, args: Sequence[Value | None], combine: Callable[..., Poly]) -> Made:
    values = [given(args, place) for place in range(len(args))]
    shape = broadcast(*(value.shape for value in values))
    return [(shape, lambda index: combine(*(aligned(value, index) for value in values)))]


def _elementwise(combine: Callable[..., Poly]) -> Rule:
    return lambda node, args: _combined(node, args, combine)


def _sum(*values: Poly) -> Poly:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _product(a: Poly, b: Poly) -> Poly:
    for x, other in ((a, b), (b, a)):
        if any(isinstance(atom, Infinity) for atom in x.atoms) and (other.number is None or other.number <= 0):
            raise Underived("infinity times what may be 0")
    return a * b


def _quotient(node: gs.Node, args: Sequence[Value | None]) -> Made:
    whole = given(args, 0).kind == "i"

    def divide(a: Poly, b: Poly) -> Poly:
        if whole:  # rounds towards 0, which is down where both are positive
            if not never_negative(a) or not never_negative(b - 1):
                raise Underived("a quotient of integers that may be negative")
            return floor_divided(a, b)[0]
        divisor = b.number
        if not divisor:
            raise Underived("a quotient by what is not constant")
        return a * (1 / Fraction(divisor))

    return _combined(node, args, divide)


def _modulo(node: gs.Node, args: Sequence[Value | None]) -> Made:
    def remainder(a: Poly, b: Poly) -> Poly:
        if not a.whole or not b.whole or not never_negative(b - 1):
            raise Underived("a remainder of what is no integer")
        if node.attrs.get("fmod", 0) and not never_negative(a):
            raise Underived("a remainder of what may be negative")
        return floor_divided(a, b)[1]

    return _combined(node, args, remainder)


def _lesser(*values: Poly) -> Poly:
    best = values[0]
    for value in values[1:]:  # min(x, y) = y + [y >= x] (x - y)
        best = value + at_least_zero(value - best) * (best - value)
    return best


def _greater(*values: Poly) -> Poly:
    return -_lesser(*(-value for value in values))


def _clip(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    low, high = (args[place].element(()) if place < len(args) and args[place] is not None else None  # type: ignore[union-attr]
                 for place in (1, 2))  # fmt: skip

    def clipped(index: Shape) -> Poly:
        value = x.element(index)
        value = value if low is None else _greater(value, low)
        return value if high is None else _lesser(value, high)

    return [(x.shape, clipped)]


def _where(condition: Poly, yes: Poly, no: Poly) -> Poly:
    return no + condition * (yes - no)


def _either(a: Poly, b: Poly) -> Poly:
    return a + b - a * b


def _cast(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    to = int(node.attrs["to"])

    def cast(index: Shape) -> Poly:
        value = x.element(index)
        if to == 9:  # BOOL
            return value if x.kind == "b" else ONE - is_zero(value)
        if to in FLOATS:
            if to == 10 and any(abs(float(factor)) > HALF for factor in value.terms.values()):
                raise Underived("a number beyond half precision")
            if to == 10 and any(isinstance(atom, Element) and atom.kind == "f" for atom in value.atoms):
                raise Underived("a cast to half precision, which may round to 0")
            return value
        # INT32, INT64; others wrap around, and so does INT32 beyond 2**31, where no id, size or mask is meant to be
        if to not in (6, 7) or not value.whole:
            raise Underived("a cast that may change the number")
        return value

    return [(x.shape, cast)]


def _root(x: Poly) -> Poly:
    value = x.number
    if value is None or value < 0:
        raise Underived("a root of what is not constant")
    return poly(math.sqrt(float(value)))


def _power(base: Poly, exponent: Poly) -> Poly:
    a, b = base.number, exponent.number
    if a is None or b is None or (a <= 0 and b != int(b)):
        raise Underived("a power of what is not constant")
    return poly(float(a) ** float(b))


def _reciprocal(x: Poly) -> Poly:
    value = x.number
    if not value:
        raise Underived("one over what is not constant")
    return poly(1 / Fraction(value))


def _magnitude(x: Poly) -> Poly:
    if not x.whole:
        raise Underived("a magnitude of what is no integer")
    return x * 2 * at_least_zero(x) - x


def _rounded(x: Poly) -> Poly:
    if not x.whole:
        raise Underived("a rounded fraction")
    return x


def _not(x: Poly) -> Poly:
    return ONE - x


ELEMENTWISE: dict[str, Rule] = {
    "Add": _elementwise(_sum),
    "Sum": _elementwise(_sum),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(_product),
    "Div": _quotient,
    "Mod": _modulo,
    "Neg": _elementwise(lambda x: -x),
    "Abs": _elementwise(_magnitude),
    "Floor": _elementwise(_rounded),
    "Ceil": _elementwise(_rounded),
    "Round": _elementwise(_rounded),
    "Sqrt": _elementwise(_root),
    "Pow": _elementwise(_power),
    "Reciprocal": _elementwise(_reciprocal),
    "Min": _elementwise(_lesser),
    "Max": _elementwise(_greater),
    "Clip": _clip,
    "Where": _elementwise(_where),
    "Cast": _cast,
    "CastLike": lambda node, args: [(given(args, 0).shape, None)],
    "And": _elementwise(lambda a, b: a * b),
    "Or": _elementwise(_either),
    "Xor": _elementwise(lambda a, b: a + b - a * b * 2),
    "Not": _elementwise(_not),
    "Equal": _elementwise(lambda a, b: is_zero(a - b)),
    "Less": _elementwise(lambda a, b: above_zero(b - a)),
    "LessOrEqual": _elementwise(lambda a, b: at_least_zero(b - a)),
    "Greater": _elementwise(lambda a, b: above_zero(a - b)),
    "GreaterOrEqual": _elementwise(lambda a, b: at_least_zero(a - b)),
    "Tanh": _elementwise(lambda x: _opaque()),
}


def _opaque() -> Poly:
    raise Underived("a function of floats")


ELEMENTWISE.update({
    op: ELEMENTWISE["Tanh"]
    for op in ("Erf", "Exp", "Log", "Sigmoid", "Relu", "Gelu", "Sin", "Cos", "IsNaN", "IsInf", "HardSwish", "Elu",
               "LeakyRelu", "Softplus", "HardSigmoid", "Sign", "PRelu", "BitShift", "BitwiseAnd", "BitwiseNot",
               "BitwiseOr", "Selu", "Softsign", "Mish", "Swish", "Atan", "Tan", "Celu", "ThresholdedRelu")
})  # fmt: skip
