"""Layers that go back to their dense weights, whatever passes came after pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compiled import MODELS

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.compare import Comparison, real_tokens
from nmcompile.job import Job
from nmcompile.recipes import PRESETS
from nmcompile.spec import parse_spec, spec
from nmcompile.targets import CpuTarget

BERT = MODELS / "bert-torchscript.onnx"
PRUNE = "block-prune(sparsity=0.8, block=1x4)"


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    samples = [{"input_ids": rng.integers(5, 200, rng.integers(6, 24))} for _ in range(24)]
    return open_data(samples, g.inputs(g.load(BERT)))


def job_of(passes: str, data: Data) -> Job:
    job = Job(g.load(BERT), CpuTarget(), PRESETS["fast"], "int8", parse_spec(passes), Calibration(data), False, (),
              lambda *_: None)  # fmt: skip
    job.prepare()
    return job


def lost(one: gs.Graph, other: gs.Graph, data: Data) -> float:
    """1 - cosine of the hidden states."""
    comparison = Comparison(g.outputs(one))
    runs = g.runner(one), g.runner(other)
    for feeds in data:
        comparison.add(runs[0](feeds), runs[1](feeds), real_tokens(feeds))
    return 1 - comparison.differences()["last_hidden_state"].cosine


def mixed(job: Job, names: Sequence[str]) -> gs.Graph:
    """The dense graph in which all layers but those named have what magnitude pruning leaves."""
    pruned = {layer.name: layer.weight for layer in g.linear_layers(job.pruned)}
    graph = g.copy(job.dense)
    for layer in g.linear_layers(graph):
        if layer.name in job.changed and layer.name not in names:
            g.set_weight(graph, layer, pruned[layer.name])
    return graph


def smoothed(graph: gs.Graph) -> int:
    return sum("/smooth" in node.name for node in graph.nodes)


@pytest.mark.parametrize("after", [
    "smooth-activations",
    "smooth-activations, permute-features(pattern=1x4)",
    "permute-features(pattern=4x1), smooth-activations(alpha=0)",
])  # fmt: skip
def test_a_layer_that_goes_back_computes_what_it_did(after: str, data: Data) -> None:
    job = job_of(f"{PRUNE}, {after}", data)
    assert len(job.changed) == 12 and lost(job.pruned, job.finished, data) < 1e-6  # what came after kept the function
    for names in (job.changed[:1], job.changed[3:9], job.changed):
        job.quantize(names)
        assert lost(mixed(job, names), job._with_dense(names), data) < 1e-6
        assert lost(mixed(job, names), job.graph, data) < 0.01  # eight bits
        assert smoothed(job._with_dense(names)) == smoothed(job.finished) > 0
    assert [name for name, _, _ in job.middle] == [spec(pass_) for pass_ in parse_spec(after)]  # once, as given


def test_more_pruning_after_smoothing_leaves_out_what_goes_back(data: Data) -> None:
    job = job_of("block-prune(sparsity=0.8, include=*layer.0*), smooth-activations, "
                 "block-prune(sparsity=0.8, include=*layer.1*)", data)  # fmt: skip
    assert len(job.changed) == 12
    names = [name for name in job.changed if "query" in name or "layer.1" in name]
    graph = job._with_dense(names)
    density = {layer.name: np.count_nonzero(layer.weight) / layer.weight.size for layer in g.linear_layers(graph)}
    assert all((density[name] > 0.9) == (name in names) for name in job.changed)
    assert lost(job.dense, job._with_dense(job.changed), data) < 1e-6
    job.quantize(names)
    said = [note for note in job.notes if names[0] in note]
    assert said == [f"{names[0]}: kept dense, by the search that holds the limit"]


def test_fitted_normalisations_follow_the_layers_that_are_left(data: Data) -> None:
    job = job_of("block-prune(sparsity=0.9, block=2x4, solver=obs, damping=0.05)", data)
    left = job.changed[-1]
    names = [name for name in job.changed if name != left]
    graph = job._with_dense(names)
    stale = g.copy(job.pruned)
    dense = {layer.name: layer for layer in g.linear_layers(job.dense)}
    for layer in g.linear_layers(stale):
        if layer.name in names:
            g.set_weight(stale, layer, dense[layer.name].weight)
            if (bias := dense[layer.name].bias) is not None:
                g.set_bias(stale, layer, bias)
    assert lost(job.dense, graph, data) < 0.75 * lost(job.dense, stale, data)
    assert len(fitted(job.dense, job.pruned)) == 4 and len(fitted(job.dense, graph)) == 1  # the one after that layer
    assert fitted(job.dense, job._with_dense(job.changed)) == []


def digest(values: np.ndarray | None) -> bytes:
    return b"" if values is None else values.tobytes()


def fitted(dense: gs.Graph, graph: gs.Graph) -> list[str]:
    """The normalisations whose gain is another than the dense model's."""
    gains = [{node.name: g.constant(node.inputs[1]) for node in found.nodes if node.op == "LayerNormalization"}
             for found in (dense, graph)]  # fmt: skip
    return [name for name, gain in gains[0].items() if digest(gain) != digest(gains[1][name])]


def test_layers_that_the_search_left_in_float_are_not_said_to_be_named(data: Data) -> None:
    job = job_of("", data)
    name = g.linear_layers(job.dense)[0].name
    job.quantize((), [name])
    assert f"{name}: kept float, by the search that holds the limit" in job.notes
    assert not any("by name" in note for note in job.notes) and len(job.notes) == len(set(job.notes))


def test_a_limit_is_held_by_layers_that_go_back_after_smoothing(tmp_path: Path) -> None:
    """Without what smoothing did to them, layers that go back would lose more than those that are pruned."""
    rng = np.random.default_rng(1)
    samples = [{"input_ids": rng.integers(5, 200, 12)} for _ in range(32)]
    result = nmcompile.compile(BERT, tmp_path / "m.plan", calibration=samples, preset="fast", max_drop="cosine=0.01",
                               passes="block-prune(sparsity=0.9, block=1x4), smooth-activations")  # fmt: skip
    assert result.held["dense"] and not result.held["float"] and result.held["drop"] <= 0.01
    assert min(item.cosine for item in result.loss.values()) > 0.98
