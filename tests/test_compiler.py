"""compile(): options, reports, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiled import MODELS, compiled

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import longest, open_data, split
from nmcompile.passes import BlockPrune
from nmcompile.plan import read_plan

BERT = MODELS / "bert-torchscript.onnx"


def samples(count: int = 16) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"input_ids": rng.integers(5, 200, rng.integers(4, 20))}


def test_a_report_says_what_was_done_and_lost(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = nmcompile.compile(BERT, tmp_path / "bert.plan", calibration=samples(), sparsity=0.5, report=report)
    written = json.loads(report.read_text())
    assert written == result.to_json()
    assert written["loss_on"] == "held-out samples"
    assert 0 < written["loss"]["last_hidden_state"]["cosine"] <= 1
    assert [layer["pattern"] for layer in written["layers"][:12]] == ["2x4"] * 12
    densities = np.array([layer["density"] for layer in written["layers"][:12]])
    sizes = np.array([layer["outputs"] * layer["inputs"] for layer in written["layers"][:12]])
    assert 0.45 < densities @ sizes / sizes.sum() <= 0.5 and densities.min() < densities.max()  # where it harms least
    assert set(written["sqnr_db"]) >= {layer["name"] for layer in written["layers"][:12]}
    assert any("pooler" in note and "kept dense" in note for note in written["notes"])
    passes = [item["pass"] for item in written["passes"]]
    assert passes[-4:-2] == ["permute-features", "block-prune(solver=admm, ranking=sensitivity, sparsity=0.5)"]
    header = read_plan(tmp_path / "bert.plan").header
    assert header["passes"] == passes and header["target"] == "cpu"


def test_synthetic_calibration_is_said_first() -> None:
    result = nmcompile.compile(BERT, None, preset="fast")
    assert result.synthetic and result.notes[0].startswith("no calibration data")


def test_passes_by_value_and_by_spec_are_the_same(tmp_path: Path) -> None:
    for name, passes in (("a", "block-prune(sparsity=0.75, block=4x4)"), ("b", [BlockPrune(0.75, "4x4")])):
        nmcompile.compile(BERT, tmp_path / name, preset="fast", passes=passes, measure=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wanda_uses_the_calibration_data(tmp_path: Path) -> None:
    seen = list(samples())
    for name, rule in (("a", "magnitude"), ("b", "wanda")):
        nmcompile.compile(BERT, tmp_path / name, calibration=seen, solver=rule, sparsity=0.5, measure=False)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_models_of_any_kind_are_taken_and_left_alone(tmp_path: Path) -> None:
    proto = onnx.load(BERT)
    before = proto.SerializeToString(deterministic=True)
    nmcompile.compile(proto, tmp_path / "proto", preset="fast", measure=False)
    assert proto.SerializeToString(deterministic=True) == before
    graph = g.load(BERT)
    text = g.to_text(graph)
    nmcompile.compile(graph, tmp_path / "graph", preset="fast", measure=False)
    assert g.to_text(graph) == text
    expected = compiled(BERT.stem).plan.read_bytes()
    assert (tmp_path / "proto").read_bytes() == expected == (tmp_path / "graph").read_bytes()


def test_existing_sparsity_is_kept(tmp_path: Path) -> None:
    sparse = compiled(BERT.stem, pattern="4x4", sparsity=0.6)
    kept = [layer for layer in sparse.result.layers if layer["pattern"] == "4x4"]
    assert len(kept) == 12 and all(layer["kernel"].startswith("blocks") for layer in kept)
    again = nmcompile.compile(sparse.qdq, None, preset="fast")
    assert [layer["density"] for layer in again.layers] == [layer["density"] for layer in sparse.result.layers]


def test_an_already_quantized_model_keeps_its_scales(tmp_path: Path) -> None:
    made = compiled(BERT.stem)
    nmcompile.compile(made.qdq, tmp_path / "again.plan", preset="fast", measure=False)
    first, again = read_plan(made.plan), read_plan(tmp_path / "again.plan")
    for one, other in zip(first.header["segments"], again.header["segments"], strict=True):
        scales = [[step.get("x_scale"), step.get("y_scale")] for step in one["steps"]]
        assert scales == [[step.get("x_scale"), step.get("y_scale")] for step in other["steps"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "tpu"}, "target 'tpu' is not known; choose one of cpu, tensorrt"),
        ({"target": "tensorrt"}, "has free sizes, for which an engine is made"),
        ({"target": "tensorrt", "require": "native"}, "native is a requirement on plans for the CPU"),
        ({"preset": "best"}, "preset 'best' is not known; choose one of default, fast"),
        ({"require": "gpu"}, "the only requirement is native"),
        ({"pattern": "2x"}, "2x"),
        ({"sparsity": 1.5}, "sparsity 1.5 is not a share of zeros between 0 and 1"),
        ({"pattern": "2:4", "sparsity": 0.8}, "pattern 2:4 always has 0.5 zeros; leave --sparsity out"),
        ({"passes": "blok-prune"}, "block-prune"),
        ({"passes": "block-prune", "sparsity": 0.5}, "give either passes or sparsity, pattern and size"),
        ({"sparsity": 0.5, "solver": "taste"}, "solver=taste is not known; choose one of magnitude, wanda, obs, admm"),
        ({"calibration": [{"input_ids": [1.5, 2.5]}]}, "input_ids"),
        ({"calibration": "missing.npz"}, "missing.npz"),
        ({"report": "no/such/folder/report.json"}, "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_no_file(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(nmcompile.NmcompileError, match=said) as raised:
        nmcompile.compile(BERT, tmp_path / "x.plan", **{"preset": "fast", **options})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_output_must_be_writable(tmp_path: Path) -> None:
    with pytest.raises(nmcompile.NmcompileError, match="is a folder"):
        nmcompile.compile(BERT, tmp_path)


def test_a_held_out_eighth_measures_the_loss() -> None:
    data = open_data(samples(16), g.inputs(g.load(BERT)))
    seen, held_out = split(data)
    assert (len(seen.rows), len(held_out.rows)) == (14, 2)
    few = open_data(samples(3), g.inputs(g.load(BERT)))
    assert split(few) == (few, few)


def test_the_longest_input_a_model_takes() -> None:
    assert longest(g.load(BERT), 128) == 64  # its position table
    assert longest(g.load(MODELS / "vit-dynamo.onnx"), 128) == 128  # has no free length
