"""NarrowFloats: every float has a type, and what half precision cannot hold stays float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, parse
from pruning_cases import MODEL, calibrated
from test_pass_insert_qdq import encoder

from nmcompile import ir as g
from nmcompile.calibrate import Calibration, open_data
from nmcompile.passes import InsertQdq, NarrowFloats, StoreWeights
from nmcompile.pipeline import Pipeline, Report

HALF, FLOAT = np.float16, np.float32


def narrowed(graph: gs.Graph, atol: float = 5e-3) -> tuple[gs.Graph, Report]:
    """After the pass: strongly typed by onnx's own checker, close, left alone by a second run."""
    after, report = calibrated(NarrowFloats(), graph)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert [(i.name, i.dtype) for i in g.inputs(after)] == [(i.name, i.dtype) for i in g.inputs(graph)]
    assert [(i.name, i.dtype) for i in g.outputs(after)] == [(i.name, i.dtype) for i in g.outputs(graph)]
    feeds = g.random_feeds(g.inputs(graph), 5, {"B": 4, "S": 6})
    for name, values in g.run(graph, feeds).items():
        found = g.run(after, feeds)[name]
        assert np.abs(found - values).max() <= atol * max(np.abs(values).max(), 1)
    assert calibrated(NarrowFloats(), after)[1].changed == 0
    return after, report


def kinds(graph: gs.Graph, op: str) -> set[np.dtype]:
    return {t.dtype for node in graph.nodes if node.op == op for t in (*node.inputs, *node.outputs)
            if t.dtype in (np.dtype(HALF), np.dtype(FLOAT))}  # fmt: skip


def test_before_and_after(golden: Callable[[str], str]) -> None:
    after, report = narrowed(parse(MODEL))
    assert g.to_text(after) == golden("narrow_floats/after")
    assert kinds(after, "MatMul") == kinds(after, "Relu") == {np.dtype(HALF)} and report.notes == ()


def test_a_normalisation_stays_float32_between_casts() -> None:
    after, report = narrowed(encoder())
    assert kinds(after, "LayerNormalization") == {np.dtype(FLOAT)} and kinds(after, "Softmax") == {np.dtype(HALF)}
    (norm,) = [node.name for node in after.nodes if node.op == "LayerNormalization"]
    assert report.detail["float32"] == {norm: "by kind"} and report.notes == ()
    masked = [t.values for node in after.nodes if node.op == "Where" for t in node.inputs if isinstance(t, gs.Constant)]
    assert min(float(values.min()) for values in masked) == -32752  # -3.4e38 would be infinite


def test_pairs_have_one_type_and_the_same_integers() -> None:
    graph, _ = calibrated(InsertQdq(activations="int8"), encoder())
    graph, _ = apply(StoreWeights(), graph)
    after, _ = narrowed(graph, atol=5e-2)  # a value between two steps may round either way
    assert kinds(after, "QuantizeLinear") == kinds(after, "DequantizeLinear") == {np.dtype(HALF)}
    pairs = [node for node in graph.nodes if node.op == "QuantizeLinear" and isinstance(node.inputs[0], gs.Constant)]
    names = [node.outputs[0].name for node in pairs]
    before, now = g.run(graph, {}, names), g.run(after, {}, names)
    assert len(names) == 4 and all(np.array_equal(before[name], now[name]) for name in names)


@pytest.mark.parametrize(
    "body, why",
    [
        ("a = Mul(x, big)  b = Mul(a, small)  y = Relu(b)", "its values reach "),
        ("a = Add(x, huge)  b = Sub(a, huge)  y = Relu(b)", "its constant reaches 1e+08"),
    ],
    ids=["values", "constant"],
)
def test_what_half_cannot_hold_stays_and_is_named(body: str, why: str) -> None:
    graph = parse(f"(float[B,8] x) => (float[B,8] y) <float[1] big, float[1] small, float[1] huge> {{ {body} }}")
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = np.array([{"big": 3e4, "small": 1e-4, "huge": 1e8}[tensor.name]], FLOAT)
    after, report = calibrated(NarrowFloats(), graph)
    assert len(report.notes) == 2 and all(": stays float32, its " in note for note in report.notes)
    assert why in report.notes[0]
    assert kinds(after, "Relu") == {np.dtype(HALF)}
    feeds = g.random_feeds(g.inputs(graph), 5, {"B": 4})
    np.testing.assert_allclose(g.run(after, feeds)["y"], g.run(graph, feeds)["y"], atol=2e-2)


