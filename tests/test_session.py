"""Sessions: inputs that do not fit, concurrent runs, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import MODELS, compiled, feeds

import nmcompile
from nmcompile import _native
from nmcompile import ir as g
from nmcompile.errors import InputError, PlanError
from nmcompile.session import load_cpu
from nmcompile.tensorinfo import TensorInfo, check_feeds

GOOD = {
    "input_ids": np.array([[5, 6, 7]], np.int64),
    "attention_mask": np.ones((1, 3), np.int64),
    "token_type_ids": np.zeros((1, 3), np.int64),
}


@pytest.fixture(scope="module")
def session() -> nmcompile.Session:
    return load_cpu(compiled("bert-torchscript").plan)


def test_a_session_describes_its_model(session: nmcompile.Session) -> None:
    assert [str(info) for info in session.inputs] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, sequence]",
        "token_type_ids: int64[batch, sequence]",
    ]
    assert [info.name for info in session.outputs] == ["last_hidden_state", "pooler_output"]
    assert set(session.run(GOOD, ["pooler_output"])) == {"pooler_output"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"ids": np.zeros((1, 3))}, "there is no input 'ids'; the model takes input_ids"),
        ({"input_ids": np.zeros((1, 3), np.float32)}, r"is float32, the model takes int64; convert it with .astype"),
        ({"input_ids": np.zeros(3, np.int64)}, r"has shape \[3\], the model takes input_ids: int64\[batch, sequence\]"),
        ({"attention_mask": np.ones((1, 4), np.int64)}, "has sequence=4, input 'input_ids' has sequence=3"),
        ({"input_ids": np.array([[5, 6, 40000]])}, r"token id 40000 at \[0, 2\] of input 'input_ids' is outside 0\.\."),
        ({"input_ids": np.array([[5, 6, -1]])}, r"token id -1 at \[0, 2\] of input 'input_ids' is outside 0\.\."),
        ({"token_type_ids": np.array([[0, 0, 9]])}, r"9 at \[0, 2\] of input 'token_type_ids' is outside 0\.\.1"),
    ],
)
def test_inputs_that_do_not_fit(session: nmcompile.Session, change: dict[str, np.ndarray | None], said: str) -> None:
    given = {name: values for name, values in {**GOOD, **change}.items() if values is not None}
    with pytest.raises(InputError, match=said):
        session.run(given)


def test_more_tokens_than_positions_is_an_error(session: nmcompile.Session) -> None:
    long = {name: np.ones((1, 65), np.int64) for name in GOOD}
    with pytest.raises(InputError, match="64"):
        session.run(long)


def test_narrow_integers_are_taken(session: nmcompile.Session) -> None:
    narrow = {name: values.astype(np.int32) for name, values in GOOD.items()}
    np.testing.assert_array_equal(session.run(narrow)["pooler_output"], session.run(GOOD)["pooler_output"])


def test_a_layer_with_one_large_bias_before_its_gelu(tmp_path: Path) -> None:
    """It makes the scale of what follows larger than 64; all other features are relu to that scale."""
    model = onnx.load(MODELS / "bert-torchscript.onnx")
    bias = next(t for t in model.graph.initializer if "intermediate.dense.bias" in t.name)
    values = onnx.numpy_helper.to_array(bias).copy()
    values[5] = 30_000
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "m.onnx")
    result = nmcompile.compile(
        tmp_path / "m.onnx", tmp_path / "m.plan", preset="fast", emit_onnx=tmp_path / "q.onnx", measure=False
    )
    assert result.native
    made = load_cpu(tmp_path / "m.plan")
    wide = [s.get("y_scale", 0) for s in made.header["segments"][0]["steps"] if s.get("activation", "none") != "none"]
    assert max(wide) > 64
    got, want = made.run(GOOD)["last_hidden_state"], g.run(g.load(tmp_path / "q.onnx"), GOOD)["last_hidden_state"]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=0.05)
    for isa in _native.available_isas():
        np.testing.assert_array_equal(load_cpu(tmp_path / "m.plan", isa=isa).run(GOOD)["last_hidden_state"], got)


@pytest.mark.parametrize(
    ("dtype", "values", "said"),
    [
        ("int32", [2**32 + 5], "holds 4294967301, the model takes int32, from -2147483648 to 2147483647"),
        ("int32", [-(2**32) + 1], "holds -4294967295"),
        ("int64", np.array([2**63 + 5], np.uint64), "holds 9223372036854775813, the model takes int64"),
        ("uint8", [0, -1], "holds -1, the model takes uint8, from 0 to 255"),
        ("uint8", [3, 256], "holds 256"),
        ("int64", [[1], [1, 2]], "is no array"),
        ("int64", [None], "holds objects, not numbers"),
        ("int64", [2**70], "holds objects, not numbers"),
        ("float32", "text", "is <U4, the model takes float32"),
        ("float32", [True], "is bool, the model takes float32"),
        ("bool", [1], "is int64, the model takes bool"),
        ("object", np.array([1, "a"], object), "must hold texts and nothing else"),
        ("object", [b"a"], "must hold texts and nothing else"),
    ],
)
def test_values_that_would_become_others(dtype: str, values: object, said: str) -> None:
    info = TensorInfo("x", np.dtype(dtype), (None,))
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        check_feeds({"x": values}, [info])  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)


def test_values_that_stay_what_they_are() -> None:
    def taken(dtype: str, values: object) -> np.ndarray:
        return check_feeds({"x": values}, [TensorInfo("x", np.dtype(dtype), (None,))])["x"]  # type: ignore[dict-item]

    for dtype, values in (("int32", [2**31 - 1, -(2**31)]), ("uint8", np.array([0, 255])),
                          ("int64", np.zeros(0, np.uint64)), ("float32", np.array([1.5], ">f4")),
                          ("object", ["a", "bc"])):  # fmt: skip
        assert taken(dtype, values).dtype == dtype
        assert taken(dtype, values).tolist() == np.asarray(values).tolist()


@pytest.mark.parametrize("feeds", [None, [], "ids", [("input_ids", 1)], {5: 1}])
def test_feeds_that_are_no_dictionary_of_names(session: nmcompile.Session, feeds: Any) -> None:
    with pytest.raises(InputError, match=r"dictionary of arrays|there is no input 5"):
        session.run(feeds)


def test_unknown_output(session: nmcompile.Session) -> None:
    with pytest.raises(InputError, match="there is no output 'logits'; the model has last_hidden_state"):
        session.run(GOOD, ["logits"])


def test_empty_batches_and_masked_rows(session: nmcompile.Session) -> None:
    nothing = {name: np.zeros((0, 3), np.int64) for name in GOOD}
    assert session.run(nothing)["last_hidden_state"].shape == (0, 3, 64)
    plain = nmcompile.load(compiled("distilbert-torchscript").plan)
    masked = {"input_ids": GOOD["input_ids"], "attention_mask": np.zeros((1, 3), np.int64)}
    assert not plain.run(masked)["last_hidden_state"].any()


@pytest.mark.parametrize("mask", [[[0, 1, 1], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]]], ids=["left", "empty"])
def test_a_hidden_first_token_that_the_pooler_reads(session: nmcompile.Session, mask: list[list[int]]) -> None:
    feeds = {name: np.concatenate([values, values]) for name, values in GOOD.items()}
    feeds["attention_mask"] = np.array(mask)
    row = mask.index([0, 1, 1] if [0, 1, 1] in mask else [0, 0, 0])
    with pytest.raises(InputError, match=f"'attention_mask' hides the first token of row {row}"):
        session.run(feeds)


def test_many_threads_share_a_session() -> None:
    made = compiled("gpt2-torchscript")
    shared = nmcompile.load(made.plan, threads=2)
    batches = list(feeds(made.source)) * 4
    alone = [shared.run(batch)["logits"] for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda batch: shared.run(batch)["logits"], batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_profile_names_every_step(session: nmcompile.Session) -> None:
    steps = session.profile(GOOD)
    assert sum(name.startswith("linear") for name, _ in steps) == 13
    assert all(spent >= 0 for _, spent in steps)


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_threads_out_of_range(threads: int) -> None:
    with pytest.raises(InputError, match="is not between 1 and 1024"):
        nmcompile.load(compiled("bert-torchscript").plan, threads=threads)


def test_an_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMCOMPILE_ISA", "mmx")
    with pytest.raises(PlanError, match="mmx"):
        nmcompile.load(compiled("bert-torchscript").plan)


def test_not_a_plan(tmp_path: Path) -> None:
    other = tmp_path / "x.plan"
    other.write_bytes(b"\x08\x09 an onnx file")
    with pytest.raises(PlanError, match=r"is not a plan; make one with: nmcompile MODEL\.onnx"):
        nmcompile.load(other)
    with pytest.raises(PlanError, match="cannot read the plan"):
        nmcompile.load(tmp_path / "missing.plan")


def test_running_a_plan_imports_neither_onnx_nor_the_compiler() -> None:
    code = (
        "import sys, numpy as np, nmcompile\n"
        f"s = nmcompile.load({str(compiled('bert-torchscript').plan)!r})\n"
        "s.run({i.name: np.ones((1, 4), np.int64) for i in s.inputs})\n"
        "heavy = {'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'click', 'rich', 'nmcompile.compiler'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["bert-torchscript", "t5-torchscript"])
def test_a_tuned_session_gives_the_same_bits(name: str) -> None:
    made = compiled(name)
    plain, tuned = (load_cpu(made.plan, threads=2) for _ in range(2))
    batches = list(feeds(made.source))
    tuned.tune(batches[2])
    for batch in batches:
        expected, found = plain.run(batch), tuned.run(batch)
        assert all(found[output].tobytes() == values.tobytes() for output, values in expected.items())
    wrong = {key: values.astype(np.float64) for key, values in batches[0].items()}
    with pytest.raises(InputError, match="is float64"):
        tuned.tune(wrong)
