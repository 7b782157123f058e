"""Timing kernels: what is timed and in which order. No test depends on how long anything takes."""

from __future__ import annotations

import pytest

from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.measure import DENSE, FLOAT, QUANTIZE, Case, in_turn, linear_timer, made_up, seconds
from nmcompile.backends.cpu.pack import BLOCKS, GATHERS, Kind

SPARSE = [*BLOCKS, *(kind for kind in GATHERS if measure.supported(kind))]


def test_candidates_take_turns_and_the_least_time_counts() -> None:
    calls: list[str] = []
    times = {"a": iter([9.0, 3.0, 1.0, 2.0]), "b": iter([0.0, 5.0, 6.0, 4.0])}

    def timer(name: str) -> float:
        calls.append(name)
        return next(times[name])

    assert in_turn([lambda: timer("a"), lambda: timer("b")], 3) == [1.0, 4.0]  # the first round warms up
    assert "".join(calls) == "abababab"


def test_patience_ends_after_the_round_that_used_it_up() -> None:
    times = iter([9.0, 3.0, 1.0])
    assert in_turn([lambda: next(times)], 20, patience=0.0) == [9.0]


@pytest.mark.parametrize("kind", SPARSE, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_made_up_weights_are_as_dense_as_asked(kind: Kind, density: float) -> None:
    weight = made_up(32, 64, kind, density)
    units = 32 // kind.rows * (64 if kind.format == "gather" else 16)
    filled = weight["values"].any(axis=1).sum() if kind.format == "gather" else len(weight["values"])
    assert filled == max(1, round(density * units))
    assert linear_timer(Case(32, 64, kind, density, tokens=3), isa="scalar")() >= 0


@pytest.mark.parametrize("kind", [DENSE, FLOAT, QUANTIZE, *SPARSE], ids=str)
@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (16, 4)])
def test_every_kernel_can_be_timed_at_any_size(kind: Kind, shape: tuple[int, int]) -> None:
    (time,) = seconds([Case(*shape, kind, 0.5, tokens=2)], isa="scalar", repeats=2)
    assert 0 <= time < 1


def test_the_machine_has_a_name() -> None:
    assert measure.cpu_model().strip()


def test_an_unknown_kernel_is_not_supported() -> None:
    assert not measure.supported(Kind("diagonal", 3))
