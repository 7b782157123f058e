"""inspect, run, compare, passes, doctor, check."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

import nmcompile
from nmcompile import _native
from nmcompile.cli import cli
from nmcompile.cli.compare import below
from nmcompile.cli.doctor import UNTRIED
from nmcompile.compare import Difference
from nmcompile.passes import BUILTIN
from nmcompile.spec import parse_spec

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "distilbert-dynamo.onnx"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    ids = np.random.default_rng(0).integers(0, 256, (6, 10))
    mask = (np.arange(10) < np.array([[10], [7], [3], [10], [1], [5]])).astype(np.int64)
    np.savez(path / "x.npz", input_ids=ids, attention_mask=mask)
    nmcompile.compile(MODEL, path / "dense.plan", preset="fast", measure=False)
    nmcompile.compile(MODEL, path / "sparse.plan", preset="fast", measure=False, sparsity=0.8, pattern="4x4")
    return path


def test_inspect_a_plan(folder: Path) -> None:
    text = invoke("inspect", folder / "sparse.plan").stdout
    assert "plan for cpu" in text and "native" in text and "input_ids: int64[batch, sequence]" in text
    assert "block-prune(block=4x4)" in text and "blocks 4x4" in text
    found = json.loads(invoke("inspect", folder / "sparse.plan", "--json").stdout)
    assert found["kind"] == "plan" and len(found["layers"]) == 12
    assert all(layer["pattern"] == "4x4" and abs(layer["density"] - 0.2) < 0.02 for layer in found["layers"])


def test_inspect_finds_sparsity_in_an_onnx_model(tmp_path: Path) -> None:
    from nmcompile import ir as g
    from nmcompile.passes import NMPrune
    from nmcompile.pipeline import Pipeline

    pruned, _ = Pipeline([NMPrune()]).run(g.load(MODEL))
    g.save(pruned, tmp_path / "m.onnx")
    found = json.loads(invoke("inspect", tmp_path / "m.onnx", "--json").stdout)
    assert found["kind"] == "onnx" and found["opset"] == 20
    assert {layer["pattern"] for layer in found["layers"]} == {"2:4"}
    assert {layer["precision"] for layer in found["layers"]} == {"f32"}
    assert "2:4" in invoke("inspect", tmp_path / "m.onnx").stdout


def test_inspect_a_model_without_linear_layers() -> None:
    result = invoke("inspect", MODELS / "control-flow.onnx")
    assert result.exit_code == 0 and "opset 20" in result.stdout


def test_run_writes_what_the_session_gives(folder: Path) -> None:
    result = invoke("run", folder / "dense.plan", "--input", folder / "x.npz", "--output", folder / "y.npz")
    assert result.exit_code == 0 and result.output == ""
    with np.load(folder / "x.npz") as feeds, np.load(folder / "y.npz") as found:
        expected = nmcompile.load(folder / "dense.plan").run(dict(feeds))
        assert set(found) == set(expected)
        assert all((found[name] == expected[name]).all() for name in expected)


def test_run_prints_without_an_output(folder: Path) -> None:
    result = invoke("run", folder / "dense.plan", "--input", folder / "x.npz", "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout.startswith("last_hidden_state: float32[6, 10, 32]  ") and result.stdout.endswith("...\n")


def test_compare_on_data(folder: Path) -> None:
    result = invoke("compare", MODEL, folder / "dense.plan", "--data", folder / "x.npz", "--min-cosine", 0.99)
    assert result.exit_code == 0, result.output
    assert "last_hidden_state" in result.stdout and "on 6 samples" in result.stdout and result.stderr == ""


def test_compare_on_made_up_inputs_says_so_and_is_repeatable(folder: Path) -> None:
    first, second = (invoke("compare", MODEL, folder / "dense.plan") for _ in range(2))
    assert first.exit_code == 0 and "NO DATA" in first.stderr and "made-up samples" in first.stdout
    assert first.stdout == second.stdout


def test_compare_fails_below_the_least(folder: Path) -> None:
    for option in (("--min-cosine", 0.99), ("--min-sqnr", 30)):
        result = invoke("compare", MODEL, folder / "sparse.plan", "--data", folder / "x.npz", *option, "--json")
        assert result.exit_code == 1 and "is below" in result.stderr
        assert json.loads(result.stdout)["below"]


def test_compare_a_plan_with_itself_is_exact(folder: Path) -> None:
    result = invoke("compare", folder / "dense.plan", folder / "dense.plan", "--min-sqnr", 300)
    assert result.exit_code == 0 and "exact" in result.stdout


def test_not_a_number_is_below_anything() -> None:
    nan = float("nan")
    broken = Difference(max_error=nan, mean_error=nan, cosine=nan, sqnr=nan, top1=nan, values=4)
    scalars = Difference(max_error=0.1, mean_error=0.1, cosine=nan, sqnr=40.0, top1=nan, values=4)
    assert list(below({"y": broken}, 0.5, None)) == ["y holds values that are not numbers"]
    assert list(below({"y": broken}, None, 10)) == ["y holds values that are not numbers"]
    assert list(below({"y": scalars}, 0.5, 10)) == []


def test_passes_lists_all_and_explains_each() -> None:
    listed = invoke("passes").stdout
    for item in BUILTIN:
        assert f"\n{item.name} " in listed
        text = invoke("passes", item.name).stdout
        written = [line.strip() for line in text.splitlines() if line.startswith(f"  {item.name}")]
        for line in written:
            assert isinstance(parse_spec(line)[0], item)


def test_doctor_tells_the_kernels_and_why_no_tensorrt() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and "kernels chosen" in result.stdout and "tensorrt" in result.stdout
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["nmcompile"] == nmcompile.__version__ and facts["kernels chosen"] in facts["kernels available"]


def test_doctor_tells_kernels_that_have_not_run_on_a_machine_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("kernels tried" in invoke("doctor").stdout) == (_native.Program().isa in UNTRIED)
    monkeypatch.setattr(_native, "Program", lambda: SimpleNamespace(isa="i8mm"))
    assert json.loads(invoke("doctor", "--json").stdout)["kernels tried"] == "under QEMU, on no Arm machine yet"


def test_doctor_with_an_isa_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMCOMPILE_ISA", "neon")
    result = invoke("doctor")
    assert result.exit_code == 1 and "NMCOMPILE_ISA=neon" in result.stderr


def test_check_records_then_agrees_then_fails(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('preset = "fast"\noutput = "ignored.plan"\n')
    words = ("check", MODEL, "--baseline", tmp_path / "base", "--recipe", tmp_path / "r.toml")
    assert invoke(*words).stdout.startswith("recorded ")
    again = invoke(*words)
    assert again.exit_code == 0 and "agrees with" in again.stdout, again.output
    (tmp_path / "r.toml").write_text('preset = "fast"\nsparsity = 0.5\n')
    result = invoke(*words)
    assert result.exit_code == 1 and "+ block-prune(sparsity=0.5)" in result.stdout
    assert result.stderr.endswith("if that is meant, add --record\n")
    assert invoke(*words, "--record").exit_code == 0 and invoke(*words).exit_code == 0
    assert not (tmp_path / "ignored.plan").exists()
