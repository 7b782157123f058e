"""WidenFloats: float32 inside, the same types at the edges."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import WidenFloats
from nmcompile.pipeline import Report

LAYER = """(float16[N,4] x) => (float16[N,3] y) <float16[4,3] w, float16[3] b> { m = MatMul(x, w)  y = Add(m, b) }"""
HALF = 15872  # 1.5 in half precision: the parser reads bits


def widened(graph: gs.Graph, atol: float = 5e-3) -> tuple[gs.Graph, Report]:
    after, report = apply(WidenFloats(), graph)
    assert_same_outputs(graph, after, atol)
    assert g.inputs(after) == g.inputs(graph)
    assert [info.dtype for info in g.outputs(after)] == [info.dtype for info in g.outputs(graph)]
    onnx.checker.check_model(g.to_model(after), full_check=True)
    edges = {t.name for t in [*after.inputs, *after.outputs]}
    for tensor in after.tensors().values():
        assert tensor.name in edges or tensor.dtype not in (np.float16, ml_dtypes.bfloat16), tensor.name
    assert apply(WidenFloats(), after)[1].changed == 0
    return after, report


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = parse(LAYER)
    assert g.to_text(graph) == golden("widen_floats/before")
    after, report = widened(graph)
    assert report == Report(changed=2)
    assert g.to_text(after) == golden("widen_floats/after")


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,4] x) => (float[N,4] y) { c = Cast <to = 10> (x)  d = Relu(c)  y = Cast <to = 1> (d) }",
        "(float[N,4] x) => (float[N,4] y) { c = Cast <to = 16> (x)  y = Cast <to = 1> (c) }",
        "(float[N,4] x) => (float[N,4] z, float16[N,4] y) { y = Cast <to = 10> (x)  c = Cast <to = 1> (y)"
        "  z = Neg(c) }",
        "(float16[N,4] x) => (float16[N,4] y, float16[N,4] z) { y = Relu(x)  z = Add(y, x) }",
        "(float16[N,4] x) => (float16[N,4] y, float16[4,4] t) <float16[4,4] w> {"
        " m = MatMul(x, w)  y = MatMul(m, w)  t = Transpose(w) }",
        "(float16[N,4] x, float16[1] like) => (float16[N,4] y) { i = Cast <to = 6> (x)  y = CastLike(i, like) }",
        f"(float16[N,4] x) => (float16[N,4] y) {{ s = Shape(x)"
        f"  c = ConstantOfShape <value = float16[1] {{{HALF}}}> (s)  y = Add(x, c) }}",
        f"(float16[N,4] x) => (float16[N,4] y) {{ c = Constant <value = float16 {{{HALF}}}> ()  y = Mul(x, c) }}",
        "(float16[N,4] x) => (float16[N,4] y) <float16[4] s, float16[4] b> {"
        " y = LayerNormalization <axis = -1> (x, s, b) }",
        "(float16[N,4] x, bool flag) => (float16[N,4] y) { c = Cast <to = 1> (x)  d = Relu(x)  z = If(flag) <"
        "then_branch = a () => (float[N,4] p) { p = Relu(c) }, else_branch = b () => (float[N,4] q) { q = Neg(c) }>"
        "  e = Cast <to = 10> (z)  y = Add(e, d) }",
        f"(float16[N,4] x) => (float16[N,4] y) <int8[4,4] w> {{ s = Constant <value = float16 {{{HALF}}}> ()"
        f"  d = DequantizeLinear(w, s)  y = MatMul(x, d) }}",
    ],
    ids=["casts", "bfloat16 cast", "output read on", "outputs read on", "shared weight", "cast like",
         "constant of shape", "constant", "layer norm", "branch", "quantized weight"],
)  # fmt: skip
def test_outputs_stay(text: str) -> None:
    atol = 5e-2 if "int8" in text or "to = 16" in text else 5e-3
    assert widened(parse(text), atol)[1].changed >= 1


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }",
        "(float16[N,4] x) => (float[N,4] y) { c = Cast <to = 1> (x)  y = Relu(c) }",
        "(float[N,4] x) => (float16[N,4] y) { y = Cast <to = 10> (x) }",
    ],
    ids=["float32", "widened input", "narrowed output"],
)
def test_nothing_to_do(text: str) -> None:
    graph = parse(text)
    after, report = widened(graph)
    assert report == Report() and g.to_text(after) == g.to_text(graph)


def test_bfloat16_weights_and_inputs() -> None:
    graph = parse(
        "(bfloat16[N,4] x) => (float[N,3] y) <bfloat16[4,3] w> { m = MatMul(x, w)  y = Cast <to = 1> (m) }"
    )
    after, report = apply(WidenFloats(), graph)  # onnxruntime's CPU has no bfloat16 product to compare with
    assert report.changed == 1
    assert [node.op for node in after.nodes] == ["Cast", "MatMul", "Cast"]
    (layer,) = g.linear_layers(after)
    assert layer.node.inputs[1].values.dtype == np.float32
    assert (layer.weight == graph.nodes[0].inputs[1].values.astype(np.float32).T).all()
    assert [t.dtype for t in (after.nodes[0].outputs[0], layer.node.outputs[0])] == [np.float32] * 2
    onnx.checker.check_model(g.to_model(after), full_check=True)


@pytest.mark.parametrize("attribute", ["dtype = 10", "dtype = 16"])
def test_types_named_by_an_attribute(attribute: str) -> None:
    graph = parse(
        f"(float[4,4] x) => (float[4,4] y) {{ e = EyeLike <{attribute}> (x)  n = Neg(e)  y = Cast <to = 1> (n) }}"
    )
    after, _ = apply(WidenFloats(), graph)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert after.nodes[0].attrs["dtype"] == 1
    np.testing.assert_array_equal(g.run(after, {"x": np.zeros((4, 4), np.float32)})["y"], -np.eye(4))


def test_half_precision_in_a_branch_keeps_the_types_and_says_so() -> None:
    graph = parse("""(float16[N,4] x, bool flag) => (float16[N,4] y) { y = If(flag) <
        then_branch = a () => (float16[N,4] p) { p = Relu(x) },
        else_branch = b () => (float16[N,4] q) { q = Neg(x) }> }""")
    after, report = apply(WidenFloats(), graph)
    assert report.changed == 0 and "the model keeps its types" in report.notes[0]
    assert g.to_text(after) == g.to_text(graph)