@pytest.mark.parametrize(("scale", "why"), [(1e-6, "1e-06 is too small"), (2.7e36, "2.7e+36 is too large")])
def test_a_scale_that_half_precision_has_not_keeps_its_pair_in_float32(scale: float, why: str) -> None:
    """The large one is that of a mask, as tools write it that quantize every tensor."""
    graph, _ = calibrated(InsertQdq(activations="int8"), parse(MODEL))
    quantize = next(node for node in graph.nodes if node.op == "QuantizeLinear")
    other = gs.Constant("other", np.array(scale, FLOAT))
    for node in (quantize, *g.consumers(quantize.outputs[0])):
        node.inputs[1] = other
    after, report = calibrated(NarrowFloats(), graph)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert sum(f"its scale {why} for half precision" in note for note in report.notes) == 2


def test_branches_keep_their_floats() -> None:
    text = """(bool c, float[N,4] x) => (float[N,4] y) {
        y = If (c) <then_branch = then () => (float[N,4] t) { t = Abs(x) },
                    else_branch = other () => (float[N,4] e) { e = Neg(x) }> }"""
    after, report = apply(NarrowFloats(), parse(text))
    assert report == Report(notes=("If, Loop or Scan inside: all floats stay float32",))
    assert all(t.dtype != HALF for t in after.tensors().values())


def test_an_output_that_is_read_on() -> None:
    narrowed(parse("(float[B,8] x) => (float[B,8] y, float[B,8] z) <float[8,8] w> { y = MatMul(x, w)  z = Relu(y) }"))


ENDINGS = {
    "angles": """(int64[S] p) => (float[S,4] y) <float[1,4] turns> {
        f = Cast <to = 1> (p)  at = Constant <value_ints = [-1, 1]> ()  c = Reshape(f, at)  a = MatMul(c, turns)
        y = Cos(a) }""",
    "a row of zeros": """(float[B,4] x) => (float[B,4] y) {
        e = Constant <value_float = 1e-12> ()  axes = Constant <value_ints = [1]> ()
        n = ReduceL2(x, axes)  m = Clip(n, e)  y = Div(x, m) }""",
    "small values": """(float[B,4] x) => (float[B,4] y) {
        two = Constant <value_float = 2.0> ()  e = Constant <value_float = 1e-6> ()
        axes = Constant <value_ints = [1]> ()  tiny = Constant <value_float = 1e-4> ()  s = Mul(x, tiny)
        q = Pow(s, two)  m = ReduceMean(q, axes)  a = Add(m, e)  r = Sqrt(a)  y = Div(s, r) }""",
    "whole numbers": """(int64[S] p) => (float[S] y) { f = Cast <to = 1> (p)  y = Neg(f) }""",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_half_precision_spoils_without_being_large(name: str) -> None:
    graph = parse(ENDINGS[name])
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(FLOAT)
    x[1] = 0
    feeds: dict[str, np.ndarray] = {"p": np.arange(0, 6000, 7)} if "p)" in ENDINGS[name][:14] else {"x": x}
    data = open_data([feeds], g.inputs(graph), max_length=8192)
    after = Pipeline([NarrowFloats()], calibration=Calibration(data)).run(graph)[0]
    found = g.run(after, feeds)["y"]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, g.run(graph, feeds)["y"], rtol=2e-3, atol=2e-3)


def test_minus_infinity_made_on_the_spot_stays_finite() -> None:
    text = """(float[B,4] x, float[B,4] keep) => (float[B,4] y) { s = Shape(x)
        low = ConstantOfShape <value = float[1] {-3.4e38}> (s)  m = Mul(low, keep)  y = Add(x, m) }"""
    graph = parse(text)
    feeds = {"x": np.ones((2, 4), FLOAT), "keep": np.zeros((2, 4), FLOAT)}
    data = open_data([feeds], g.inputs(graph))
    after = Pipeline([NarrowFloats()], calibration=Calibration(data)).run(graph)[0]
    np.testing.assert_array_equal(g.run(after, feeds)["y"], 1)


def test_outputs_of_half_precision_stay_so() -> None:
    graph = parse("(float16[B,8] x) => (float16[B,8] y) { f = Cast <to = 1> (x)  r = Relu(f)  y = Cast <to = 10> (r) }")
    after, _ = calibrated(NarrowFloats(), graph)
    assert [t.dtype for t in after.outputs] == [HALF]
    assert g.to_model(after).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
