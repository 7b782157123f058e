"""Emitted ONNX in a session of the user's own, with and without weights of 7 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from compiled import MODELS, compiled, feeds
from pruning_cases import calibrated

import nmcompile
from nmcompile import ir as g
from nmcompile.compare import Comparison, real_tokens
from nmcompile.errors import NmcompileError
from nmcompile.passes import InsertQdq
from nmcompile.pipeline import Pipeline
from nmcompile.quantize import quantize_weight
from nmcompile.recipes import canonical_passes
from nmcompile.saturation import saturates

NAMES = ("bert-torchscript", "gpt2-torchscript")
LEAST_SQNR = 25.0  # dB, as in test_end_to_end
NOTE = "saturates in onnxruntime on CPUs without VNNI"


def signal(name: str, optimized: bool = False, **options: object) -> float:
    """dB of the emitted graph, run with all optimizations, against its Q/DQ pairs as they stand; least of its outputs.

    In a session as a user opens it, or as nmcompile does (`optimized`).
    """
    made = compiled(name, **options)
    graph = g.load(made.qdq)
    session = ort.InferenceSession(str(made.qdq), providers=["CPUExecutionProvider"])
    plain, ours = g.runner(graph), g.runner(graph, optimise=True)
    outputs = [info.name for info in g.outputs(graph)]
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(made.source, ((2, 9), (3, 16))):
        found = ours(batch) if optimized else dict(zip(outputs, session.run(outputs, batch), strict=True))
        comparison.add(plain(batch), found, real_tokens(batch))
    return min(difference.sqnr for difference in comparison.differences().values())


@pytest.mark.emulated
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_7_bits_are_right_on_every_cpu(name: str) -> None:
    assert signal(name, reduce_range=True) > LEAST_SQNR
    made = compiled(name, reduce_range=True)
    assert not any(NOTE in note for note in made.result.notes)
    weights = [node.inputs[0].values for node in g.load(made.qdq).nodes
               if node.op == "DequantizeLinear" and g.constant(node.inputs[0]) is not None]  # fmt: skip
    assert weights and all(np.abs(w.astype(int)).max() == 64 for w in weights)


@pytest.mark.emulated
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_8_bits_are_right_where_the_cpu_or_the_session_does_not_saturate(name: str) -> None:
    assert NOTE in compiled(name).result.notes[1]  # after the one on calibration data
    exact = signal(name, optimized=True)
    assert exact > LEAST_SQNR
    if saturates():
        assert signal(name) < exact - 3  # the note tells the truth
    else:
        assert signal(name) > LEAST_SQNR


def test_the_plan_is_made_of_the_same_weights() -> None:
    made = compiled("bert-torchscript", reduce_range=True)
    reference, session = g.runner(g.load(made.qdq)), nmcompile.load(made.plan)
    comparison = Comparison()
    for batch in feeds(made.source):
        comparison.add(reference(batch), session.run(batch), real_tokens(batch))
    assert comparison.differences()["last_hidden_state"].sqnr > LEAST_SQNR
    assert "weight_bits=7" in " ".join(made.result.to_json()["passes"][-1]["pass"].split())


def test_a_graph_without_large_weights_is_written_without_a_note(tmp_path: Path) -> None:
    result = nmcompile.compile(MODELS / "cnn.onnx", None, preset="fast", emit_onnx=tmp_path / "qdq.onnx")
    assert not any(NOTE in note for note in result.notes)
    result = nmcompile.compile(MODELS / "bert-torchscript.onnx", None, preset="fast", measure=False)
    assert not any(NOTE in note for note in result.notes)


def test_what_takes_no_reduced_range(tmp_path: Path) -> None:
    with pytest.raises(NmcompileError, match="reduce_range is for CPUs"):
        nmcompile.compile(MODELS / "bert-torchscript.onnx", tmp_path / "m.plan", target="tensorrt", reduce_range=True)
    assert not list(tmp_path.iterdir())
    canonical, _ = Pipeline(canonical_passes()).run(g.load(MODELS / "bert-torchscript.onnx"))
    with pytest.raises(NmcompileError, match="weight_bits=4 is not known"):
        calibrated(InsertQdq(weight_bits=4), canonical)


@pytest.mark.parametrize(("levels", "bits"), [(127, 8), (64, 7)])
def test_levels(levels: int, bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    small, scales = quantize_weight(weight, levels=levels)
    assert (np.abs(small.astype(int)).max(axis=1) == levels).all()
    assert np.abs(small * scales[:, None] - weight).max() <= scales.max() * 0.5001
    assert levels < 2 ** (bits - 1) + (bits == 7)
