"""QuantizeOutputs: which layers hand on eight bits, and which keep their floats with the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, parse
from pruning_cases import TO_OUTPUT, calibrated, same

from nmcompile import ir as g
from nmcompile.errors import PassError
from nmcompile.passes import InsertQdq, NMPrune, QuantizeOutputs
from nmcompile.passes.quantize_outputs import is_sparse
from nmcompile.pipeline import Report

# up feeds an activation whose output is quantized, down a residual, side is not pruned
MODEL = """(float[B,S,8] x) => (float[B,S,8] y) <float[8,16] up, float[16] bias, float[16,8] down, float[8,8] side> {
    h = MatMul(x, up)  a = Add(h, bias)  r = Gelu(a)  d = MatMul(r, down)  e = MatMul(x, side)  n = Neg(e)
    s = Add(d, n)  y = Relu(s) }"""


def model(text: str = MODEL) -> gs.Graph:
    graph, _ = calibrated(NMPrune(include=("MatMul_0", "MatMul_3")), parse(text))
    return calibrated(InsertQdq(activations="int8"), graph)[0]


def outputs(graph: gs.Graph) -> set[str]:
    """Tensors behind linear layers that are quantized at once."""
    return {layer.y.name for layer in g.linear_layers(graph)
            if any(node.op == "QuantizeLinear" for node in g.consumers(layer.y))}  # fmt: skip


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = model()
    after, report = calibrated(QuantizeOutputs(), graph)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert outputs(after) == {"d"} and list(report.detail["outputs"]) == ["MatMul_3"]  # type: ignore[call-overload]
    assert "\n".join(f"{node.op}({', '.join(t.name for t in node.inputs)})" for node in after.nodes) == golden(
        "quantize_outputs/after")  # fmt: skip
    quantize = next(node for node in after.nodes if node.op == "QuantizeLinear" and node.inputs[0].name == "d")
    assert quantize.inputs[2].values.dtype == np.int8 and quantize.inputs[2].values == 0
    again, second = calibrated(QuantizeOutputs(), after)
    assert second == Report() and same(again, after)


@pytest.mark.parametrize("layers, found", [("sparse", {"d"}), ("all", {"d", "e"}), ("none", set())])
def test_which_layers(layers: str, found: set[str]) -> None:
    assert outputs(calibrated(QuantizeOutputs(layers=layers), model())[0]) == found


def test_a_layer_may_be_left_out() -> None:
    assert outputs(calibrated(QuantizeOutputs(exclude=("MatMul_3",)), model())[0]) == set()


def test_an_output_that_eight_bits_would_spoil_stays_float() -> None:
    graph = model()
    after, report = calibrated(QuantizeOutputs(least_sqnr=200), graph)
    assert report.changed == 0 and same(after, graph)
    assert report.notes[0].startswith("MatMul_3: its output stays float, eight bits would leave ")


def test_a_graph_output_and_float_layers_stay() -> None:
    graph, _ = calibrated(InsertQdq(activations="int8", heads=True), parse(TO_OUTPUT))
    assert calibrated(QuantizeOutputs(layers="all"), graph)[1] == Report()


@pytest.mark.parametrize("row, sparse", [
    ([0, 1, 0, 2], True), ([1, 2, 0, 0], True), ([0, 0, 0, 0], True), ([1, 2, 3, 0], False),
    ([0, 0, 1, 1, 1, 1, 0, 0], True), ([0, 1, 1, 1, 0, 0, 0, 0], False), ([1, 0, 0], False),
])  # fmt: skip
def test_what_is_2_4(row: list[int], sparse: bool) -> None:
    assert is_sparse(np.array([row, [0] * len(row)])) is sparse


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="layers=some is not known; choose sparse, all or none"):
        calibrated(QuantizeOutputs(layers="some"), model())
    with pytest.raises(PassError, match="needs calibration data"):
        apply(QuantizeOutputs(), model())


SILU = "(float[B,S,8] x) => (float[B,S,8] y) <float[8,8] gate, float[8,8] up> {{ {body} }}"


@pytest.mark.parametrize("body, end", [
    ("g = MatMul(x, gate)  s = Sigmoid(g)  a = Mul(g, s)  y = Neg(a)", {"a"}),
    ("g = MatMul(x, gate)  u = MatMul(x, up)  s = Sigmoid(g)  a = Mul(g, s)  h = Mul(a, u)  y = Neg(h)", {"a", "u"}),
    ("g = MatMul(x, gate)  u = MatMul(x, up)  a = Relu(g)  h = Mul(a, u)  y = Neg(h)", {"a", "u"}),
    ("g = MatMul(x, gate)  a = Relu(g)  b = Add(a, g)  c = Neg(g)  y = Add(b, c)", {"g"}),
])  # fmt: skip
def test_pairs_stand_behind_the_activation(body: str, end: set[str]) -> None:
    layers = ("MatMul_0",) if "up)" not in body else ("MatMul_0", "MatMul_1")
    graph, _ = calibrated(NMPrune(include=layers), parse(SILU.format(body=body)))
    graph, _ = calibrated(InsertQdq(activations="int8"), graph)
    after, _ = calibrated(QuantizeOutputs(), graph)
    made = {node.inputs[0].name for node in after.nodes if node.op == "QuantizeLinear"} - {"x"}
    assert made == end
