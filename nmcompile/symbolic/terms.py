"""Atoms, polynomials over them, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeAlias

Number: TypeAlias = "int | float | Fraction"


@dataclass(frozen=True)
class Size:
    """A free dimension of the graph's inputs, by name; at least 1."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Index:
    """Where along an axis: 0 <= index < extent."""

    name: str
    extent: Poly

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Element:
    """An element of a tensor that is not looked into: an input, a table, what a layer computes.

    kind: "b", "i" or "f", as numpy names them.
    """

    tensor: str
    index: tuple[Poly, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class AtLeast:
    """1 where the polynomial is >= 0, else 0."""

    value: Poly

    def __str__(self) -> str:
        return f"({self.value} >= 0)"


@dataclass(frozen=True)
class IsZero:
    """1 where the polynomial is 0, else 0."""

    value: Poly

    def __str__(self) -> str:
        return f"({self.value} == 0)"


@dataclass(frozen=True)
class Quotient:
    """The polynomial divided by another, rounded down."""

    value: Poly
    by: Poly

    def __str__(self) -> str:
        return f"({self.value} // {self.by})"


@dataclass(frozen=True)
class Remainder:
    """What is left of that division: 0 <= remainder < by."""

    value: Poly
    by: Poly

    def __str__(self) -> str:
        return f"({self.value} % {self.by})"


@dataclass(frozen=True)
class Least:
    """The least of two polynomials."""

    values: frozenset[Poly]

    def __str__(self) -> str:
        return f"min({', '.join(sorted(map(str, self.values)))})"


@dataclass(frozen=True)
class Running:
    """The sum of `term` over its index `over` from 0 to `last`, as CumSum gives it."""

    term: Poly
    over: Index
    last: Poly

    def __str__(self) -> str:
        return f"sum({self.term} for {self.over} <= {self.last})"


@dataclass(frozen=True)
class Infinity:
    """Larger than every number; only ever a summand."""

    def __str__(self) -> str:
        return "inf"


Atom: TypeAlias = "Size | Index | Element | AtLeast | IsZero | Quotient | Remainder | Least | Running | Infinity"
Monomial: TypeAlias = "frozenset[tuple[Atom, int]]"  # atoms with their powers
UNIT: Monomial = frozenset()


def is_condition(atom: Atom) -> bool:
    """Whether the atom is 0 or 1, so that its powers are itself."""
    return isinstance(atom, (AtLeast, IsZero)) or (isinstance(atom, Element) and atom.kind == "b")


class Poly:
    """An immutable polynomial; `terms` maps monomials to coefficients that are not 0."""

    __slots__ = ("__dict__", "_hash", "terms")

    def __init__(self, terms: Mapping[Monomial, Number]) -> None:
        self.terms = {monomial: factor for monomial, factor in terms.items() if factor != 0}
        self._hash = hash(frozenset(self.terms.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Poly) and self._hash == other._hash and self.terms == other.terms

    def __add__(self, other: Poly | Number) -> Poly:
        terms = dict(self.terms)
        for monomial, factor in poly(other).terms.items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return Poly(terms)

    def __neg__(self) -> Poly:
        return Poly({monomial: -factor for monomial, factor in self.terms.items()})

    def __sub__(self, other: Poly | Number) -> Poly:
        return self + -poly(other)

    def __mul__(self, other: Poly | Number) -> Poly:
        terms: dict[Monomial, Number] = {}
        for a, x in self.terms.items():
            for b, y in poly(other).terms.items():
                product = _product(a, b)
                terms[product] = terms.get(product, 0) + x * y
        return Poly(terms)

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """The atoms of its monomials, not those inside of atoms."""
        return frozenset(atom for monomial in self.terms for atom, _ in monomial)

    @property
    def number(self) -> Number | None:
        """Its value where it is a constant."""
        if not self.terms:
            return 0
        return self.terms[UNIT] if len(self.terms) == 1 and UNIT in self.terms else None

    @property
    def integer(self) -> int | None:
        """Its value where it is a constant integer."""
        value = self.number
        return None if value is None or value != int(value) else int(value)

    @cached_property
    def whole(self) -> bool:
        """Whether it can only be an integer."""
        plain = all(factor == int(factor) for factor in self.terms.values())
        return plain and not any(
            isinstance(a, Infinity) or (isinstance(a, Element) and a.kind == "f")
            or (isinstance(a, Running) and not a.term.whole) for a in self.atoms)  # fmt: skip

    @cached_property
    def text(self) -> str:
        parts = sorted((monomial_text(monomial), factor) for monomial, factor in self.terms.items())
        return " + ".join(_term_text(text, factor) for text, factor in reversed(parts)).replace("+ -", "- ") or "0"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Poly({self.text})"


def monomial_text(monomial: Monomial) -> str:
    return "*".join(sorted(str(atom) if power == 1 else f"{atom}^{power}" for atom, power in monomial))


def _term_text(text: str, factor: Number) -> str:
    number = str(factor) if isinstance(factor, int) and abs(factor) < 1 << 53 else f"{float(factor):g}"
    if not text:
        return number
    return text if factor == 1 else f"-{text}" if factor == -1 else f"{number}*{text}"


def _product(a: Monomial, b: Monomial) -> Monomial:
    if not a or not b:
        return a or b
    powers = dict(a)
    for atom, power in b:
        powers[atom] = 1 if is_condition(atom) else powers.get(atom, 0) + power
    return _without_implied(frozenset(powers.items()))


def _without_implied(monomial: Monomial) -> Monomial:
    """A product of conditions without those that another one of them implies: x >= 3 says x >= 0."""
    bounds = [atom for atom, _ in monomial if isinstance(atom, AtLeast)]
    powers = dict(monomial)
    # a product with an index is 0 at 0 by itself: [i >= 1] i is i
    weak = {b for b in bounds if any(isinstance(a, Index) and b.value == poly(a) - 1 for a in powers)}
    weak |= {b for a in bounds for b in bounds if a is not b and a != b and never_negative(b.value - a.value)}
    return frozenset((atom, power) for atom, power in monomial if atom not in weak) if weak else monomial


def poly(value: Poly | Number | Atom) -> Poly:
    """A number or an atom as a polynomial."""
    if isinstance(value, Poly):
        return value
    if isinstance(value, float):
        if value in (float("inf"), float("-inf")):
            return Poly({frozenset({(Infinity(), 1)}): 1 if value > 0 else -1})
        # exact: the lowest float less 1 is not the lowest float
        return Poly({UNIT: int(value) if value.is_integer() else Fraction(value)})
    if isinstance(value, (int, Fraction)):
        return Poly({UNIT: value})
    return Poly({frozenset({(value, 1)}): 1})


ZERO, ONE = poly(0), poly(1)


# ---- bounds ------------------------------------------------------------------------------------------------


def _range(atom: Atom) -> tuple[Poly, Poly | None] | None:
    """Least and greatest value of an atom that is never negative, the latter None where it has none."""
    if isinstance(atom, Size):
        return poly(atom), poly(atom)
    if isinstance(atom, Index):
        return ZERO, atom.extent - 1
    if is_condition(atom):
        return ZERO, ONE
    if isinstance(atom, Remainder):
        return ZERO, atom.by - 1
    if isinstance(atom, Quotient) and never_negative(atom.value):
        return ZERO, bound(atom.value, upper=True)
    if isinstance(atom, Least) and all(never_negative(value - 1) for value in atom.values):
        return ONE, min(atom.values, key=str)
    if isinstance(atom, Running) and never_negative(atom.term):
        return ZERO, None
    return None


def bound(value: Poly, upper: bool = False) -> Poly | None:
    """A polynomial in sizes that `value` is never below (never above, if `upper`); None where none is known."""
    total = ZERO
    for monomial, factor in value.terms.items():
        product = poly(factor)
        for atom, power in monomial:
            ends = _range(atom)
            end = None if ends is None else ends[1] if (factor > 0) == upper else ends[0]
            if end is None:
                return None
            for _ in range(power):
                product = product * end
        total = total + product
    if any(not isinstance(atom, Size) for atom in total.atoms):
        return bound(total, upper) if total != value else None
    return total


def never_negative(value: Poly) -> bool:
    """Whether the polynomial is >= 0 at every size and index; False also where that is not known."""
    least = bound(value)
    if least is None:
        return False
    shifted: dict[Monomial, Number] = {}  # every size as 1 + something that is not negative
    for monomial, factor in least.terms.items():
        product = poly(factor)
        for atom, power in monomial:
            for _ in range(power):
                product = product * (poly(atom) + 1)
        for term, coefficient in product.terms.items():
            shifted[term] = shifted.get(term, 0) + coefficient
    return all(coefficient >= 0 for coefficient in shifted.values())
