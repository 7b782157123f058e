"""symbolic: polynomials over sizes, indices and conditions agree with numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmcompile.symbolic import (
    ONE,
    ZERO,
    Element,
    Index,
    Poly,
    Size,
    at_least_zero,
    divided,
    evaluate,
    floor_divided,
    is_zero,
    least,
    never_negative,
    poly,
    substitute,
)

S, B = poly(Size("s")), poly(Size("b"))
Q, K = Index("q", S), Index("k", S)
q, k, m = poly(Q), poly(K), poly(Element("m", (ZERO,), "i"))
GRID = {Q: np.arange(9)[:, None], K: np.arange(9)[None, :]}


@st.composite
def sums(draw: st.DrawFn) -> Poly:
    a, b, c = (draw(st.integers(-6, 6)) for _ in range(3))
    return q * a + k * b + c


@given(sums(), sums())
def test_conditions_are_numbers_of_0_and_1(x: Poly, y: Poly) -> None:
    a, b = evaluate(x, GRID), evaluate(y, GRID)
    assert a is not None and b is not None
    grid = np.ones((9, 9), np.int64)
    for made, wanted in (
        (at_least_zero(x), a >= 0), (is_zero(x), a == 0), (at_least_zero(x) * at_least_zero(y), (a >= 0) & (b >= 0)),
        (ONE - is_zero(x) * at_least_zero(y), ~((a == 0) & (b >= 0))),
    ):  # fmt: skip
        found = evaluate(made, GRID)
        assert found is not None and (found * grid == wanted * grid).all()


@given(sums(), st.integers(1, 7))
def test_division_is_numpys(x: Poly, by: int) -> None:
    value = evaluate(x, GRID)
    assert value is not None
    for part, wanted in zip(floor_divided(x, poly(by)), (value // by, value % by), strict=True):
        found = evaluate(part, GRID)
        assert found is not None and (found == wanted).all()


def test_one_condition_for_two_spellings() -> None:
    assert at_least_zero(q - k) == ONE - at_least_zero(k - q - 1)
    assert at_least_zero(q - k) * at_least_zero(q - k + 16) == at_least_zero(q - k)
    assert is_zero(q - k) == is_zero(k - q) and is_zero(ONE - is_zero(m)) == is_zero(m)


def test_bounds() -> None:
    assert at_least_zero(k) == at_least_zero(S - 1 - k) == at_least_zero(S - 1) == ONE
    assert at_least_zero(k - S) == ZERO and is_zero(k - S) == ZERO
    assert at_least_zero(S - 2) not in (ZERO, ONE) and not never_negative(S - 2)
    assert at_least_zero(m) not in (ZERO, ONE)


def test_an_index_into_rows_put_side_by_side() -> None:
    row = poly(Index("b", B))
    assert floor_divided(row * S + k, S) == (row, k)
    assert divided(B * S * 768, B * 12) == S * 64 and divided(B * (S + 1), S + 1) == B
    assert divided(B * S, S + 1) is None and divided(S * 3, poly(2)) is None


def test_the_lesser_of_two() -> None:
    assert least(S, S + 3) == S and least(poly(5), poly(3)) == poly(3)
    assert str(least(S, poly(32))) == "min(32, s)"


@pytest.mark.parametrize("value", [-3, 0, 1, 5])
def test_substitution_reaches_into_conditions(value: int) -> None:
    formula = is_zero(m - 1) * 7 + at_least_zero(m - 3) * m
    found = substitute(formula, {next(iter(m.atoms)): poly(value)}).number
    assert found == 7 * (value == 1) + (value if value >= 3 else 0)


def test_numbers_are_exact() -> None:
    lowest = float(np.finfo(np.float32).min)
    assert ((poly(lowest) + 1) - poly(lowest)).number == 1
    assert (poly(0.1) * 10).number != 1.0  # 0.1 is no tenth


def test_infinity_is_no_number() -> None:
    endless = poly(float("-inf"))
    assert (endless - endless).number == 0 and endless.number is None and not endless.whole
    assert [at_least_zero(endless), at_least_zero(-endless)] == [ZERO, ONE]


def test_texts() -> None:
    assert [str(x) for x in (q - k + 15, at_least_zero(k - q - 3), m * 2, S * B)] == [
        "q - k + 15", "(-q + k - 3 >= 0)", "2*m[0]", "b*s"]  # fmt: skip
