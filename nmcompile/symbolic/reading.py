"""Looks into polynomials: their numbers at given indices, and all that they mention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nmcompile.symbolic.terms import (
    AtLeast,
    Atom,
    Element,
    Index,
    IsZero,
    Least,
    Poly,
    Quotient,
    Remainder,
    Running,
)


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
        return np.asarray(a // b if isinstance(atom, Quotient) else a % b)
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
