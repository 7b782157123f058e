"""Comparison: figures against their formulas in numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nmcompile.compare import Comparison, Difference, real_tokens, worst
from nmcompile.errors import InputError
from nmcompile.tensorinfo import TensorInfo

RNG = np.random.default_rng(0)


def compared(a: np.ndarray, b: np.ndarray, real: np.ndarray | None = None) -> Difference:
    comparison = Comparison()
    comparison.add({"y": a}, {"y": b}, real)
    return comparison.differences()["y"]


def test_figures_are_their_formulas() -> None:
    a = RNG.standard_normal((4, 5, 6))
    b = a + 0.1 * RNG.standard_normal(a.shape)
    found = compared(a, b)
    rows = [(x, y) for x, y in zip(a.reshape(-1, 6), b.reshape(-1, 6), strict=True)]
    assert found.max_error == pytest.approx(np.abs(a - b).max())
    assert found.mean_error == pytest.approx(np.abs(a - b).mean())
    assert found.cosine == pytest.approx(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in rows]))
    assert found.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert found.top1 == pytest.approx(np.mean([x.argmax() == y.argmax() for x, y in rows]))
    assert found.values == a.size


def test_batches_add_up() -> None:
    a = RNG.standard_normal((8, 5)).astype(np.float32)
    b = a + RNG.standard_normal(a.shape).astype(np.float32)
    parts = Comparison()
    for at in (slice(0, 3), slice(3, 8)):
        parts.add({"y": a[at]}, {"y": b[at]})
    for one, other in zip(vars(parts.differences()["y"]).values(), vars(compared(a, b)).values(), strict=True):
        assert one == pytest.approx(other)


def test_padding_is_left_out() -> None:
    a = RNG.standard_normal((2, 3, 4))
    b = a.copy()
    b[1, 2] = 99
    assert compared(a, b).max_error > 50
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    assert compared(a, b, real_tokens({"input_ids": mask, "attention_mask": mask})).sqnr == float("inf")


def test_a_vector_per_sequence_is_not_taken_for_tokens() -> None:
    a, b = np.ones((2, 3)), np.array([[1.0, 1, 1], [1, 1, 2]])
    comparison = Comparison([TensorInfo("y", np.dtype(np.float32), ("batch", 3))])
    comparison.add({"y": a}, {"y": b}, np.array([[True] * 3, [True, True, False]]))
    assert comparison.differences()["y"].max_error == 1


def test_single_values_have_no_cosine() -> None:
    found = compared(np.arange(4.0), np.arange(4.0))
    assert np.isnan(found.cosine) and np.isnan(found.top1) and found.sqnr == float("inf")
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["cosine"] is None


def test_zero_vectors_agree_only_with_zero_vectors() -> None:
    assert compared(np.zeros((1, 3)), np.zeros((1, 3))).cosine == 1
    assert compared(np.zeros((1, 3)), np.ones((1, 3))).cosine == 0


def test_not_a_number_does_not_pass_for_agreement() -> None:
    found = compared(np.ones((1, 3)), np.array([[np.nan, 1, 1]]))
    assert np.isnan(found.sqnr) and np.isnan(found.mean_error) and not found.cosine > 0


def test_not_a_number_is_no_small_error() -> None:
    found = compared(np.ones((1, 3)), np.array([[np.nan, 1, 1]]))
    assert not found.max_error < 1 and not found.top1 > 0


def test_shapes_must_agree_and_only_common_outputs_count() -> None:
    comparison = Comparison()
    comparison.add({"y": np.ones(2), "z": np.ones(2)}, {"y": np.ones(2)})
    assert set(comparison.differences()) == {"y"}
    with pytest.raises(InputError, match="shape"):
        comparison.add({"y": np.ones(2)}, {"y": np.ones(3)})


def test_the_worst_output() -> None:
    good, bad = compared(np.ones((1, 2)), np.ones((1, 2))), compared(np.ones((1, 2)), np.zeros((1, 2)))
    assert worst([good, bad]) is bad and worst([]) is None
