"""Exact arithmetic on what a small integer or boolean sub-graph computes: polynomials over sizes, indices and elements.

A value is a polynomial with number coefficients over atoms. Conditions are atoms too, 1 where they hold and 0 where
they do not, so And is a product, Not is 1 - c, and Where(c, x, y) is y + c (x - y): two spellings of one mask become one
polynomial, since a product of conditions counts each once (a multilinear polynomial over 0 and 1 is unique).

Sizes are taken to be at least 1: where one is 0 there is no element to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeAlias

import numpy as np

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
        return plain and not any(isinstance(a, Infinity) or (isinstance(a, Element) and a.kind == "f")
                                 for a in self.atoms)  # fmt: skip

    @cached_property
    def text(self) -> str:
        parts = sorted((_monomial_text(monomial), factor) for monomial, factor in self.terms.items())
        return " + ".join(_term_text(text, factor) for text, factor in reversed(parts)).replace("+ -", "- ") or "0"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Poly({self.text})"


def _monomial_text(monomial: Monomial) -> str:
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
    weak = {b for a in bounds for b in bounds if a is not b and a != b and never_negative(b.value - a.value)}
    return frozenset((atom, power) for atom, power in monomial if atom not in weak) if weak else monomial


def poly(value: Poly | Number | Atom) -> Poly:
    """A number or an atom as a polynomial."""
    if isinstance(value, Poly):
        return value
    if isinstance(value, float):
        if value in (float("inf"), float("-inf")):
            return Poly({frozenset({(Infinity(), 1)}): 1 if value > 0 else -1})
        return Poly({UNIT: int(value) if value.is_integer() else Fraction(value)})  # exact: the lowest float less 1 is not it
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


# ---- conditions --------------------------------------------------------------------------------------------


def at_least_zero(value: Poly) -> Poly:
    """1 where value >= 0."""
    decided = _by_cases(value, lambda number: number >= 0)
    if decided is not None:
        return decided
    if never_negative(value):
        return ONE
    if never_negative(-value - 1) and value.whole:
        return ZERO
    if value.whole:  # one atom for x >= 0 and its opposite -x - 1 >= 0
        opposite = -value - 1
        if opposite.text < value.text:
            return ONE - poly(AtLeast(opposite))
    return poly(AtLeast(value))


def above_zero(value: Poly) -> Poly:
    """1 where value > 0."""
    return at_least_zero(value - 1) if value.whole else ONE - at_least_zero(-value)


def is_zero(value: Poly) -> Poly:
    """1 where value == 0."""
    decided = _by_cases(value, lambda number: number == 0)
    if decided is not None:
        return decided
    if value.whole and (never_negative(value - 1) or never_negative(-value - 1)):
        return ZERO
    return poly(IsZero(min(value, -value, key=lambda item: item.text)))


def _by_cases(value: Poly, holds: Callable[[Number], bool]) -> Poly | None:
    """Whether a polynomial over few conditions holds, as a polynomial over them; None for any other."""
    atoms = [atom for atom in value.atoms if not isinstance(atom, Infinity)]
    if len(atoms) > 4 or not all(map(is_condition, atoms)):
        return None
    total = ZERO
    for case in range(1 << len(atoms)):
        truth = {atom: case >> place & 1 for place, atom in enumerate(atoms)}
        found = substitute(value, {atom: poly(bit) for atom, bit in truth.items()})
        number = found.number if not found.atoms else float("inf") * float(next(
            factor for monomial, factor in found.terms.items() if monomial))  # fmt: skip
        if number is not None and holds(number):
            product = ONE
            for atom, bit in truth.items():
                product = product * (poly(atom) if bit else ONE - poly(atom))
            total = total + product
    return total


def conditions(values: Iterable[Poly]) -> list[Atom]:
    """The conditions that the polynomials name, in a fixed order."""
    found = {atom for value in values for atom in value.atoms if is_condition(atom)}
    return sorted(found, key=str)


# ---- division ----------------------------------------------------------------------------------------------


def divided(value: Poly, by: Poly) -> Poly | None:
    """The polynomial that gives `value` when multiplied by `by`; None where there is none."""
    if by.number == 0 or not by.terms:
        return None
    rest, result = value, ZERO
    lead, factor = max(by.terms.items(), key=lambda term: (len(term[0]), _monomial_text(term[0])))
    while rest.terms:
        found = next((q for q in (_quotient(m, f, lead, factor) for m, f in rest.terms.items()) if q is not None), None)
        if found is None or len(result.terms) > 50:
            return None
        result = result + found
        rest = rest - found * by
    return result


def _quotient(monomial: Monomial, factor: Number, lead: Monomial, by: Number) -> Poly | None:
    powers = dict(monomial)
    for atom, power in lead:
        if powers.get(atom, 0) < power:
            return None
        powers[atom] -= power
    exact = Fraction(factor) / Fraction(by)
    if exact.denominator != 1:
        return None
    return Poly({frozenset((atom, power) for atom, power in powers.items() if power): int(exact)})


def floor_divided(value: Poly, by: Poly) -> tuple[Poly, Poly]:
    """Quotient and remainder of integers, rounded down; `by` is taken to be above 0."""
    if by == ONE:
        return value, ZERO
    multiple, rest = ZERO, ZERO
    for monomial, factor in value.terms.items():
        term = Poly({monomial: factor})
        exact = divided(term, by)
        if exact is None:
            rest = rest + term
        else:
            multiple = multiple + exact
    constant, base = rest.integer, by.integer
    if constant is not None and base is not None:
        return multiple + constant // base, poly(constant % base)
    if never_negative(rest) and never_negative(by - 1 - rest):
        return multiple, rest
    return multiple + poly(Quotient(rest, by)), poly(Remainder(rest, by))


def least(a: Poly, b: Poly) -> Poly:
    """The lesser of two."""
    if never_negative(b - a):
        return a
    return b if never_negative(a - b) else poly(Least(frozenset({a, b})))


# ---- substitution ------------------------------------------------------------------------------------------


def substitute(value: Poly, known: Mapping[Atom, Poly]) -> Poly:
    """The polynomial with atoms replaced, those inside of other atoms too."""
    if not known:
        return value
    total = ZERO
    for monomial, factor in value.terms.items():
        product = poly(factor)
        for atom, power in monomial:
            new = known[atom] if atom in known else _inside(atom, known)
            for _ in range(power):
                product = product * new
        total = total + product
    return total


def _inside(atom: Atom, known: Mapping[Atom, Poly]) -> Poly:
    if isinstance(atom, Element):
        return poly(Element(atom.tensor, tuple(substitute(index, known) for index in atom.index), atom.kind))
    if isinstance(atom, AtLeast):
        return at_least_zero(substitute(atom.value, known))
    if isinstance(atom, IsZero):
        return is_zero(substitute(atom.value, known))
    if isinstance(atom, (Quotient, Remainder)):
        parts = floor_divided(substitute(atom.value, known), substitute(atom.by, known))
        return parts[isinstance(atom, Remainder)]
    if isinstance(atom, Least):
        a, *others = (substitute(value, known) for value in atom.values)
        return least(a, others[0]) if others else a
    return poly(atom)


def evaluate(value: Poly, known: Mapping[Index, np.ndarray]) -> np.ndarray | None:
    """Its integers at arrays of indices; None where it holds anything but these and numbers."""
    total: np.ndarray = np.zeros((), np.int64)
    for monomial, factor in value.terms.items():
        product: np.ndarray = np.asarray(int(factor))
        for atom, power in monomial:
            item = _evaluated(atom, known)
            if item is None:
                return None
            product = product * item**power
        total = total + product
    return total


def _evaluated(atom: Atom, known: Mapping[Index, np.ndarray]) -> np.ndarray | None:
    if isinstance(atom, Index):
        return known.get(atom)
    if isinstance(atom, (Quotient, Remainder)):
        a, b = evaluate(atom.value, known), evaluate(atom.by, known)
        if a is None or b is None:
            return None
        return a // b if isinstance(atom, Quotient) else a % b
    if isinstance(atom, (AtLeast, IsZero)):
        inner = evaluate(atom.value, known)
        return None if inner is None else np.asarray(inner >= 0 if isinstance(atom, AtLeast) else inner == 0)
    return None


def mentioned(value: Poly) -> set[Atom]:
    """Every atom of the polynomial, those inside of other atoms too."""
    found: set[Atom] = set()
    todo = list(value.atoms)
    while todo:
        atom = todo.pop()
        if atom in found:
            continue
        found.add(atom)
        inner: list[Poly] = []
        if isinstance(atom, Element):
            inner = list(atom.index)
        elif isinstance(atom, (AtLeast, IsZero)):
            inner = [atom.value]
        elif isinstance(atom, (Quotient, Remainder)):
            inner = [atom.value, atom.by]
        elif isinstance(atom, Least):
            inner = list(atom.values)
        elif isinstance(atom, Running):
            inner = [atom.term, atom.last]
        todo += [other for value in inner for other in value.atoms]
    return found
