"""Layers that go back to their dense weights, whatever passes came after pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compiled import MODELS, held_of

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.compare import Comparison, real_tokens
from nmcompile.recipes import PRESETS
from nmcompile.spec import parse_spec, spec
from nmcompile.stages import Keep, Pruned, PrunePasses, Quantized, Runner, canonicalise, prune, quantize, with_dense
from nmcompile.targets import CpuTarget

BERT = MODELS / "bert-torchscript.onnx"
PRUNE = "block-prune(sparsity=0.8, block=1x4)"


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    samples = [{"input_ids": rng.integers(5, 200, rng.integers(6, 24))} for _ in range(24)]
    return open_data(samples, g.inputs(g.load(BERT)))


def pruned_by(passes: str, data: Data) -> Pruned:
    runner = Runner(Calibration(data))
    return prune(canonicalise(g.load(BERT), runner), PrunePasses.of(parse_spec(passes)), runner)


def quantized(pruned: Pruned, names: Sequence[str], data: Data) -> Quantized:
    keep = Keep(dense=tuple(names))
    return quantize(pruned, CpuTarget().scheme(PRESETS["fast"]), Runner(Calibration(data)), keep)


def back(pruned: Pruned, names: Sequence[str], data: Data) -> gs.Graph:
    return with_dense(pruned, names, Runner(Calibration(data)))[0]


def lost(one: gs.Graph, other: gs.Graph, data: Data) -> float:
    """1 - cosine of the hidden states."""
    comparison = Comparison(g.outputs(one))
    runs = g.runner(one), g.runner(other)
    for feeds in data:
        comparison.add(runs[0](feeds), runs[1](feeds), real_tokens(feeds))
    return 1 - comparison.differences()["last_hidden_state"].cosine


def mixed(pruned: Pruned, names: Sequence[str]) -> gs.Graph:
    """The dense graph in which all layers but those named have what magnitude pruning leaves."""
    weights = {layer.name: layer.weight for layer in g.linear_layers(pruned.sparse)}
    graph = g.copy(pruned.dense)
    for layer in g.linear_layers(graph):
        if layer.name in pruned.changed and layer.name not in names:
            g.set_weight(graph, layer, weights[layer.name])
    return graph


def smoothed(graph: gs.Graph) -> int:
    return sum("/smooth" in node.name for node in graph.nodes)


@pytest.mark.parametrize("after", [
    "smooth-activations",
    "smooth-activations, permute-features(pattern=1x4)",
    "permute-features(pattern=4x1), smooth-activations(alpha=0)",
])  # fmt: skip
def test_a_layer_that_goes_back_computes_what_it_did(after: str, data: Data) -> None:
    pruned = pruned_by(f"{PRUNE}, {after}", data)
    assert len(pruned.changed) == 12 and lost(pruned.sparse, pruned.graph, data) < 1e-6
    for names in (pruned.changed[:1], pruned.changed[3:9], pruned.changed):
        made = quantized(pruned, names, data)
        assert lost(mixed(pruned, names), back(pruned, names, data), data) < 1e-6
        assert lost(mixed(pruned, names), made.graph, data) < 0.01  # eight bits
        assert smoothed(back(pruned, names, data)) == smoothed(pruned.graph) > 0
        ran = [name for name, _, _ in made.ran[len(pruned.ran) :]]
        assert ran[: len(pruned.after)] == [spec(pass_) for pass_ in parse_spec(after)]  # once, as given


def test_more_pruning_after_smoothing_leaves_out_what_goes_back(data: Data) -> None:
    pruned = pruned_by("block-prune(sparsity=0.8, include=*layer.0*), smooth-activations, "
                 "block-prune(sparsity=0.8, include=*layer.1*)", data)  # fmt: skip
    assert len(pruned.changed) == 12
    names = [name for name in pruned.changed if "query" in name or "layer.1" in name]
    graph = back(pruned, names, data)
    density = {layer.name: np.count_nonzero(layer.weight) / layer.weight.size for layer in g.linear_layers(graph)}
    assert all((density[name] > 0.9) == (name in names) for name in pruned.changed)
    assert lost(pruned.dense, back(pruned, pruned.changed, data), data) < 1e-6
    notes = [note for _, report, _ in quantized(pruned, names, data).ran for note in report.notes]
    said = list(dict.fromkeys(note for note in notes if names[0] in note))
    assert said == [f"{names[0]}: kept dense, by the search that holds the limit"]


def test_fitted_normalisations_follow_the_layers_that_are_left(data: Data) -> None:
    pruned = pruned_by("block-prune(sparsity=0.9, block=2x4, solver=obs, damping=0.05)", data)
    left = pruned.changed[-1]
    names = [name for name in pruned.changed if name != left]
    graph = back(pruned, names, data)
    stale = g.copy(pruned.sparse)
    dense = {layer.name: layer for layer in g.linear_layers(pruned.dense)}
    for layer in g.linear_layers(stale):
        if layer.name in names:
            g.set_weight(stale, layer, dense[layer.name].weight)
            if (bias := dense[layer.name].bias) is not None:
                g.set_bias(stale, layer, bias)
    assert lost(pruned.dense, graph, data) < 0.75 * lost(pruned.dense, stale, data)
    assert len(fitted(pruned.dense, pruned.sparse)) == 4
    assert len(fitted(pruned.dense, graph)) == 1  # the one after that layer
    assert fitted(pruned.dense, back(pruned, pruned.changed, data)) == []


def digest(values: np.ndarray | None) -> bytes:
    return b"" if values is None else values.tobytes()


def fitted(dense: gs.Graph, graph: gs.Graph) -> list[str]:
    """The normalisations whose gain is another than the dense model's."""
    gains = [{node.name: g.constant(node.inputs[1]) for node in found.nodes if node.op == "LayerNormalization"}
             for found in (dense, graph)]  # fmt: skip
    return [name for name, gain in gains[0].items() if digest(gain) != digest(gains[1][name])]


def test_layers_that_the_search_left_in_float_are_not_said_to_be_named(data: Data) -> None:
    pruned = pruned_by("", data)
    name = g.linear_layers(pruned.dense)[0].name
    runner, target = Runner(Calibration(data)), CpuTarget()
    made = quantize(pruned, target.scheme(PRESETS["fast"]), runner, Keep(floating=(name,)))
    told = target.lower(made, runner).told
    assert f"{name}: kept float, by the search that holds the limit" in told
    assert not any("by name" in note for note in told) and len(told) == len(set(told))


def test_a_limit_is_held_by_layers_that_go_back_after_smoothing(tmp_path: Path) -> None:
    """Without what smoothing did to them, layers that go back would lose more than those that are pruned."""
    rng = np.random.default_rng(1)
    samples = [{"input_ids": rng.integers(5, 200, 12)} for _ in range(32)]
    result = nmcompile.compile(BERT, tmp_path / "m.plan", calibration=samples, preset="fast", max_drop="cosine=0.01",
                               passes="block-prune(sparsity=0.9, block=1x4), smooth-activations")  # fmt: skip
    assert held_of(result).dense and not held_of(result).floating and held_of(result).drop <= 0.01
    assert min(item.cosine for item in result.loss.values()) > 0.98
