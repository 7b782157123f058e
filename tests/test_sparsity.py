"""Patterns, masks and detection against numpy formulas and brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nmcompile.sparsity import (
    NM,
    Block,
    Found,
    Pattern,
    PatternError,
    Unstructured,
    density,
    detect,
    global_threshold,
    keep_above,
    keep_mask,
    magnitude,
    parse_pattern,
    unit_scores,
    wanda,
)

Array = npt.NDArray[Any]
SCORES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.integers(0, 9).map(float),  # few values, so that ties are common
)
BLOCKS = st.builds(Block, st.integers(1, 4), st.integers(1, 4))


def normal(rows: int, cols: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def pruned(pattern: Pattern, sparsity: float, rows: int = 96, cols: int = 128) -> Array:
    weight = normal(rows, cols)
    masked: Array = weight * keep_mask(magnitude(weight), pattern, sparsity)
    return masked


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4), Block(2, 4), Block(16, 1)])
def test_a_pattern_reads_what_it_writes(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["", "dense", "2x", "2:4:8", "-1:4", "5:4", "0:4", "0x4", "2x4x4", "1.5:4"])
def test_a_wrong_pattern_is_one_line_with_an_example(text: str) -> None:
    with pytest.raises(PatternError, match=r"2:4|2x4") as error:
        parse_pattern(text)
    assert "\n" not in str(error.value)


def test_scores_follow_their_formulas() -> None:
    weight, squares = normal(4, 6), np.arange(6, dtype=np.float64)
    np.testing.assert_array_equal(magnitude(weight), np.abs(weight))
    np.testing.assert_allclose(wanda(weight, squares), np.abs(weight) * np.sqrt(squares), rtol=1e-6)
    assert magnitude(np.array([[-128]], np.int8)).item() == 128
    with pytest.raises(PatternError, match="one value per input"):
        wanda(weight, squares[:5])


@given(SCORES, BLOCKS)
def test_a_block_scores_the_sum_of_its_weights(score: Array, block: Block) -> None:
    padded = np.pad(score, [(0, -score.shape[0] % block.rows), (0, -score.shape[1] % block.cols)])
    rows, cols = padded.shape
    expected = padded.reshape(rows // block.rows, block.rows, cols // block.cols, block.cols).sum((1, 3))
    np.testing.assert_array_equal(unit_scores(score, block), expected)


@given(SCORES, BLOCKS, st.floats(0, 1))
def test_a_block_mask_keeps_the_best_units_and_ties_by_index(
    score: Array, block: Block, sparsity: float
) -> None:
    units = unit_scores(score, block).ravel()
    keep = keep_mask(score, block, sparsity)
    starts = keep[:: block.rows, :: block.cols]
    spread = np.kron(starts, np.ones((block.rows, block.cols), bool))
    np.testing.assert_array_equal(keep, spread[: score.shape[0], : score.shape[1]])
    kept = units.size - int(np.floor(sparsity * units.size + 0.5))
    best = sorted(range(units.size), key=lambda index: (-units[index], index))[:kept]
    assert set(np.flatnonzero(starts)) == set(best)


@given(SCORES, st.sampled_from([NM(1, 4), NM(2, 4), NM(4, 8), NM(2, 3)]))
def test_n_of_m_keeps_the_best_of_every_group(score: Array, pattern: NM) -> None:
    keep = keep_mask(score, pattern, 0.1)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], pattern.m):
            group = score[row, start : start + pattern.m]
            best = sorted(range(group.size), key=lambda index: (-group[index], index))[: pattern.n]
            assert set(np.flatnonzero(keep[row, start : start + pattern.m])) == set(best)
    np.testing.assert_array_equal(keep, keep_above(score, pattern, 5.0))


@given(st.lists(SCORES, min_size=1, max_size=3), BLOCKS, st.floats(0, 1))
def test_a_global_threshold_prunes_no_more_than_asked_and_no_less_but_for_a_tie(
    scores: list[Array], block: Block, sparsity: float
) -> None:
    size = block.rows * block.cols
    units = [unit_scores(score, block) for score in scores]
    threshold = global_threshold(units, [size] * len(units), sparsity)
    gone = sum(int((unit < threshold).sum()) for unit in units)
    next_gone = sum(int((unit <= threshold).sum()) for unit in units)
    total = sum(unit.size for unit in units)
    assert gone <= sparsity * total * (1 + 1e-9)
    assert gone == total or next_gone > sparsity * total * (1 - 1e-9) or sparsity == 0
    for score, unit in zip(scores, units, strict=True):
        starts = keep_above(score, block, threshold)[:: block.rows, :: block.cols]
        np.testing.assert_array_equal(starts, unit >= threshold)


def test_a_global_threshold_counts_weights_not_units() -> None:
    small, large = np.arange(8.0), np.arange(8.0) + 100
    assert global_threshold([small, large], [1, 1], 0.5) == 100
    assert global_threshold([small, large], [8, 1], 0.5) == 4  # 72 weights: 36 are four units of eight
    assert global_threshold([small], [1], 0) == -np.inf
    assert global_threshold([small], [1], 1) == np.inf
    assert global_threshold([np.arange(10.0)], [1], 0.8) == 8


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 80, float("nan")])
def test_a_sparsity_is_a_share(sparsity: float) -> None:
    with pytest.raises(PatternError, match="between 0 and 1"):
        keep_mask(np.ones((4, 4)), Unstructured(), sparsity)
    with pytest.raises(PatternError, match="between 0 and 1"):
        global_threshold([np.ones(4)], [1], sparsity)


def test_scores_that_are_no_scores_are_refused() -> None:
    with pytest.raises(PatternError, match="NaN"):
        keep_mask(np.array([[1.0, np.nan]]), Unstructured(), 0.5)
    with pytest.raises(PatternError, match="outputs, inputs"):
        keep_mask(np.ones(4), Unstructured(), 0.5)


def test_density_is_the_share_of_non_zeros() -> None:
    assert density(np.array([[0, 1], [2, 0]])) == 0.5
    assert density(np.zeros((0, 4))) == 1.0


BLOCK_SHAPES = ["1x4", "4x1", "2x4", "4x2", "4x4", "16x4", "32x1", "2x2", "1x2", "8x8"]


@pytest.mark.parametrize("text", BLOCK_SHAPES)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.95])
def test_a_block_pattern_is_found(text: str, sparsity: float) -> None:
    weight = pruned(parse_pattern(text), sparsity)
    zeros = 1 - density(weight)
    assert detect(weight) == Found(parse_pattern(text), zeros)


@pytest.mark.parametrize("text", ["1:4", "2:4", "4:8", "2:8", "1:8"])
def test_n_of_m_is_found_along_either_axis(text: str) -> None:
    weight = pruned(parse_pattern(text), 0)
    assert detect(weight) == Found(parse_pattern(text), 1 - density(weight), "inputs")
    assert detect(weight.T) == Found(parse_pattern(text), 1 - density(weight), "outputs")


def test_one_group_that_breaks_n_of_m_unmakes_it() -> None:
    weight = pruned(NM(2, 4), 0)
    weight[5, 8:12] = 1
    found = detect(weight)
    assert found is not None and found.pattern == Unstructured()


@pytest.mark.parametrize("sparsity", [0.06, 0.3, 0.5, 0.8, 0.95, 0.99])
def test_chance_does_not_pass_for_structure(sparsity: float) -> None:
    weight = pruned(Unstructured(), sparsity)
    assert detect(weight) == Found(Unstructured(), 1 - density(weight))


@pytest.mark.parametrize("text", ["2x4", "2:4"])
def test_few_more_zeros_do_not_hide_a_pattern(text: str) -> None:
    weight = pruned(parse_pattern(text), 0.8)
    weight *= np.random.default_rng(1).random(weight.shape) > 0.03  # as rounding to 8 bits makes
    found = detect(weight)
    assert found is not None and found.pattern == parse_pattern(text)


def test_ragged_edges_belong_to_a_pattern() -> None:
    assert detect(pruned(Block(4, 4), 0.8, 98, 130)) is not None
    found = detect(pruned(Block(4, 4), 0.8, 98, 130))
    assert found is not None and found.pattern == Block(4, 4)
    found = detect(pruned(NM(2, 4), 0, 96, 131))
    assert found is not None and found.pattern == NM(2, 4)


def test_dense_weights_have_no_pattern() -> None:
    assert detect(normal(64, 64)) is None
    assert detect(pruned(Unstructured(), 0.04)) is None
    assert detect(np.zeros((0, 4))) is None
    assert detect(np.zeros((8, 8))) == Found(Unstructured(), 1.0)


@settings(max_examples=30)
@given(SCORES)
def test_detection_takes_any_weight(weight: Array) -> None:
    found = detect(weight)
    assert found is None or 0.05 <= found.sparsity <= 1
