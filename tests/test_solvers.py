"""Pruning solvers against brute force, closed forms and each other."""

from __future__ import annotations

import itertools
import sys

import click
import numpy as np
import pytest

from nmcompile import solvers
from nmcompile import sparsity as sp
from nmcompile.cli.compile import command
from nmcompile.errors import CalibrationError, NmcompileError
from nmcompile.quantize import quantize_weight
from nmcompile.solvers import grouping
from nmcompile.solvers.inverse import inverted

PATTERNS = [sp.Unstructured(), sp.NM(2, 4), sp.Block(1, 4), sp.Block(2, 4), sp.Block(4, 1), sp.Block(4, 4)]


def problem(n: int, k: int, seed: int = 0, rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x [rows, k], weight [n, k], hessian) with correlated inputs and a few strong channels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, k)) @ (rng.normal(size=(k, k)) / np.sqrt(k) + np.eye(k))
    x[:, :: max(k // 4, 1)] *= 4
    return x, rng.normal(size=(n, k)), x.T @ x


def fits(weight: np.ndarray, pattern: sp.Pattern, sparsity: float) -> bool:
    """No unit that the pattern zeroes as a whole is kept in part, and as many are zero as asked for."""
    mask = weight != 0
    if isinstance(pattern, sp.NM):
        return bool((mask.reshape(len(mask), -1, pattern.m).sum(axis=-1) <= pattern.n).all())
    units = sp.unit_scores(mask.astype(np.float32), pattern)
    size = weight.size // units.size
    return set(np.unique(units)) <= {0, size} and abs(float((units == 0).mean()) - sparsity) < 0.01


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", list(solvers.SOLVERS))
def test_the_pattern_holds(name: str, pattern: sp.Pattern) -> None:
    _, weight, hessian = problem(16, 32)
    pruned, mask = solvers.SOLVERS[name].solve(weight, hessian, pattern, 0.5)
    assert pruned.shape == weight.shape and fits(pruned, pattern, 0.5)
    np.testing.assert_array_equal(mask, pruned != 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_solver_beats_the_simpler_ones(pattern: sp.Pattern) -> None:
    errors: dict[str, list[float]] = {name: [] for name in solvers.SOLVERS}
    for seed in range(4):
        _, weight, hessian = problem(32, 64, seed)
        hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(64)
        for name, solver in solvers.SOLVERS.items():
            left = solver.solve(weight, hessian, pattern, 0.5).weight
            errors[name].append(solvers.relative_error(left, weight, hessian))
    mean = {name: float(np.mean(found)) for name, found in errors.items()}
    assert mean["admm"] < mean["obs"] < mean["wanda"] < mean["magnitude"]


def best_by_hand(weight: np.ndarray, hessian: np.ndarray, kept: int) -> float:
    """Least error of one row [k] over all masks that keep `kept` inputs, values refitted by least squares."""
    least = np.inf
    for support in itertools.combinations(range(len(weight)), kept):
        at = list(support)
        left = np.zeros_like(weight)
        left[at] = np.linalg.solve(hessian[np.ix_(at, at)], (hessian @ weight)[at])
        least = min(least, float((left - weight) @ hessian @ (left - weight)))
    return least


def test_masks_are_nearly_the_best_there_are() -> None:
    """All masks of a row of ten inputs that keep four, tried one by one."""
    over: dict[str, list[float]] = {"obs": [], "admm": []}
    for seed in range(12):
        _, weight, hessian = problem(1, 10, seed)
        least = best_by_hand(weight[0], hessian, 4)
        for name, found in over.items():
            left = solvers.SOLVERS[name].solve(weight, hessian, sp.Unstructured(), 0.6).weight - weight
            found.append(float(np.sum((left @ hessian) * left)) / least)
    assert min(over["admm"]) >= 1 - 1e-6 and min(over["obs"]) >= 1 - 1e-6  # nothing beats the best
    assert np.median(over["admm"]) < 1.15 and np.median(over["obs"]) < 2.5


def test_independent_inputs_need_no_compensation() -> None:
    """With a diagonal Hessian the best is Wanda's choice among each chunk, and the values stay."""
    rng = np.random.default_rng(1)
    weight, hessian = rng.normal(size=(8, 32)), np.diag(rng.uniform(0.5, 4, 32))
    expected = solvers.SOLVERS["wanda"].solve(weight, hessian, sp.NM(2, 4), 0.5).weight
    np.testing.assert_allclose(solvers.obs(weight, hessian, sp.NM(2, 4), 0.5).weight, expected, atol=1e-9)
    least = solvers.relative_error(expected, weight, hessian)
    assert solvers.relative_error(solvers.admm(weight, hessian, sp.NM(2, 4), 0.5).weight, weight, hessian) < 1.1 * least


def test_refit_is_least_squares_on_the_support() -> None:
    x, weight, hessian = problem(12, 24)
    mask = sp.keep_mask(np.abs(weight), sp.Block(2, 4), 0.5)
    exact = solvers.solved(weight, hessian, mask)
    descended = solvers.descended(weight, solvers.scaled(hessian), mask)
    for row in range(len(weight)):
        expected = np.zeros(24)
        expected[mask[row]] = np.linalg.lstsq(x[:, mask[row]], x @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(exact[row], expected, atol=1e-8)
    np.testing.assert_allclose(descended, exact, atol=1e-3)
    assert not exact[~mask].any() and not descended[~mask].any()


def test_moments_and_damping_are_ridge_regression() -> None:
    x, weight, _ = problem(6, 16, rows=1100)
    wanted = x @ weight.T + np.random.default_rng(2).normal(size=(1100, 6))
    moments = solvers.Moments(16, {"a": 6})
    for start in range(0, 1100, 300):
        moments.add(x[start : start + 300], {"a": wanted[start : start + 300]})
    np.testing.assert_allclose(moments.hessian, x.T @ x, rtol=1e-4, atol=0.1)
    target, hessian = solvers.damped(moments, "a", weight, 0.01)
    pull = 0.01 * np.diag(np.diag(x.T @ x))
    np.testing.assert_allclose(hessian - moments.hessian, pull, rtol=1e-4, atol=1e-6)
    stacked = np.concatenate([x, np.sqrt(pull)])
    expected = np.linalg.lstsq(stacked, np.concatenate([wanted, np.sqrt(pull) @ weight.T]), rcond=None)[0].T
    np.testing.assert_allclose(target, expected, atol=1e-3)
    lost = np.sum((x @ target.T - wanted) ** 2) / np.sum(wanted**2)
    assert moments.error("a", target) == pytest.approx(lost, rel=1e-3)


def test_centred_moments_leave_the_mean_to_the_bias() -> None:
    x, weight, _ = problem(6, 16)
    x = x + 3
    wanted = x @ weight.T + 5
    moments = solvers.Moments(16, {"a": 6})
    moments.add(x, {"a": wanted})
    assert moments.centred().error("a", weight) < 1e-4 < moments.error("a", weight)
    np.testing.assert_allclose(moments.shift("a", weight), 5, atol=1e-3)
    halves = solvers.Moments(16, {"a": 6}), solvers.Moments(16, {"a": 6})
    halves[0].add(x[:150], {"a": wanted[:150]})
    halves[1].add(x[150:], {"a": wanted[150:]})
    both = halves[0] + halves[1]
    assert both.rows == 400
    np.testing.assert_allclose(both.centred().hessian, np.cov(x.T, bias=True) * 400, rtol=1e-3, atol=0.5)


def test_inputs_that_never_change_do_no_harm() -> None:
    """A constant channel beside others: nothing of it is left once the mean is taken away, but rounding."""
    x, weight, _ = problem(8, 16)
    x[:, 3], x[:, 7] = 1e3, 0.0
    moments = solvers.Moments(16, {"a": 8})
    moments.add(x.astype(np.float32), {"a": (x @ weight.T).astype(np.float32)})
    target, hessian = solvers.damped(moments.centred(), "a", weight, 0.01)
    for solver in solvers.SOLVERS.values():
        pruned = solver.solve(target, hessian, sp.Unstructured(), 0.5).weight
        assert np.isfinite(pruned).all() and moments.centred().error("a", pruned) < 0.2


def test_too_few_rows_are_usable_with_damping() -> None:
    """Fewer rows than inputs: the Hessian has no inverse, damped it has, and weights nobody saw keep their values."""
    x, weight, _ = problem(6, 32, rows=8)
    x[:, 5] = 0
    moments = solvers.Moments(32, {"a": 6})
    moments.add(x, {"a": x @ weight.T})
    target, hessian = solvers.damped(moments, "a", weight, 1e-2)
    np.testing.assert_allclose(target, weight, atol=1e-3)
    for solver in solvers.SOLVERS.values():
        assert np.isfinite(solver.solve(target, hessian, sp.Block(1, 4), 0.5).weight).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x, weight, _ = problem(6, 16)
    x[3, 4] = bad
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        solvers.Moments(16, {"a": 6}).add(x, {"a": x @ weight.T})


def test_rounding_makes_up_for_itself() -> None:
    _, weight, hessian = problem(16, 48)
    pruned = solvers.admm(weight, hessian, sp.Block(1, 4), 0.5).weight
    found = solvers.rounded(pruned, hessian, pruned != 0)
    levels, scales = quantize_weight(found)
    np.testing.assert_allclose(levels * scales[:, None], found, rtol=1e-5, atol=1e-6)  # it lies on its levels
    assert not found[pruned == 0].any()
    levels, scales = quantize_weight(pruned)
    plain = solvers.relative_error(levels * scales[:, None], pruned, hessian)
    assert solvers.relative_error(found, pruned, hessian) < 0.8 * plain


def test_allocation_is_the_best_of_all() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        units, levels = 4, 4
        saved = np.cumsum(rng.integers(1, 50, (units, levels)), axis=1)
        errors = np.cumsum(rng.uniform(0, 1, (units, levels)), axis=1)
        target = int(0.6 * saved[:, -1].sum())
        best = min(
            (sum(errors[u][c] for u, c in enumerate(choice)), choice)
            for choice in itertools.product(range(levels), repeat=units)
            if sum(saved[u][c] for u, c in enumerate(choice)) >= target
        )
        found = solvers.allocate(errors.tolist(), saved.tolist(), target)
        assert sum(saved[u][c] for u, c in enumerate(found)) >= target
        assert sum(errors[u][c] for u, c in enumerate(found)) <= best[0] * 1.02
    assert solvers.allocate([[0.0, 1.0]] * 2, [[0, 10]] * 2, 0) == [0, 0]
    assert solvers.allocate([[0.0, 1.0]] * 2, [[0, 10]] * 2, 20) == [1, 1]
    with pytest.raises(NmcompileError, match="at most 20 weights"):
        solvers.allocate([[0.0, 1.0]] * 2, [[0, 10]] * 2, 21)


def test_wide_layers_change_their_penalty_more_rarely_and_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((2000, 96)) @ rng.standard_normal((96, 96)), 0)
    hessian, weight = x.T @ x + np.eye(96), rng.standard_normal((32, 96))
    module = sys.modules["nmcompile.solvers.admm"]
    for pattern in ("2x4", "2:4"):
        errors = []
        for wide in (2048, 0):
            monkeypatch.setattr(module, "WIDE", wide)
            left = solvers.admm(weight, hessian, sp.parse_pattern(pattern), 0.5).weight
            errors.append(solvers.relative_error(left, weight, hessian))
        assert errors[1] != errors[0] and errors[1] < 1.03 * errors[0]


# ---- quick paths


@pytest.mark.parametrize("size", [1, 7, 256, 300, 1025])
def test_inverses_by_blocks_are_inverses(size: int) -> None:
    _, _, hessian = problem(1, size, rows=2 * size)
    matrix = solvers.scaled(hessian).matrix
    raised = matrix + 0.1 * np.eye(size, dtype=np.float32)
    found = inverted(raised)
    assert found.dtype == np.float32 and found.shape == raised.shape
    np.testing.assert_allclose(found, np.linalg.inv(raised.astype(np.float64)), atol=1e-5 * np.abs(found).max())
    assert np.array_equal(raised, matrix + 0.1 * np.eye(size, dtype=np.float32))  # what was given stays


def test_rows_that_have_converged_are_set_aside_and_stay() -> None:
    """Rows that are done at once beside rows that take long: each ends where it would by itself."""
    _, weight, hessian = problem(12, 64)
    mask = np.random.default_rng(1).random(weight.shape) < 0.5
    mask[::2] = np.arange(64) < 1  # one input: a single step
    scaled = solvers.scaled(hessian)
    together = solvers.descended(weight, scaled, mask)
    for row in range(12):
        alone = solvers.descended(weight[row : row + 1], scaled, mask[row : row + 1])
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    exact = solvers.solved(weight, hessian, mask)
    np.testing.assert_allclose(together, exact, rtol=1e-2, atol=1e-2)
    assert not together[~mask].any()


def test_a_start_near_the_end_takes_fewer_steps() -> None:
    _, weight, hessian = problem(24, 96)
    mask = sp.keep_mask(weight**2, sp.Block(2, 4), 0.5)
    scaled, exact = solvers.scaled(hessian), solvers.solved(weight, hessian, mask)
    near = exact * 1.001
    least = solvers.relative_error(exact, weight, hessian)
    cold, warm = (solvers.relative_error(solvers.descended(weight, scaled, mask, 4, start), weight, hessian)
                  for start in (None, near))  # fmt: skip
    assert least <= warm < least + 0.1 * (cold - least)
    whole = solvers.descended(weight, scaled, mask, start=near)
    np.testing.assert_allclose(whole, exact, rtol=1e-3, atol=1e-3)


def test_the_order_of_features_does_not_depend_on_how_many_pairs_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = np.round(np.random.default_rng(0).random((48, 6)), 1)  # many alike
    whole = grouping.grouped(profiles, 8)
    for at_once in (1, 7, 100):
        monkeypatch.setattr(grouping, "AT_ONCE", at_once)
        assert np.array_equal(grouping.grouped(profiles, 8), whole)


@pytest.mark.parametrize("pattern", [sp.NM(2, 4), sp.NM(1, 2), sp.NM(3, 8), sp.NM(5, 16)], ids=str)
@pytest.mark.parametrize("columns", [16, 22])
def test_n_of_m_by_sorting(pattern: sp.NM, columns: int) -> None:
    score = np.random.default_rng(0).integers(0, 4, (50, columns)).astype(np.float32)  # many equal ones
    keep = sp.keep_mask(score, pattern, 0.0)
    for row, kept in zip(score, keep, strict=True):
        for start in range(0, columns, pattern.m):
            group = row[start : start + pattern.m]
            best = sorted(range(len(group)), key=lambda i: (-group[i], i))[: pattern.n]
            assert sorted(np.flatnonzero(kept[start : start + pattern.m])) == sorted(best)


@pytest.mark.parametrize("shape", [(12, 24), (13, 23), (8, 9)])
@pytest.mark.parametrize("block", [sp.Block(2, 4), sp.Block(1, 8), sp.Block(4, 1), sp.Block(16, 16), sp.Block(3, 5)],
                         ids=str)  # fmt: skip
def test_sums_of_blocks(shape: tuple[int, int], block: sp.Block) -> None:
    score = np.random.default_rng(0).random(shape).astype(np.float32)
    before = score.copy()
    units = sp.unit_scores(score, block)
    assert units.shape == (-(-shape[0] // block.rows), -(-shape[1] // block.cols)) and units.dtype == np.float64
    for i, j in np.ndindex(*units.shape):
        part = score[i * block.rows : (i + 1) * block.rows, j * block.cols : (j + 1) * block.cols]
        assert units[i, j] == pytest.approx(part.astype(np.float64).sum(), rel=1e-12)
    assert np.array_equal(score, before)


def test_errors_that_are_only_compared_are_those_of_double_precision() -> None:
    _, weight, hessian = problem(24, 96)
    pruned = weight * sp.keep_mask(weight**2, sp.Block(2, 4), 0.5)
    lost = solvers.power_lost(pruned, weight, solvers.scaled(hessian))
    assert lost / solvers.power(weight, hessian) == pytest.approx(
        solvers.relative_error(pruned, weight, hessian), rel=1e-5)  # fmt: skip


def test_power_lost_of_huge_weights_is_that_in_double_precision() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 16))
    weight, hessian = rng.standard_normal((8, 16)), x.T @ x
    for size in (1.0, 1e30):
        left = size * weight * (rng.random(weight.shape) < 0.5)
        found = solvers.power_lost(left, size * weight, solvers.scaled(hessian))
        assert found == pytest.approx(solvers.power(left - size * weight, hessian), rel=1e-4)


def test_the_command_line_knows_every_solver() -> None:
    """It lists them itself: --help must not wait for numpy."""
    option = next(param for param in command.params if param.name == "solver")
    assert isinstance(option.type, click.Choice) and list(option.type.choices) == list(solvers.SOLVERS)
