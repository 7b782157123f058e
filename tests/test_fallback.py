"""Accuracy control: the noise of layers, the search for those that go back, metrics, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import held_of
from onnx_text import parse_model

import nmcompile
from nmcompile import ir as g
from nmcompile.compare import powers
from nmcompile.errors import InputError, NmcompileError, UnsupportedError
from nmcompile.fallback import Noise, fall_back, worst_first
from nmcompile.metrics import Limit, cosine, disagreement, divergence, parse_limit
from nmcompile.plan import read_plan

BERT = Path(__file__).parent.parent / "models" / "bert-torchscript.onnx"


def samples(count: int = 24) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"input_ids": rng.integers(5, 200, rng.integers(4, 20))}


# ---- metrics


def test_metrics_by_hand() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    b = np.array([[4.0, 3.0], [1.0, 0.0]])
    one, other = (lambda feeds: {"y": a}), (lambda feeds: {"y": b})
    assert cosine(one, other, [{}]) == pytest.approx(1 - (24 / 25 + 1) / 2)
    assert disagreement(one, other, [{}]) == 0.5
    p, q = np.exp(a[0]) / np.exp(a[0]).sum(), np.exp(b[0]) / np.exp(b[0]).sum()
    assert divergence(one, other, [{}]) == pytest.approx(np.sum(p * np.log(p / q)) / 2)
    assert cosine(one, one, [{}]) == pytest.approx(0)
    assert divergence(one, one, [{}]) == 0 == disagreement(one, one, [{}])


def test_padding_does_not_count() -> None:
    feeds = {"attention_mask": np.array([[1, 0]])}
    one = {"y": np.array([[[1.0, 0.0], [5.0, 5.0]]])}
    other = {"y": np.array([[[1.0, 0.0], [-5.0, 9.0]]])}
    assert cosine(lambda _: one, lambda _: other, [feeds]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "is not METRIC=VALUE"),
        ("cosine=much", "is not METRIC=VALUE"),
        ("cosine=-1", "is not METRIC=VALUE"),
        ("accuracy=0.1", "is not known; choose cosine, kl, top1"),
        ("nosuch.py:score=0.1", "there is no file nosuch.py"),
    ],
)
def test_wrong_limits(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_limit(text, [])


def test_a_function_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text("def mean(run):\n    return float(run({})['y'].mean())\ndef wrong(run):\n    return 'good'\n")
    limit = parse_limit(f"{file}:mean=0.5", [])
    assert limit.score(lambda _: {"y": np.ones(3)}, lambda _: {"y": np.zeros(3)}) == 1.0
    with pytest.raises(InputError, match="has no function nosuch"):
        parse_limit(f"{file}:nosuch=0.5", [])
    with pytest.raises(NmcompileError, match="gave 'good'"):
        parse_limit(f"{file}:wrong=0.5", []).score(lambda _: {}, lambda _: {})
    file.write_text("1 / 0")
    with pytest.raises(InputError, match="does not run: division by zero"):
        parse_limit(f"{file}:mean=0.5", [])


# ---- the search


def search(harm: dict[str, float], allowed: float, float_harm: dict[str, float] | None = None) -> object:
    """Each layer costs its harm until it is dense, and float_harm until it is float."""
    rest = float_harm or {}

    def attempt(dense: Sequence[str], floating: Sequence[str]) -> float:
        return sum(v for k, v in harm.items() if k not in dense) + sum(v for k, v in rest.items() if k not in floating)

    order = worst_first({name: Noise(0.0, value) for name, value in harm.items()}, harm)
    second = worst_first({name: Noise(0.0, value) for name, value in rest.items()}, rest)
    return fall_back(Limit("cosine", allowed, lambda a, b: 0.0), attempt, lambda: (order, second), lambda *_: None)


def test_the_fewest_layers_go_back() -> None:
    harm = {"a": 1.0, "b": 5.0, "c": 2.0, "d": 0.5}
    for allowed, expected in ((9.0, ""), (4.0, "b"), (3.4, "bc"), (1.0, "bca"), (0.1, "bcad")):
        found = search(harm, allowed)
        assert found.dense == tuple(expected) and found.drop <= allowed and not found.floating  # type: ignore[attr-defined]


def test_then_layers_go_to_float() -> None:
    found = search({"a": 1.0, "b": 2.0}, 0.5, {"a": 0.4, "b": 0.3, "c": 0.6})
    assert (found.dense, found.floating) == (("b", "a"), ("c", "a"))  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="even without pruning and quantization"):
        fall_back(Limit("kl", 0.1, lambda a, b: 0.0), lambda dense, floating: 1.0, lambda: (["a"], ["a"]),
                  lambda *_: None)  # fmt: skip


def test_a_limit_holds_on_the_plan(tmp_path: Path) -> None:
    data = list(samples())
    given = {"calibration": data, "sparsity": 0.8, "pattern": "2x4"}
    free = nmcompile.compile(BERT, tmp_path / "free.plan", **given)  # type: ignore[arg-type]
    lost = 1 - free.loss["last_hidden_state"].cosine
    half = f"cosine={lost / 2}"
    held = nmcompile.compile(BERT, tmp_path / "held.plan", max_drop=half, **given)  # type: ignore[arg-type]
    assert held_of(held).dense and held_of(held).drop <= lost / 2
    dense = {layer["name"] for layer in held.layers if layer["density"] > 0.9}  # rounding makes a few
    assert set(held_of(held).dense) <= dense
    assert 1 - held.loss["last_hidden_state"].cosine < lost
    assert read_plan(tmp_path / "held.plan").header["passes"] == [name for name, _, _ in held.passes]
    loose = nmcompile.compile(BERT, tmp_path / "loose.plan", max_drop="cosine=1", **given)  # type: ignore[arg-type]
    assert not held_of(loose).dense and (tmp_path / "loose.plan").read_bytes() == (tmp_path / "free.plan").read_bytes()


def test_layers_go_to_float_where_int8_is_too_coarse(tmp_path: Path) -> None:
    result = nmcompile.compile(BERT, tmp_path / "m.plan", calibration=list(samples()), max_drop="cosine=1e-5")
    assert held_of(result).floating and not held_of(result).dense and held_of(result).drop <= 1e-5
    precision = {layer["name"]: layer["precision"] for layer in result.layers}
    assert all(precision[name] != "int8" for name in held_of(result).floating)


def test_what_cannot_be_held_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("calls = []\ndef score(run):\n    calls.append(1)\n    return -float(len(calls))\n")
    with pytest.raises(UnsupportedError, match="even without"):
        nmcompile.compile(BERT, tmp_path / "m.plan", calibration=list(samples()), max_drop=f"{tmp_path}/s.py:score=0.5")
    assert not list(tmp_path.glob("*.plan*")) and not list(tmp_path.glob(".*plan*"))


# ---- sizes


def test_a_plan_of_a_size(tmp_path: Path) -> None:
    given = {"calibration": list(samples()), "solver": "magnitude", "measure": False}
    smaller = nmcompile.compile(BERT, tmp_path / "a.plan", size="0.45x", **given)  # type: ignore[arg-type]
    zeros = 1 - np.mean([layer["density"] for layer in smaller.layers[:12]])
    assert 0 < zeros < 1
    weights = nmcompile.compiler.model_bytes(BERT)
    assert smaller.sizes["plan"] / weights == pytest.approx(0.45, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "small"}, "is not a share"),
        ({"size": "0.01x"}, "take a larger size"),
        ({"size": "0.5x", "sparsity": 0.5}, "either a size or a sparsity"),
        ({"size": "0.5x", "pattern": "2:4"}, "always has the same size"),
        ({"size": "0.5x", "passes": "fold-constants"}, "give either passes or"),
    ],
)
def test_wrong_sizes(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(NmcompileError, match=message):
        nmcompile.compile(BERT, tmp_path / "m.plan", calibration=list(samples(8)), **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strange", ["a bias of -inf", "a weight of 1e30"])
@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5, "pattern": "2x4"}, {"max_drop": "cosine=0.5"}], ids=str)
def test_infinities_and_huge_weights_give_no_warning(strange: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A unit that is switched off by its bias; a sum of squares that single precision does not hold."""
    text = """(float[b,s,16] x) => (float[b,s,16] y) <float[16,32] w, float[32] a, float[32,16] v, float[16,16] u> {
        p = MatMul(x, w)  q = Add(p, a)  r = Relu(q)  h = MatMul(r, v)  k = Relu(h)  y = MatMul(k, u) }"""
    model = parse_model(text)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if strange == "a bias of -inf" and tensor.name == "a":
            values[0] = -np.inf
        elif strange != "a bias of -inf" and tensor.name == "w":
            values[0, 0] = 1e30
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    x = np.random.default_rng(0).standard_normal((16, 4, 16)).astype(np.float32)
    nmcompile.compile(model, tmp_path / "m.plan", calibration=[{"x": x}], tuning="off", **options)
    runs = (nmcompile.load(tmp_path / "m.plan").run, g.runner(g.load(model)))
    found, wanted = (run({"x": x[:2]})["y"] for run in runs)
    if strange == "a bias of -inf" and "sparsity" not in options:
        np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())
    assert np.isfinite(found).all()


def test_powers_are_those_of_finite_values() -> None:
    x, y = np.array([3, -np.inf, 1e30, 2], np.float32), np.array([1, -np.inf, 1e30, np.nan], np.float32)
    assert powers(x[:1], y[:1]) == (9.0, 4.0)
    np.testing.assert_allclose(powers(x, y), (1e60, 4.0), rtol=1e-5)
