"""Masks of torch tensors against those of arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nmcompile import sparsity as sp
from nmcompile.prune.plan import Goal
from nmcompile.training import projection

PATTERNS = ["unstructured", "2:4", "1:4", "4:8", "5:11", "1x1", "2x4", "4x1", "1x4", "16x1", "3x5", "8x16",
            "2x150", "64x64"]  # fmt: skip
WIDE = "the sums of blocks of numbers of very different sizes depend on their order"


def scores(rng: np.random.Generator, kind: str) -> np.ndarray:
    shape = tuple(int(size) for size in rng.integers(1, 45, 2))
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float32)
    if kind == "signed":
        return rng.normal(size=shape).astype(np.float32)
    return np.exp(rng.normal(0, 20, shape))


@pytest.mark.parametrize("kind", ["ties", "signed", WIDE])
@pytest.mark.parametrize("text", PATTERNS)
def test_masks_are_those_of_arrays(text: str, kind: str) -> None:
    pattern, rng = sp.parse_pattern(text), np.random.default_rng(0)
    for _ in range(25):
        score, sparsity = scores(rng, kind), float(rng.choice([0, 0.3, 0.5, 0.8, 0.95, 1]))
        tensor = torch.from_numpy(score)
        np.testing.assert_array_equal(projection.unit_sums(tensor, pattern), sp.unit_scores(score, pattern))
        kept = projection.keep(tensor, pattern, sparsity)
        np.testing.assert_array_equal(kept, sp.keep_mask(score, pattern, sparsity))
        turned = projection.keep(torch.from_numpy(score.T.copy()).T, pattern, sparsity)  # as weights [K, N] come
        assert torch.equal(turned, kept)


@pytest.mark.parametrize("rows", [4, 6, 12, 24])
@pytest.mark.parametrize("cols", [1, 2, 8, 16])
def test_sums_of_whole_blocks_are_in_the_order_of_arrays(rows: int, cols: int) -> None:
    score = np.exp(np.random.default_rng(1).normal(0, 20, (rows * 5, cols * 5)))
    block = sp.Block(rows, cols)
    np.testing.assert_array_equal(projection.unit_sums(torch.from_numpy(score), block), sp.unit_scores(score, block))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(sp.PatternError, match="NaN"):
        projection.keep(torch.tensor([[1.0, float("nan")]]), sp.Unstructured(), 0.5)
    with pytest.raises(sp.PatternError, match="between 0 and 1"):
        projection.keep(torch.ones(2, 2), sp.Unstructured(), 80)


@pytest.mark.parametrize("text", ["unstructured", "2x4", "1x4", "4x1", "3x5"])
def test_layers_ranked_together_reach_the_total_and_keep_some_of_each(text: str) -> None:
    rng, goal = torch.Generator().manual_seed(0), Goal(sp.parse_pattern(text), 0.8)
    sizes = {"large": (40, 64, 1.0), "small": (20, 30, 1e-3), "odd": (7, 13, 0.5)}
    values = {name: torch.rand(n, k, generator=rng) * scale for name, (n, k, scale) in sizes.items()}
    masks = projection.keep_together(values, dict.fromkeys(values, goal), 0.9)
    kept = {name: projection.unit_sums(mask.float(), goal.pattern) > 0 for name, mask in masks.items()}
    gone, units = sum(int((~item).sum()) for item in kept.values()), sum(item.numel() for item in kept.values())
    assert gone == int(0.8 * units + 0.5)
    small = kept["small"]
    assert int((~small).sum()) == -(-9 * small.numel() // 10)  # the limit, as all of its scores are the least
    assert int((~kept["large"]).sum()) < 0.8 * kept["large"].numel()
    for name, mask in masks.items():  # whole units only
        assert torch.equal(projection.spread(kept[name], goal.pattern, mask.shape), mask)


def test_a_limit_under_the_goal_gives_way() -> None:
    goal = Goal(sp.Unstructured(), 0.9)
    values = {name: torch.rand(3, 7, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    masks = projection.keep_together(values, dict.fromkeys(values, goal), 0.5)
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(0.9 * 63 + 0.5)


def test_goals_do_not_mix_and_ties_go_to_the_first() -> None:
    goals = {"a": Goal(sp.Unstructured(), 0.5), "b": Goal(sp.NM(2, 4), 0.5), "c": Goal(sp.Unstructured(), 0.5)}
    masks = projection.keep_together({name: torch.ones(2, 4) for name in goals}, goals, 1.0)
    assert masks["a"].all() and not masks["c"].any()
    assert torch.equal(masks["b"], torch.tensor([[True, True, False, False]] * 2))
    assert list(masks) == ["a", "b", "c"]


def test_a_projection_is_the_nearest_of_the_pattern() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, 1.0, -4.0, 0.0]])
    assert torch.equal(projection.project(weight, sp.NM(2, 4), 0.5),
                       torch.tensor([[3.0, 0, 2, 0], [1, 0, -4, 0]]))  # fmt: skip
    weighting = torch.tensor([[1.0, 100, 1, 100], [1, 1, 1e-9, 1]])
    assert torch.equal(projection.project(weight, sp.NM(2, 4), 0.5, weighting),
                       torch.tensor([[0, -1.0, 0, 0.5], [1, 1, 0, 0]]))  # fmt: skip
    tiny = torch.tensor([[1e-12, 2e-12], [3e-12, 4e-12]])  # whose squares single precision does not hold
    assert torch.equal(projection.project(tiny, sp.Block(1, 2), 0.5, tiny), tiny * torch.tensor([[0], [1.0]]))
