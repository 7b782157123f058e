"""A fixed, small budget of mutated models; `make fuzz` goes on for hours."""

from __future__ import annotations

import pytest
from fuzz_models import fuzz_model


@pytest.mark.parametrize("start", range(0, 48, 16))
def test_mutated_models_end_in_an_error_of_ours_or_work(start: int) -> None:
    for seed in range(start, start + 16):
        fuzz_model(seed)


@pytest.mark.parametrize("seed", [
    212, 717,  # attention with too few inputs; a factor of another type
    10000677, 10004627, 10010910, 10044344,  # axes and places that there are not, behind what is asked for late
    10018220,  # Split whose num_outputs is another than its outputs, at which shape inference ends the process
    10022708,  # a mask that adds nothing
    10037982,  # a Range to the size of an input that holds nothing
])  # fmt: skip
def test_what_was_found_stays_mended(seed: int) -> None:
    fuzz_model(seed)
