"""A fixed, small budget of mutated models; `make fuzz` goes on for hours."""

from __future__ import annotations

import pytest
from fuzz_models import fuzz_model


@pytest.mark.parametrize("start", range(0, 48, 16))
def test_mutated_models_end_in_an_error_of_ours_or_work(start: int) -> None:
    for seed in range(start, start + 16):
        fuzz_model(seed)


@pytest.mark.parametrize("seed", [212, 717])  # attention with too few inputs; a factor of another type
def test_what_was_found_stays_mended(seed: int) -> None:
    fuzz_model(seed)
