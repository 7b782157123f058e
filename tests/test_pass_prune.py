"""Prune: a pattern and a sparsity per layer, any of them in one run; and solvers as rows of a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse
from pruning_cases import DENSE, DOWN, MODEL, SHARED, UP, calibrated, prunes, same, weights, zeros

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.errors import PassError
from nmcompile.passes import Prune
from nmcompile.pipeline import Pass, Pipeline
from nmcompile.prune import Goal, PruningPass
from nmcompile.recipes import pruning_passes
from nmcompile.solvers import SOLVERS, Needs, Solution, Solver, scored
from nmcompile.spec import parse_spec, spec

CHAIN = """(float[B,S,32] x) => (float[B,S,32] y) <float[32,64] u, float[64] b, float[64,64] v, float[64,32] w> {
    h = MatMul(x, u)  a = Add(h, b)  r = Relu(a)  i = MatMul(r, v)  s = Relu(i)  j = MatMul(s, w)  y = Neg(j) }"""
FIRST, SECOND, THIRD = "MatMul_0", "MatMul_3", "MatMul_5"
EVERY = "include=*"


def passes(text: str) -> Pass:
    (found,) = parse_spec(text)
    assert spec(found) == text  # as it is typed, it is printed
    return found


@pytest.fixture(scope="module")
def chain() -> gs.Graph:
    return parse(CHAIN)


@pytest.fixture(scope="module")
def data(chain: gs.Graph) -> Data:
    rng = np.random.default_rng(0)
    rows = [{"x": rng.standard_normal((9, 32)).astype(np.float32)} for _ in range(48)]
    return open_data(rows, g.inputs(chain))


# ---- goals


def test_each_layer_gets_its_own_zeros() -> None:
    before, after, report = prunes(passes(f"prune(sparsity=0.5, layers={UP}:2:4|{DOWN}:4x4@0.75)"))
    assert report.changed == 2 and report.notes == DENSE
    assert report.detail["goals"] == {UP: "2:4", DOWN: "4x4@0.75"}
    assert report.detail["density"] == {UP: 0.5, DOWN: 0.25}
    kept = weights(after)[UP] != 0
    assert (kept.reshape(16, 2, 4).sum(axis=-1) == 2).all()
    blocks = (weights(after)[DOWN] != 0).reshape(2, 4, 4, 4).sum(axis=(1, 3))
    assert sorted(blocks.ravel()) == [0] * 6 + [16] * 2
    assert same(parse(MODEL), before)


def test_the_first_rule_that_matches_decides() -> None:
    _, after, report = prunes(passes(f"prune(pattern=unstructured, sparsity=0.25, layers={DOWN}:dense|*:2x2@0.5)"))
    assert zeros(after)[DOWN] == 0 and zeros(after)[UP] == 64
    assert f"{DOWN}: kept dense, dense by its rule" in report.notes
    _, after, _ = prunes(passes(f"prune(pattern=dense, layers={UP}:unstructured@0.25)"))
    assert zeros(after)[UP] == 32 and zeros(after)[DOWN] == 0
    _, after, _ = prunes(passes(f"prune(sparsity=0.25, layers={UP}:unstructured)"))  # the sparsity of the pass
    assert zeros(after)[UP] == 32 and zeros(after)[DOWN] == 32


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("block-prune(sparsity=0.5, block=4x4)", "prune(pattern=4x4, sparsity=0.5)"),
        ("block-prune(solver=wanda)", "prune(solver=wanda)"),
        ("magnitude-prune(ranking=global, sparsity=0.6)", "prune(ranking=global, pattern=unstructured, sparsity=0.6)"),
        ("n-m-prune(pattern=1:4)", "prune(pattern=1:4)"),
        ("n-m-prune(multiple=16)", "prune(pattern=2:4, multiple=16)"),
        (f"n-m-prune(solver=obs, {EVERY}, damping=0.05)", f"prune(solver=obs, {EVERY}, damping=0.05, pattern=2:4)"),
        ("block-prune(solver=admm, ranking=sensitivity, sparsity=0.5)",
         "prune(solver=admm, ranking=sensitivity, pattern=2x4, sparsity=0.5)"),
    ],
)  # fmt: skip
def test_the_older_names_do_the_same(old: str, new: str) -> None:
    graph = parse(MODEL)
    (one, first), (other, second) = (calibrated(parse_spec(text)[0], graph) for text in (old, new))
    assert g.to_text(one) == g.to_text(other)
    assert (first.changed, first.detail, first.notes) == (second.changed, second.detail, second.notes)


def test_single_weights_by_a_solver_that_fits_have_a_name_of_their_own() -> None:
    pass_ = passes("prune(solver=admm, pattern=unstructured, sparsity=0.5)")
    after, report = calibrated(pass_, parse(MODEL))
    assert zeros(after)[UP] == zeros(after)[DOWN] == 64 and report.detail["pattern"] == "unstructured"


def test_patterns_are_fitted_together(chain: gs.Graph, data: Data) -> None:
    """Each to what those before it have become: what the first loses is part of what the others see."""
    text = f"prune(solver=admm, {EVERY}, sparsity=0.5, layers={FIRST}:2:4|{SECOND}:4x4|{THIRD}:unstructured@0.7)"
    after, (report,) = Pipeline([passes(text)], calibration=Calibration(data)).run(chain)
    assert report.detail["density"] == {FIRST: 0.5, SECOND: 0.5, THIRD: pytest.approx(0.3, abs=0.001)}
    assert list(report.detail["fitted"]) == [FIRST, SECOND, THIRD]  # type: ignore[call-overload]
    alone, _ = Pipeline([parse_spec(text.replace(f"{FIRST}:2:4", f"{FIRST}:dense"))[0]],
                        calibration=Calibration(data)).run(chain)  # fmt: skip
    assert not np.array_equal(weights(alone)[SECOND], weights(after)[SECOND])
    run, was = g.runner(after), g.runner(chain)
    lost = [np.sum((run(feed)["y"] - was(feed)["y"]) ** 2) / np.sum(was(feed)["y"] ** 2) for feed in data]
    assert np.mean(lost) < 0.5


def test_sparsities_by_sensitivity_are_shared_among_the_layers_of_one_goal(chain: gs.Graph, data: Data) -> None:
    rules = f"{FIRST}:2:4|{SECOND}:1x4@0.5|{THIRD}:unstructured@0.7"
    pass_ = passes(f"prune(solver=obs, ranking=sensitivity, {EVERY}, damping=0.05, layers={rules})")
    _, (report,) = Pipeline([pass_], calibration=Calibration(data)).run(chain)
    assert report.detail["density"] == {FIRST: 0.5, SECOND: 0.5, THIRD: pytest.approx(0.3, abs=0.001)}
    assert [unit["layers"] for unit in report.detail["table"]] == [[SECOND], [THIRD]]  # type: ignore[attr-defined]


def test_n_m_zeros_only_where_sizes_are_multiples() -> None:
    _, after, report = prunes(passes("prune(layers=*:2:4, multiple=16)"))
    assert not any(zeros(after).values())
    assert f"{UP}: kept dense, 16x8 are not multiples of 16" in report.notes
    _, after, _ = prunes(passes("prune(multiple=16)"))
    assert zeros(after)[UP] > 0  # blocks do not ask


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"layers={UP}", f"layers={UP} is not NAMES:PATTERN or NAMES:PATTERN@SPARSITY"),
        (f"layers={UP}:half", "is not NAMES:PATTERN"),
        (f"layers={UP}:2x4@much", "'much' is not a sparsity"),
        (f"layers={UP}:2x4@1", f"layers={UP}:2x4@1: sparsity=1.0 is not a share of zeros"),
        (f"layers={UP}:2:4@0.8", "pattern 2:4 always has 0.5 zeros; leave the sparsity out"),
        (f"layers={UP}:3:2", "N:M needs 0 < N <= M"),
        (f"layers={UP}:dense@0.5", "pattern dense has no zeros"),
        ("layers=decoder*:2:4", "layers=decoder*:... matches no linear layer; the graph has MatMul_0, "),
        ("pattern=2:4, sparsity=0.8", "pattern 2:4 always has 0.5 zeros"),
        ("pattern=half", "unknown sparsity pattern 'half'"),
        ("multiple=0", "multiple=0 is no size"),
        ("solver=taylor", "solver=taylor is not known; choose one of magnitude, wanda, obs, admm"),
        ("solver=admm, ranking=global", "ranking=global is for solver=magnitude and solver=wanda"),
        ("solver=admm", "needs calibration data"),
    ],
)
def test_errors_name_the_option(text: str, message: str) -> None:
    graph = parse(MODEL)
    with pytest.raises(PassError) as error:
        Pipeline(parse_spec(f"prune({text})")).run(graph)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_goal_is_one_per_layer_even_where_weights_are_shared() -> None:
    _, after, report = prunes(passes(f"prune({EVERY}, layers=MatMul_0:2:4|MatMul_2:2x4@0.75)"), SHARED)
    assert report.records is not None
    assert {name: str(record.pattern) for name, record in report.records.layers.items()} == dict.fromkeys(
        ("MatMul_0", "MatMul_2"), "2:4")  # the first user's  # fmt: skip
    assert zeros(after) == {"MatMul_0": 32, "MatMul_2": 32}


# ---- a solver is a row of the table


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One solver that scores, by the inputs alone, and one that fits: the least columns go, the rest grows by 1 %."""

    def grown(weight: np.ndarray, hessian: np.ndarray, pattern: sp.Pattern, sparsity: float) -> Solution:
        mask = sp.keep_mask(np.broadcast_to(np.diag(hessian), weight.shape), pattern, sparsity)
        return Solution(weight * mask * 1.01, mask)

    rows = {"loudest": scored(lambda weight, squares: np.broadcast_to(squares, weight.shape), Needs.SQUARES),
            "grown": Solver(grown, Needs.HESSIAN)}  # fmt: skip
    monkeypatch.setitem(SOLVERS, "loudest", rows["loudest"])
    monkeypatch.setitem(SOLVERS, "grown", rows["grown"])


