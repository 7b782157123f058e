"""guards: what a plan assumes of its inputs is checked, and named."""

from __future__ import annotations

import numpy as np
import pytest

from nmcompile.errors import InputError, PlanError
from nmcompile.guards import Guard, check, read_guards

ROWS = np.array([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("rule", "rows", "said"),
    [
        ("binary", [[1, 1, 0], [1, 2, 0]], "holds 2 in row 1"),
        ("binary", [[1, -1, 0], [1, 0, 0]], "holds -1 in row 0"),
        ("prefix", [[1, 1, 0], [0, 1, 1]], "not ones and then zeros in row 1"),
        ("prefix", [[1, 1, 0], [2, 1, 1]], "holds 2 in row 1"),
        ("first-token", [[1, 1, 0], [0, 1, 1]], "hides the first token of row 1"),
        ("some-token", [[0, 1, 0], [0, 0, 0]], "hides every token of row 1"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_what_is_outside(rule: str, rows: list[list[int]], said: str, dtype: type) -> None:
    guards = (Guard("mask", rule),)
    check(guards, {"mask": ROWS.astype(dtype)})
    check(guards, {"mask": np.zeros((0, 3), dtype)})
    with pytest.raises(InputError, match="'mask'") as error:
        check(guards, {"mask": np.array(rows, dtype)})
    assert said in str(error.value).replace(".0", "")


def test_left_padding_and_holes_are_within_most() -> None:
    rows = np.array([[0, 1, 1], [1, 0, 1]])
    check((Guard("mask", "binary"), Guard("mask", "some-token")), {"mask": rows})


def test_a_mask_of_truth() -> None:
    for rule in ("binary", "prefix", "first-token", "some-token"):
        check((Guard("mask", rule),), {"mask": ROWS.astype(bool)})


def test_they_stand_in_the_header() -> None:
    guard = Guard("mask", "first-token")
    assert read_guards([guard.to_json()], ["ids", "mask"]) == (guard,)
    assert str(guard) == "mask does not hide the first token of a row"


@pytest.mark.parametrize("items", [{}, [1], [{"input": "mask", "rule": "odd"}], [{"input": "other", "rule": "binary"}],
                                   [{"input": ["mask"], "rule": "binary"}], [{"rule": {}}], None])  # fmt: skip
def test_rules_that_this_version_does_not_know(items: object) -> None:
    with pytest.raises(PlanError):
        read_guards(items, ["mask"])
