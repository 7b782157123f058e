"""A fixed, small budget of strange calibration data; `make fuzz` goes on for hours."""

from __future__ import annotations

import pytest
from fuzz_data import fuzz_data


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_strange_data_end_in_an_error_of_ours_or_are_read(start: int) -> None:
    for seed in range(start, start + 100):
        fuzz_data(seed)
