"""A fixed, small budget of strange calibration data; `make fuzz` goes on for hours."""

from __future__ import annotations

import pytest
from fuzz_data import fuzz_data


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_strange_data_end_in_an_error_of_ours_or_are_read(start: int) -> None:
    for seed in range(start, start + 100):
        fuzz_data(seed)


@pytest.mark.parametrize("seed", [138224])  # a number in the place of positions, and no tokens to make them from
def test_what_was_found_stays_mended(seed: int) -> None:
    fuzz_data(seed)