@pytest.mark.usefixtures("made_up")
def test_a_new_solver_takes_its_row_only(chain: gs.Graph, data: Data) -> None:
    for name, fits in (("loudest", False), ("grown", True)):
        pass_ = passes(f"prune(solver={name}, {EVERY}, pattern=4x1, sparsity=0.5)")
        assert isinstance(pass_, PruningPass) and pass_.fits == fits
        with pytest.raises(PassError, match="needs calibration data"):
            Pipeline([pass_]).run(chain)
        after, (report,) = Pipeline([pass_], calibration=Calibration(data)).run(chain)
        assert ("fitted" in report.detail) == fits and report.changed == 3
        first, was = weights(after)[FIRST], weights(chain)[FIRST]
        assert np.count_nonzero(first) == first.size // 2
        assert np.array_equal(first[first != 0], was[first != 0]) != fits
        recipe = pruning_passes("2x4", 0.5, name)
        assert [item.name for item in recipe] == (["permute-features"] if fits else []) + ["block-prune"]
    with pytest.raises(PassError, match="ranking=global is for solver=magnitude and solver=wanda and solver=loudest"):
        Pipeline(parse_spec("prune(solver=grown, ranking=global)")).run(chain)
    with pytest.raises(PassError, match="choose one of magnitude, wanda, obs, admm, loudest, grown"):
        Pipeline(parse_spec("prune(solver=taylor)")).run(chain)


def test_a_plan_is_a_value() -> None:
    plan = Prune(sparsity=0.5, layers=("*.0.*:2:4",)).plan
    assert plan == Prune(sparsity=0.5, layers=("*.0.*:2:4",)).plan != replace(plan, ranking="global")
    assert plan.goal_of("encoder.0.query") == Goal(sp.NM(2, 4), 0.5)
    assert plan.goal_of("encoder.1.query") == Goal(sp.Block(2, 4), 0.5)
    assert plan.patterns == "2:4, 2x4" and plan.zeros and not plan.needs_data


def test_recipes_name_single_weights_after_their_solver() -> None:
    assert [spec(item) for item in pruning_passes("unstructured", 0.5, "magnitude")] == [
        "magnitude-prune(sparsity=0.5)"]  # fmt: skip
    assert [spec(item) for item in pruning_passes("unstructured", 0.5, "admm")] == [
        "prune(solver=admm, ranking=sensitivity, pattern=unstructured, sparsity=0.5)"]  # fmt: skip
    assert [spec(item) for item in pruning_passes("2x4", 0.5, "admm", {"norms": False})] == [
        "permute-features", "block-prune(solver=admm, ranking=sensitivity, norms=false, sparsity=0.5)"]  # fmt: skip
