"""Sessions: inputs that do not fit, concurrent runs, light imports."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from compiled import compiled, feeds

import nmcompile
from nmcompile.errors import InputError, PlanError
from nmcompile.session import load_cpu

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
