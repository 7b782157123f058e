"""What a plan assumes of its inputs, checked before each run: outside of it its answer would be another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmcompile.errors import InputError, PlanError

RULES = ("binary", "prefix", "first-token", "some-token")


@dataclass(frozen=True, order=True)
class Guard:
    """A rule on one input, [batch, tokens].

    binary: it holds 0 and 1 only (the model computes something else from other values). prefix: each row is ones and
    then zeros (the model counts them and takes as many tokens from the first). first-token: no row begins with 0 (the
    model reads the first token, which is not computed where it is hidden). some-token: no row holds 0 alone (another
    attention looks at its tokens, and would see hidden ones).
    """

    input: str
    rule: str

    def to_json(self) -> dict[str, str]:
        return {"input": self.input, "rule": self.rule}

    def __str__(self) -> str:
        what = {
            "binary": "holds 0 and 1 only", "prefix": "is padded on the right",
            "first-token": "does not hide the first token of a row", "some-token": "does not hide all tokens of a row",
        }  # fmt: skip
        return f"{self.input} {what[self.rule]}"


def read_guards(items: Any, inputs: Sequence[str]) -> tuple[Guard, ...]:
    """From a plan's header. PlanError for a rule that this version does not know."""
    if not isinstance(items, list):
        raise PlanError("the plan's assumptions are damaged; compile it again")
    found = []
    for item in items:
        known = isinstance(item, dict) and item.get("rule") in RULES and item.get("input") in inputs
        if not known:
            raise PlanError(f"the plan assumes {str(item)[:60]}, which is unknown here; it is damaged or from a newer "
                            "nmcompile")  # fmt: skip
        found.append(Guard(str(item["input"]), str(item["rule"])))
    return tuple(found)


def check(guards: Sequence[Guard], values: Mapping[str, np.ndarray]) -> None:
    """InputError naming the input and the row that is outside of what the plan assumes."""
    for guard in guards:
        array = values[guard.input]
        if guard.rule == "prefix" and (array[:, 1:] > array[:, :-1]).any():
            row = int(np.argmax((array[:, 1:] > array[:, :-1]).any(axis=1)))
            raise InputError(f"input {guard.input!r} is not ones and then zeros in row {row}, as the model takes it; "
                             "pad on the right")  # fmt: skip
        if guard.rule in ("binary", "prefix"):
            wrong = (array != 0) & (array != 1)
            if wrong.any():
                row = int(np.argwhere(wrong)[0][0])
                value = array[wrong].flat[0]
                raise InputError(f"input {guard.input!r} holds {value!s} in row {row}; the model takes it as a mask of "
                                 "0 and 1, give it like that")  # fmt: skip
            continue
        if 0 in array.shape:
            continue
        hidden = array[:, 0] == 0 if guard.rule == "first-token" else ~array.astype(bool).any(axis=1)
        if hidden.any():
            row = int(np.argmax(hidden))
            what = "the first token" if guard.rule == "first-token" else "every token"
            raise InputError(f"input {guard.input!r} hides {what} of row {row}, which the model's result is read from; "
                             "pad on the right, and leave out rows without tokens")  # fmt: skip
