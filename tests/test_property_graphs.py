"""Graphs drawn at random: every form that nmcompile gives a model computes what onnxruntime computes of it.

`python -m tools.property_graphs --count 2000` does the same for thousands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import random_graphs
from graph_check import check
from random_graph_smaller import shrunk
from random_graphs import (
    Both,
    Causal,
    Constant,
    Decoder,
    Factor,
    Given,
    Ids,
    Mask,
    Padding,
    Positions,
    Recipe,
    Window,
    draw,
    parts,
)

from nmcompile.backends.cpu.session import Session
from nmcompile.errors import InputError
from tools.property_graphs import GOOD, labels, told

# Between them they have every construct that is not rare.
SEEDS = (10, 23, 24, 29, 41, 45, 53, 68, 78, 99, 103, 118, 136, 151, 153, 171, 210, 214, 253, 258, 323, 330, 331)

PADDED = (Given("attention_mask"),)
PADDING = Mask(Padding(), "add", "lowest")
USUAL = Recipe(0, positions=Positions(), masks=(PADDING,), inputs=PADDED)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_graph_is_right_at_every_length_and_mask(seed: int) -> None:
    outcome = check(draw(seed))
    assert outcome.runs, "the model takes none of the inputs"
    assert outcome.verdict in GOOD, told(outcome)


def test_the_seeds_have_every_construct() -> None:
    counts = Counter(label for seed in range(400) for label in labels(draw(seed)) if not label.startswith("input"))
    missing = {label for label, count in counts.items() if count >= 5}
    missing -= {label for seed in SEEDS for label in labels(draw(seed))}
    assert not missing, "choose other seeds"


def test_a_usual_encoder_is_native() -> None:
    assert check(USUAL).verdict == "native"


def test_a_failing_graph_is_cut_down_to_what_fails() -> None:
    def fails(recipe: Recipe) -> bool:
        return any(isinstance(part, Window) and not part.both for part in parts(recipe))

    seed = next(seed for seed in range(400) if fails(draw(seed)) and len(parts(draw(seed))) > 12)
    (mask,) = shrunk(draw(seed), fails).masks
    assert mask is not None and isinstance(mask.keep, Window)


def test_a_recipe_is_kept_as_text() -> None:
    for seed in range(20):
        assert eval(repr(draw(seed)), vars(random_graphs)) == draw(seed)


# ---- the check finds what is wrong -------------------------------------------------------------------------------

LONG_WINDOW = Mask(Both(Padding(), Window(100)), "add", "lowest")
LOST = {
    "a window wider than the samples": (replace(USUAL, masks=(LONG_WINDOW,)), USUAL),
    "one key too many": (replace(USUAL, masks=(LONG_WINDOW,)),
                         replace(USUAL, masks=(Mask(Both(Padding(), Window(101)), "add", "lowest"),))),
    "a causal mask": (replace(USUAL, masks=(Mask(Causal()),), inputs=()), replace(USUAL, masks=(None,), inputs=())),
    "a padding mask": (USUAL, replace(USUAL, masks=(None,))),
    "a test of the mask's values": (replace(USUAL, masks=(Mask(Padding(test="== 1")),)), USUAL),
    "a mask of the second layer": (replace(USUAL, masks=(PADDING, LONG_WINDOW)),
                                   replace(USUAL, masks=(PADDING, PADDING))),
    "clipped positions": (replace(USUAL, positions=Positions("clip", 40)), USUAL),
    "periodic positions": (replace(USUAL, positions=Positions("mod", 16)), USUAL),
    "ids made unknown": (replace(USUAL, ids=Ids(kind="unknown", at=90)), USUAL),
    "a factor by the length": (replace(USUAL, factor=Factor("length")), USUAL),
    "a row for each token": (replace(USUAL, static=32, constant=Constant("Mul", "s1")),
                             replace(USUAL, static=32, constant=Constant("Mul", "h"))),
    "the decoder's mask": (replace(USUAL, decoder=Decoder()), replace(USUAL, decoder=Decoder(masked=False))),
}  # fmt: skip


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_is_found(what: str) -> None:
    recipe, other = LOST[what]
    outcome = check(recipe, instead=other)
    assert outcome.verdict == "wrong", outcome
    assert "canonical" in {form for form, _ in outcome.complaints}


def test_refusing_unusual_inputs_is_allowed_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", _guarded(Session.run, lambda mask: bool(mask.any(axis=1).all())))
    outcome = check(replace(USUAL, outputs=("first",)))
    assert outcome.guarded and outcome.refusal == "a row of the mask is empty"
    assert "empty" not in str(outcome.complaints)


def test_refusing_usual_inputs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", _guarded(Session.run, lambda mask: bool(mask.all())))
    outcome = check(USUAL)
    assert outcome.verdict == "refused" and "masks right" in outcome.barred


Run = Callable[[Session, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def _guarded(run: Run, fits: Callable[[np.ndarray], bool]) -> Run:
    """`run` behind a guard over the mask."""

    def guarded(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not fits(feeds["attention_mask"]):
            raise InputError("a row of the mask is empty")
        return run(session, feeds)

    return guarded
