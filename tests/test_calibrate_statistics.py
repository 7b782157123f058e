"""Streaming statistics against numpy on all the values at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nmcompile.calibrate import Histogram, Statistics
from nmcompile.calibrate.statistics import KINDS, SIDE, Method
from nmcompile.errors import CalibrationError
from nmcompile.quantize import QuantType, activation_params, dequantize, quantize

Array = npt.NDArray[Any]
VALUES = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e9, 1e9, width=32))
BATCHES = st.lists(VALUES, min_size=1, max_size=5)
SEARCHED: tuple[Method, ...] = ("percentile", "entropy", "mse")
TYPES: tuple[QuantType, ...] = ("uint8", "int8")


def collected(*batches: Array) -> Statistics:
    statistics = Statistics()
    for batch in batches:
        statistics.add("x", batch, KINDS if batch.ndim > 1 else ("range", "histogram"))
    return statistics


def with_outlier(value: float = 200.0) -> Array:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    x[1234] = value
    return x


def rounding_error(x: Array, lo: float, hi: float, dtype: QuantType) -> float:
    params = activation_params(lo, hi, dtype)
    back = dequantize(quantize(x, params.scale, params.zero_point, dtype), params.scale, params.zero_point)
    return float(((back - x.astype(np.float64)) ** 2).mean())


@given(BATCHES)
def test_the_range_is_that_of_all_values(batches: list[Array]) -> None:
    x = np.concatenate(batches)
    assert collected(*batches).range("x") == (float(x.min()), float(x.max()))


@given(BATCHES)
def test_a_histogram_counts_every_value_in_its_bin_in_any_order(batches: list[Array]) -> None:
    histogram = collected(*batches).histogram("x")
    backwards = collected(*batches[::-1]).histogram("x")
    x = np.concatenate(batches).astype(np.float64)
    expected, _ = np.histogram(x, histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    np.testing.assert_array_equal(backwards.counts, expected)
    assert backwards.width == histogram.width and histogram.total == x.size
    assert histogram.counts.shape == (2 * SIDE,)


def test_the_range_of_a_histogram_doubles_as_needed() -> None:
    small, large = np.full(3, 0.9, np.float32), np.full(2, -7.9, np.float32)
    assert collected(small).histogram("x").width * SIDE == 1
    histogram = collected(small, large).histogram("x")
    assert histogram.width * SIDE == 8
    assert histogram.counts[SIDE + int(0.9 / histogram.width)] == 3
    assert histogram.lo == np.float32(-7.9) and histogram.hi == np.float32(0.9)


def test_zeros_do_not_widen_the_bins_of_small_values() -> None:
    small = np.array([1e-6, -2e-6], np.float32)
    histogram = collected(np.zeros(5, np.float32), small).histogram("x")
    assert histogram.width == Histogram.of(small).width
    assert histogram.counts[SIDE] == 5


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 1.0, -1.0, 3.4e38, -3.4e38])
def test_a_histogram_takes_every_magnitude(value: float) -> None:
    histogram = Histogram.of(np.array([value, 0.0], np.float32))
    assert histogram.total == 2
    assert histogram.edges[0] <= value <= histogram.edges[-1]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.99, 1.0])
def test_a_quantile_is_numpys_within_a_bin(share: float) -> None:
    x = np.random.default_rng(0).gamma(2.0, size=50_000).astype(np.float32)
    histogram = Histogram.of(x)
    assert histogram.quantile(share) == pytest.approx(np.quantile(x, share), abs=2 * histogram.width)


def test_the_histogram_of_absolute_values_mirrors() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    histogram = Histogram.of(x).absolute()
    np.testing.assert_array_equal(histogram.counts, Histogram.of(np.abs(x)).counts)
    assert histogram.hi == np.abs(x).max()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_squares_sum_over_all_rows_in_double(rows: list[int]) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((count, 3, 5)).astype(np.float32) for count in rows]
    statistics = collected(*batches)
    x = np.concatenate(batches).reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(statistics.squares("x"), (x**2).sum(0), rtol=1e-12)
    assert statistics.squares("x").dtype == np.float64 and statistics.rows("x") == len(x)


def test_squares_do_not_lose_small_values_to_single_precision() -> None:
    x = np.full((10_000, 1), 1.0 + 2.0**-12, np.float32)
    assert collected(*[x] * 3).squares("x")[0] == pytest.approx(30_000 * (1 + 2.0**-12) ** 2, rel=1e-14)


def test_half_precision_is_widened() -> None:
    assert collected(np.array([[300.0, 400.0]], np.float16)).squares("x").tolist() == [90_000, 160_000]


def test_what_was_not_asked_for_is_not_there() -> None:
    statistics = Statistics()
    statistics.add("x", np.ones((2, 3)), ["range"])
    assert statistics.range("x") == (1, 1)
    for missing in (statistics.histogram, statistics.squares, statistics.rows):
        with pytest.raises(
            CalibrationError, match=r"of tensor 'x' was collected; name it in the pass's needs"
        ):
            missing("x")
    with pytest.raises(CalibrationError, match="'y'"):
        statistics.range("y")
    with pytest.raises(CalibrationError, match="'median' of tensor 'x' is not known"):
        statistics.add("x", np.ones(3), ["median"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_their_tensor(value: float) -> None:
    with pytest.raises(CalibrationError, match="tensor 'x' holds NaN or Inf"):
        collected(np.array([1.0, value]))


def test_squares_need_a_fixed_number_of_channels() -> None:
    with pytest.raises(CalibrationError, match="5 channels in one batch, 4 in another"):
        collected(np.ones((2, 4)), np.ones((2, 5)))


def test_an_empty_batch_changes_nothing() -> None:
    statistics = collected(np.ones((2, 3)), np.ones((0, 3)))
    assert statistics.rows("x") == 2


def test_min_max_clips_nothing() -> None:
    assert collected(with_outlier()).clip("x") == (float(with_outlier().min()), 200.0)


@pytest.mark.parametrize("method", SEARCHED)
@pytest.mark.parametrize("dtype", TYPES)
def test_one_outlier_is_clipped(method: Method, dtype: QuantType) -> None:
    lo, hi = collected(with_outlier()).clip("x", method, dtype=dtype)
    reach = 170 if method == "mse" else 30  # the squared error of an outlier this far is worth a wide range
    assert 2.5 < hi < reach
    assert -reach < lo < -2.5
    assert dtype == "uint8" or lo == -hi


@settings(max_examples=50, deadline=None)
@given(BATCHES, st.sampled_from(SEARCHED), st.sampled_from(TYPES))
def test_a_clipped_range_lies_in_the_range(batches: list[Array], method: Method, dtype: QuantType) -> None:
    statistics = collected(*batches)
    lo, hi = statistics.clip("x", method, dtype=dtype)
    least, most = statistics.range("x")
    if dtype == "int8":
        least, most = -max(-least, most), max(-least, most)
    assert lo <= hi
    assert min(least, 0) <= lo
    assert hi <= max(most, 0)


def test_a_percentile_leaves_out_its_share() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    statistics = collected(x)
    lo, hi = statistics.clip("x", "percentile", 99.0)
    assert float(((x < lo) | (x > hi)).mean()) == pytest.approx(0.01, abs=1e-3)
    lo, hi = statistics.clip("x", "percentile", 99.0, "int8")
    assert hi == -lo == pytest.approx(np.quantile(np.abs(x), 0.99), rel=1e-2)
    with pytest.raises(CalibrationError, match=r"99\.99 is usual"):
        statistics.clip("x", "percentile", 0)
    with pytest.raises(CalibrationError, match="use min-max, percentile, entropy, mse"):
        statistics.clip("x", "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["normal", "outlier", "gelu", "laplace", "shifted"])
def test_mse_is_near_the_best_of_a_brute_force_search(name: str, dtype: QuantType) -> None:
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(20_000)
    x = {
        "normal": normal,
        "outlier": with_outlier()[:20_000],
        "gelu": np.maximum(normal, -0.1 * np.abs(normal)),
        "laplace": rng.laplace(size=20_000),
        "shifted": normal + 3,
    }[name].astype(np.float32)
    lo, hi = collected(x).clip("x", "mse", dtype=dtype)
    steps = np.linspace(0.02, 1, 25)
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if dtype == "int8":
        best = min(rounding_error(x, -max(-least, most) * b, max(-least, most) * b, dtype) for b in steps)
    else:
        best = min(rounding_error(x, least * a, most * b, dtype) for a in steps for b in steps)
    assert rounding_error(x, lo, hi, dtype) <= best * 1.03


@pytest.mark.parametrize("method", ["min-max", *SEARCHED])
def test_a_constant_tensor_has_a_range(method: Method) -> None:
    assert collected(np.zeros(10)).clip("x", method) == (0, 0)
    lo, hi = collected(np.full(10, 2.5)).clip("x", method)
    assert lo >= 0 and hi == pytest.approx(2.5, rel=0.02)
