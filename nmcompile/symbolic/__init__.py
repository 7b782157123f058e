"""Exact arithmetic on what a small integer or boolean sub-graph computes: polynomials over sizes, indices and elements.

A value is a polynomial with number coefficients over atoms. Conditions are atoms too, 1 where they hold and 0 where
they do not, so And is a product, Not is 1 - c, and Where(c, x, y) is y + c (x - y): two spellings of one mask become
one polynomial, since a product of conditions counts each once (a multilinear polynomial over 0 and 1 is unique).

Sizes are taken to be at least 1: where one is 0 there is no element to speak of.
"""

from __future__ import annotations

from nmcompile.symbolic.algebra import above_zero, at_least_zero, divided, floor_divided, is_zero, least, substitute
from nmcompile.symbolic.reading import evaluate, mentioned
from nmcompile.symbolic.terms import (
    ONE,
    ZERO,
    AtLeast,
    Atom,
    Element,
    Index,
    Infinity,
    IsZero,
    Least,
    Poly,
    Quotient,
    Remainder,
    Running,
    Size,
    bound,
    is_condition,
    never_negative,
    poly,
)

__all__ = [
    "ONE",
    "ZERO",
    "AtLeast",
    "Atom",
    "Element",
    "Index",
    "Infinity",
    "IsZero",
    "Least",
    "Poly",
    "Quotient",
    "Remainder",
    "Running",
    "Size",
    "above_zero",
    "at_least_zero",
    "bound",
    "divided",
    "evaluate",
    "floor_divided",
    "is_condition",
    "is_zero",
    "least",
    "mentioned",
    "never_negative",
    "poly",
    "substitute",
]
