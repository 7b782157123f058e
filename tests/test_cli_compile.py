"""nmcompile MODEL -o PLAN: options, recipes, the summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import nmcompile
from nmcompile.cli import cli, recipe
from nmcompile.cli.compile import command
from nmcompile.compiler import model_bytes
from nmcompile.errors import NmcompileError

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "distilbert-dynamo.onnx"
FAST = ("--preset", "fast", "--no-measure")


def compile_(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def passes_of(plan: Path) -> list[str]:
    passes: list[str] = nmcompile.load(plan).header["passes"]
    return passes


def samples(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (16, 12))
    np.savez(folder / "samples.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    return folder / "samples.npz"


def test_the_summary_says_what_was_matched_pruned_and_lost(tmp_path: Path) -> None:
    result = compile_(MODEL, "-o", tmp_path / "m.plan", "--sparsity", "0.8", "--calibration", samples(tmp_path),
                      "--report", tmp_path / "r.json", "--preset", "fast")  # fmt: skip
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "normalizations 5/5, GELU 2/2, attention 2/2, embeddings 2/2" in text
    assert "12 x int8, kernel blocks 2x4, pattern 2x4, density" in text
    assert "1 native: the whole model runs on the engine" in text
    assert "samples that calibration did not see" in text and "last_hidden_state" in text and " dB " in text
    assert "% of the model's 127 kB" in text
    assert "warning" not in result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["sizes"]["plan"] == (tmp_path / "m.plan").stat().st_size


def test_without_calibration_there_is_a_loud_warning(tmp_path: Path) -> None:
    result = compile_(MODEL, "-o", tmp_path / "m.plan", "--preset", "fast")
    assert "NO CALIBRATION DATA" in result.stderr
    assert "MADE-UP SAMPLES" in result.stdout


def test_what_fell_out_is_told(tmp_path: Path) -> None:
    result = compile_(MODELS / "cnn.onnx", "-o", tmp_path / "m.plan", *FAST)
    assert "1 onnxruntime" in result.stdout and "Conv" in result.stdout
    assert "none on the engine" in result.stdout
    refused = compile_(MODELS / "cnn.onnx", "-o", tmp_path / "n.plan", *FAST, "--require", "native")
    assert refused.exit_code == 1 and not (tmp_path / "n.plan").exists()


def test_notes_are_shortened_with_a_count(tmp_path: Path) -> None:
    result = compile_(MODELS / "t5-dynamo.onnx", "-o", tmp_path / "m.plan", *FAST)
    assert result.exit_code == 0, result.output
    assert "more; --report writes all of them" in result.stdout
    assert len(result.stdout.partition("  notes ")[2].splitlines()) == 11


def test_tensorrt_writes_its_graph_alone(tmp_path: Path) -> None:
    result = compile_(MODEL, "--emit-onnx", tmp_path / "q.onnx", "--target", "tensorrt", *FAST, "--calibration",
                      samples(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no plan" in result.stdout and (tmp_path / "q.onnx").exists()


def test_texts_after_each_pass(tmp_path: Path) -> None:
    result = compile_(MODEL, "--dump-text", tmp_path / "texts", *FAST)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "texts" / "01-raise-opset.txt").exists()


def test_a_recipe_holds_the_options_and_the_command_line_wins(tmp_path: Path) -> None:
    data = samples(tmp_path)
    (tmp_path / "r.toml").write_text(
        f'sparsity = 0.5\npattern = "4x4"\nsolver = "magnitude"\ncalibration = "{data.name}"\n'
        'max_length = 16\nno-measure = true\npreset = "fast"\n'
    )
    assert compile_(MODEL, "-o", tmp_path / "a.plan", "--recipe", tmp_path / "r.toml").exit_code == 0
    assert "block-prune(sparsity=0.5, block=4x4)" in passes_of(tmp_path / "a.plan")
    words = (MODEL, "-o", tmp_path / "b.plan", "--recipe", tmp_path / "r.toml", "--sparsity", "0.75", "--measure")
    result = compile_(*words)
    assert "block-prune(sparsity=0.75, block=4x4)" in passes_of(tmp_path / "b.plan")
    assert "warning" not in result.stderr and "SQNR" in result.stdout


def test_what_a_limit_took_is_said(tmp_path: Path) -> None:
    data = samples(tmp_path)
    words = (MODEL, "-o", tmp_path / "m.plan", "--calibration", data, "--max-length", 16, "--sparsity", 0.8, "--fast")
    result = compile_(*words, "--max-drop", "cosine=1")
    assert result.exit_code == 0 and "1 is allowed: no layer had to go back" in result.stdout
    result = compile_(*words, "--max-drop", "cosine=0.02")
    assert result.exit_code == 0 and "layers dense again, those that add most noise" in result.stdout
    result = compile_(*words, "--max-drop", "cosine")
    assert result.exit_code == 1 and "is not METRIC=VALUE" in result.stderr and result.stderr.count("\n") == 1


def test_a_recipe_gives_what_the_options_give(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'passes = ["block-prune(sparsity=0.9)", "n-m-prune"]\nverify = true\noutput = "p"\n'
    )
    values = recipe.read(tmp_path / "r.toml", command)
    assert values == {"passes": "block-prune(sparsity=0.9), n-m-prune", "verify": True, "output": tmp_path / "p"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsty = 0.5", "no option 'sparsty'; did you mean sparsity?"),
        ("zzz = 1", "no option 'zzz'; it takes output"),
        ("recipe = 'x'", "no option 'recipe'"),
        ("sparsity = 'much'", "sparsity is a float"),
        ("sparsity = true", "sparsity is a float"),
        ("max-length = 1.5", "max-length is a integer"),
        ("pattern = 24", "pattern is a text in quotes"),
        ("verify = 1", "verify is true or false"),
        ("preset = 'slow'", "'slow' is not one of"),
        ("measure = true\nno_measure = true", "twice"),
        ("sparsity 0.5", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    result = compile_(MODEL, "-o", tmp_path / "m.plan", "--recipe", tmp_path / "r.toml")
    assert result.exit_code == 1 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "m.plan").exists()


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NmcompileError, match="is not TOML"):
        recipe.read(tmp_path / "r.toml", command)


def test_external_data_count_for_the_size(tmp_path: Path) -> None:
    from nmcompile import ir as g

    g.save(g.load(MODEL), tmp_path / "m.onnx", external=True)
    assert model_bytes(tmp_path / "m.onnx") > 0.8 * MODEL.stat().st_size > (tmp_path / "m.onnx").stat().st_size
