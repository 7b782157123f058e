"""Baselines: what is recorded, what counts as a difference, what does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmcompile import regression
from nmcompile.errors import NmcompileError
from nmcompile.regression import _stage_difference, compare, record

MODEL = Path(__file__).parents[1] / "models" / "distilbert-dynamo.onnx"
OPTIONS: dict[str, Any] = {"preset": "fast", "sparsity": 0.8}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    record(MODEL, folder, **OPTIONS)
    return folder


@pytest.fixture
def baseline(recorded: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    target = regression.place(MODEL, tmp_path)
    target.mkdir()
    for file in regression.place(MODEL, recorded).iterdir():
        (target / file.name).write_text(file.read_text())
    return target


def edit(baseline: Path, change: Callable[[Any], None]) -> None:
    facts = json.loads((baseline / regression.FACTS).read_text())
    change(facts)
    (baseline / regression.FACTS).write_text(json.dumps(facts))


def test_a_baseline_has_texts_and_facts(recorded: Path) -> None:
    folder = recorded / "distilbert-dynamo"
    assert sorted(file.name for file in folder.iterdir()) == [
        "canonical.txt",
        "facts.json",
        "pruned.txt",
        "quantized.txt",
    ]
    assert "Gelu" in (folder / "canonical.txt").read_text()
    assert "QuantizeLinear" not in (folder / "pruned.txt").read_text()
    assert "QuantizeLinear" in (folder / "quantized.txt").read_text()
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["matched"]["fuse-attention"] == "2/2" and facts["segments"] == ["native"]
    assert len(facts["layers"]) == 12 and facts["outputs"]["last_hidden_state"]["shape"] == [2, 8, 32]
    assert len(facts["plan"]["sha256"]) == 64
    assert not {"seconds", "time"} & set((folder / "facts.json").read_text().split('"'))


def test_the_same_model_agrees(recorded: Path) -> None:
    assert compare(MODEL, recorded, **OPTIONS) == []


def test_other_options_differ_by_stage(recorded: Path) -> None:
    found = compare(MODEL, recorded, preset="fast")
    assert found[0] == "passes (- recorded, + now)\n- block-prune"
    assert "stage pruned: recorded, but not there now" in found
    assert any(text.startswith("--- quantized (recorded)") for text in found)
    assert any("density" in text and "kernel blocks 2x4, now dense" in text for text in found)
    assert any(text.startswith("loss of last_hidden_state: sqnr") for text in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["layers"].popitem(), "there now, but not recorded"),
        (lambda f: f["layers"].update(gone=dict(density=1.0)), "layer gone: recorded, but not there now"),
        (lambda f: f["segments"].append("onnxruntime Erf"), "segments: recorded native; onnxruntime Erf, now native"),
        (lambda f: f["matched"].update({"fuse-gelu": "1/2"}), "matched: fuse-gelu 1/2, now 2/2"),
        (lambda f: f["outputs"]["last_hidden_state"].update(shape=[2, 8, 16]), "shape [2, 8, 16], now [2, 8, 32]"),
        (lambda f: f["outputs"]["last_hidden_state"].update(rms=9.0), "values on seeded inputs"),
        (lambda f: f["loss"]["last_hidden_state"].update(sqnr=55.0), "sqnr 55.0, now"),
        (lambda f: f["plan"].update(sha256="0" * 64), "with the same versions and CPU"),
    ],
)
def test_a_changed_fact_is_told(change: Callable[[Any], None], said: str, baseline: Path) -> None:
    edit(baseline, change)
    found = compare(MODEL, baseline.parent, **OPTIONS)
    assert len(found) == 1 and said in found[0]


def test_another_machine_does_not_differ(baseline: Path) -> None:
    def elsewhere(facts: Any) -> None:
        facts["plan"] = {"sha256": "0" * 64, "machine": "another"}
        for layer in facts["layers"].values():
            layer["density"] += 0.001
        for item in facts["outputs"].values():
            item["values"] = [value + 0.01 * item["rms"] for value in item["values"]]

    edit(baseline, elsewhere)
    text = (baseline / "quantized.txt").read_text()
    (baseline / "quantized.txt").write_text(re.sub(r"#[0-9a-f]{8}", "#00000000", text))
    assert compare(MODEL, baseline.parent, **OPTIONS) == []


def test_tolerances_are_those_of_the_baseline(baseline: Path) -> None:
    def stricter(facts: Any) -> None:
        facts["tolerance"]["outputs"] = 1e-9
        facts["outputs"]["last_hidden_state"]["values"][0] += 1e-4

    edit(baseline, stricter)
    assert len(compare(MODEL, baseline.parent, **OPTIONS)) == 1


OLD = "opset 23\ny: f32[2] = Mul(x, s f32[] {0.5}, z u8[] {126}, w i8[4,4] 20% #0123abcd, a i64[2] {1, 2})  # mul\n"


@pytest.mark.parametrize(
    ("stage", "change", "same"),
    [
        ("quantized", ("{0.5}", "{0.501}"), True),
        ("quantized", ("{0.5}", "{0.6}"), False),
        ("quantized", ("{126}", "{127}"), True),
        ("quantized", ("{126}", "{120}"), False),
        ("quantized", ("20%", "21%"), True),
        ("quantized", ("20%", "40%"), False),
        ("quantized", ("#0123abcd", "#ffffffff"), True),
        ("canonical", ("#0123abcd", "#ffffffff"), False),
        ("quantized", ("{1, 2}", "{1, 3}"), False),
        ("quantized", ("{1, 2}", "{1}"), False),
        ("quantized", ("Mul", "Add"), False),
        ("canonical", ("opset 23\n", "opset 23\ninput x: f32[2]\n"), False),
    ],
)
def test_lines_agree_within_tolerance(stage: str, change: tuple[str, str], same: bool) -> None:
    found = _stage_difference(stage, OLD, OLD.replace(*change), 0.02)
    assert (found == "") == same
    assert same or f"{stage} (recorded)" in found


def test_long_diffs_are_shortened() -> None:
    old = "".join(f"a{i}\n" for i in range(100))
    found = _stage_difference("canonical", old, old.replace("a", "b"), 0.02).splitlines()
    assert len(found) == regression.LINES + 1 and found[-1].startswith("... and ")


def test_no_baseline_and_a_damaged_one(baseline: Path, tmp_path: Path) -> None:
    with pytest.raises(NmcompileError, match="there is no baseline"):
        compare(MODEL, tmp_path / "nowhere", **OPTIONS)
    (baseline / regression.FACTS).write_text("{}")
    with pytest.raises(NmcompileError, match="record it anew"):
        compare(MODEL, baseline.parent, **OPTIONS)
    (tmp_path / "file").write_text("")
    with pytest.raises(NmcompileError, match="cannot write the baseline"):
        record(MODEL, tmp_path / "file", preset="fast")
