"""What is emitted for TensorRT: every committed model, every version, by the rules and by onnxruntime."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from compiled import MODELS, NAMES, NATIVE, feeds

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.backends.tensorrt import rules
from nmcompile.backends.tensorrt.profiles import PROFILES
from nmcompile.calibrate import Calibration, open_data
from nmcompile.compare import Comparison, real_tokens
from nmcompile.passes import NMPrune
from nmcompile.passes.quantize_outputs import is_sparse
from nmcompile.prune import Goal
from nmcompile.prune.selection import unfit
from nmcompile.recipes import PRESETS
from nmcompile.stages import PrunePasses, Runner, canonicalise, prune, quantize
from nmcompile.targets import Product, TensorrtTarget

# Half precision moves values over the edges between two steps of eight bits; small models have few values to average.
LEAST_SQNR = {"8.6": 48.0, "10": 20.0, "11": 20.0}  # dB, against the Q/DQ graph in float32
LEAST_COSINE = {"8.6": 0.9999, "10": 0.995, "11": 0.995}
MEASURED = re.compile(r"#\w+|\{[^}]*\}")  # by onnxruntime: rounded as the CPU likes


@functools.cache
def product(name: str, version: str, attention: str = "float", weights: str = "float") -> Product:
    source = g.load(MODELS / f"{name}.onnx")
    data = open_data(feeds(MODELS / f"{name}.onnx"), g.inputs(source))
    target = TensorrtTarget(PROFILES[version], "sparse", weights)
    runner = Runner(Calibration(data))
    pruned = prune(canonicalise(source, runner), PrunePasses.of([NMPrune(multiple=32)]), runner)
    quantized = quantize(pruned, target.scheme(PRESETS["fast"], attention), runner)
    return target.lower(quantized, runner)


def emitted(name: str, version: str, **options: str) -> gs.Graph:
    return product(name, version, **options).graph


def check(graph: gs.Graph, version: str) -> None:
    """Valid ONNX of the right opset, of which no rule says that TensorRT breaks on it."""
    model = g.to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == PROFILES[version].opset
    assert rules.errors(rules.check(graph, PROFILES[version])) == []


@pytest.mark.parametrize("version", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_every_model_for_every_version(name: str, version: str) -> None:
    made = product(name, version)
    graph = made.graph
    check(graph, version)
    before, after = g.runner(made.quantized.graph), g.runner(graph)
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(MODELS / f"{name}.onnx"):
        comparison.add(before(batch), after(batch), real_tokens(batch))
    for output, difference in comparison.differences().items():
        assert difference.sqnr > LEAST_SQNR[version], (output, difference)
        assert not difference.cosine < LEAST_COSINE[version], (output, difference)


@pytest.mark.parametrize("version", ["8.6", "10"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_graphs(name: str, version: str, golden: Callable[[str], str]) -> None:
    assert MEASURED.sub("#", g.to_text(emitted(name, version))) == golden(f"tensorrt/{name}-{version}")


@pytest.mark.parametrize("name", ["bert-torchscript", "t5-dynamo"])
def test_11_reads_what_10_reads(name: str) -> None:
    assert g.to_text(emitted(name, "11")) == g.to_text(emitted(name, "10"))


@pytest.mark.parametrize("version", PROFILES)
@pytest.mark.parametrize("name", ["bert-torchscript", "gpt2-dynamo", "vit-dynamo"])
def test_int8_attention_and_stored_integers(name: str, version: str) -> None:
    graph = emitted(name, version, attention="int8")
    check(graph, version)
    shares = [node for node in graph.nodes if node.op == "Softmax" and g.consumers(node.outputs[0])[0].op[:4] == "Quan"]
    assert len(shares) == 2
    if PROFILES[version].int8_weights:
        stored = emitted(name, version, weights="int8")
        check(stored, version)
        floats = emitted(name, version)
        weights = [layer.node.inputs[1].name for layer in g.linear_layers(stored) if layer.quantized]
        expected, found = g.run(floats, {}, weights), g.run(stored, {}, weights)
        assert len(weights) == 12 and all(np.array_equal(expected[item], found[item]) for item in weights)


@pytest.mark.parametrize("version", PROFILES)
@pytest.mark.parametrize("name", NATIVE)
def test_every_pruned_weight_is_2_4_where_it_is_read(name: str, version: str) -> None:
    """Followed from the product back to the constant, through pairs and casts, on values and on integers."""
    made = product(name, version)
    graph = made.graph
    pruned, checked = set(made.quantized.pruned.changed), set()
    for node in graph.nodes:
        if node.op != "MatMul" or node.name not in pruned:
            continue
        tensor = node.inputs[1]
        while (maker := g.producer(tensor)) is not None:
            assert maker.op in ("DequantizeLinear", "QuantizeLinear", "Cast"), maker.op
            if maker.op == "QuantizeLinear":
                small = g.run(graph, {}, [maker.outputs[0].name])[maker.outputs[0].name]
                assert small.dtype == np.int8 and is_sparse(small.T)
            tensor = maker.inputs[0]
        assert is_sparse(np.asarray(g.constant(tensor)).T.astype(np.float32)), node.name
        checked.add(node.name)
    assert checked == pruned and pruned
    verdicts = {verdict.name: verdict for verdict in rules.explain(graph, PROFILES[version])}
    assert all(verdicts[layer].pattern and verdicts[layer].epilogue == "int8" for layer in pruned)


def test_query_key_and_value_are_pruned_all_or_none() -> None:
    graph = product("bert-torchscript", "10").quantized.pruned.canonical.graph
    layers = g.linear_layers(graph)
    query = next(layer for layer in layers if "layer.0" in layer.name and "query" in layer.name)
    odd = [layer for layer in layers if layer.x is query.x]
    goals = dict.fromkeys((layer.name for layer in layers), Goal(sp.NM(2, 4), 0.5))
    kept = unfit(layers, goals, 32)
    assert not any(layer.name in kept for layer in odd)
    kept = unfit(layers, goals, 128)
    assert all("are not multiples of 128" in kept[layer.name] for layer in odd)
    wide = next(layer for layer in layers if layer.weight.shape[0] == 128)
    assert "64" in kept[wide.name]
