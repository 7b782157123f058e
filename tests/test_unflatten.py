"""Regions of flattened tokens are lifted to [batch, tokens, features] again."""

from __future__ import annotations

import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile.passes import CanonicaliseLinear, FoldConstants, SimplifyShapes
from nmcompile.pipeline import Pipeline

# The feed-forward of an OPT layer: both operands of the residual are flattened.
OPT = """(float[B,S,8] x) => (float[B,S,8] y) <float[8] g, float[8] b, float[8,16] w1, float[16] b1, float[16,8] w2> {
    flat = Constant <value_ints = [-1, 8]> ()  f = Reshape(x, flat)  n = LayerNormalization <axis = 1> (f, g, b)
    h = MatMul(n, w1)  hb = Add(h, b1)  a = Relu(hb)  o = MatMul(a, w2)  r = Add(f, o)
    shape = Shape(x)  z = Reshape(r, shape)  y = Tanh(z) }"""


def test_a_flattened_feed_forward_is_lifted() -> None:
    graph = parse(OPT)
    shaped, _ = Pipeline([SimplifyShapes()]).run(graph)
    after, report = apply(CanonicaliseLinear(), shaped)
    assert report.changed == 2
    assert [node.op for node in after.nodes] == ["LayerNormalization", "MatMul", "Add", "Relu", "MatMul", "Add", "Tanh"]
    assert after.nodes[0].attrs["axis"] == -1
    assert_same_outputs(graph, after)
    assert apply(CanonicaliseLinear(), after)[1].changed == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = Relu(hb)", "a = Softmax <axis = 0> (hb)"),  # works across tokens
        ("float[B,S,8] y)", "float[B,S,8] y, float[T,16] hb)"),  # a flattened value is an output
        ("r = Add(f, o)", "q = CumSum(f, zero)  r = Add(q, o)"),  # comes from outside the region
    ],
)
def test_near_misses_stay_flat(old: str, new: str) -> None:
    graph = parse(OPT.replace(old, new).replace("{\n", "{ zero = Constant <value_int = 0> ()\n"))
    shaped, _ = Pipeline([SimplifyShapes()]).run(graph)
    after, _ = apply(CanonicaliseLinear(), shaped)
    assert sum(node.op == "Reshape" for node in after.nodes) == 2
    assert_same_outputs(graph, after)


def test_dropout_in_training_mode_is_identity_and_said() -> None:
    graph = parse("""(float[B,4] x) => (float[B,4] y) { ratio = Constant <value_float = 0.5> ()
        train = Constant <value_int = 1> ()  on = Cast <to = 9> (train)  d = Dropout(x, ratio, on)  y = Relu(d) }""")
    folded, _ = Pipeline([SimplifyShapes()]).run(graph)
    after, reports = Pipeline([FoldConstants(), SimplifyShapes()]).run(graph)
    assert [node.op for node in after.nodes] == ["Relu"]
    assert "exported in training mode" in reports[1].notes[0]
    assert "Dropout" not in [node.op for node in folded.nodes]
