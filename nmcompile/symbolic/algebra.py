"""Conditions, division and substitution of polynomials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from nmcompile.symbolic.terms import (
    ONE,
    ZERO,
    AtLeast,
    Atom,
    Element,
    Infinity,
    IsZero,
    Least,
    Monomial,
    Number,
    Poly,
    Quotient,
    Remainder,
    is_condition,
    monomial_text,
    never_negative,
    poly,
)

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


# ---- division ----------------------------------------------------------------------------------------------


def divided(value: Poly, by: Poly) -> Poly | None:
    """The polynomial that gives `value` when multiplied by `by`; None where there is none."""
    if by.number == 0 or not by.terms:
        return None
    rest, result = value, ZERO
    lead, factor = max(by.terms.items(), key=lambda term: (len(term[0]), monomial_text(term[0])))
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
