"""CanonicaliseLinear: Gemm, flattened products and merged projections become MatMul + Add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import CanonicaliseLinear

LAYER = (
    "(float[N,4] x) => (float[N,3] y) <float[4,3] w, float[3,4] wt, float[3] b, float[1,3] row, float[1] one>"
)


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = parse("""(float[B,S,4] x) => (float[B,S,2] p, float[B,S,2] q) <float[3,4] w, float[3] b, float[3,4] m> {
        rows = Constant <value_ints = [-1, 4]> ()  f = Reshape(x, rows)  h = Gemm <transB = 1> (f, w, b)
        sizes = Shape <end = 2> (x)  three = Constant <value_ints = [3]> ()  to = Concat <axis = 0> (sizes, three)
        r = Reshape(h, to)  a = Relu(r)  n = MatMul(a, m)  p, q = Split <axis = -1, num_outputs = 2> (n) }""")
    assert g.to_text(graph) == golden("canonicalise_linear/before")
    after, report = apply(CanonicaliseLinear(), graph)
    assert (report.changed, report.detail) == (3, {"linear": 3})
    assert g.to_text(after) == golden("canonicalise_linear/after")
    assert_same_outputs(graph, after)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert apply(CanonicaliseLinear(), after)[1].changed == 0


@pytest.mark.parametrize(
    "gemm",
    [
        "Gemm(x, w)",
        "Gemm(x, w, b)",
        "Gemm(x, w, row)",
        "Gemm(x, w, one)",
        "Gemm <transB = 1> (x, wt, b)",
        "Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, wt, b)",
        "Gemm <alpha = -1.5, beta = 0.0> (x, w, b)",
    ],
)
def test_gemm(gemm: str) -> None:
    graph = parse(f"{LAYER} {{ y = {gemm} }}")
    after, report = apply(CanonicaliseLinear(), graph)
    assert (report.changed, report.detail, report.notes) == (1, {"linear": 1}, ())
    assert {node.op for node in after.nodes} <= {"MatMul", "Add"}
    (layer,) = g.linear_layers(after)
    assert layer.weight.shape == (3, 4) and layer.y.name == "y"
    assert_same_outputs(graph, after)
    assert apply(CanonicaliseLinear(), after)[1].changed == 0


@pytest.mark.parametrize(
    "text",
    [
        "(float[4,N] x) => (float[N,3] y) <float[4,3] w> { y = Gemm <transA = 1> (x, w) }",
        "(float[N,4] x, float[4,3] w) => (float[N,3] y) { y = Gemm(x, w) }",
        "(float[N,4] x, float[3] b) => (float[N,3] y) <float[4,3] w> { y = Gemm(x, w, b) }",
        "(float[3,4] x) => (float[3,3] y) <float[4,3] w, float[3,1] b> { y = Gemm(x, w, b) }",
        "(float[2,4] x) => (float[2,3] y) <float[4,3] w, float[2,3] b> { y = Gemm(x, w, b) }",
    ],
    ids=["transposed input", "computed weight", "computed bias", "one bias per row", "full bias"],
)
def test_a_gemm_that_is_no_linear_layer_is_kept_and_says_why(text: str) -> None:
    graph = parse(text)
    after, report = apply(CanonicaliseLinear(), graph)
    assert report.changed == 0
    assert len(report.notes) == 1 and report.notes[0].startswith("Gemm_0: Gemm kept, its ")
    assert g.to_text(after) == g.to_text(graph)
    assert_same_outputs(graph, after)


def test_a_shared_weight_stays_shared() -> None:
    graph = parse("""(float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4] b> {
        h = Gemm <transB = 1> (x, w, b)  i = Gemm <transB = 1> (h, w)  j = Gemm(i, w, b)  y = Gemm(j, w) }""")
    after, report = apply(CanonicaliseLinear(), graph)
    assert report.changed == 4
    assert_same_outputs(graph, after)
    names = [layer.node.inputs[1].name for layer in g.linear_layers(after)]
    assert Counter(names).most_common() == [(names[0], 2), ("w", 2)]


def test_results_that_are_graph_outputs_and_read_on() -> None:
    graph = parse("""(float[N,4] x) => (float[N,4] h, float[N,4] y) <float[4,4] w, float[4] b> {
        h = Gemm <transB = 1> (x, w, b)  y = Gemm(h, w) }""")
    after, report = apply(CanonicaliseLinear(), graph)
    assert report.changed == 2
    assert_same_outputs(graph, after)


def test_a_constant_comes_second_in_an_add() -> None:
    graph = parse(
        "(float[N,4] x) => (float[N,3] y) <float[4,3] w, float[3] b> { m = MatMul(x, w)  y = Add(b, m) }"
    )
    after, _ = apply(CanonicaliseLinear(), graph)
    assert g.constant(after.nodes[1].inputs[1]) is not None
    assert_same_outputs(graph, after)


# ---- flattened products -----------------------------------------------------------------------------------

FLAT = """rows = Constant <value_ints = [-1, 4]> ()  back = Constant <value_ints = [2, 5, 3]> ()
    f = Reshape(x, rows)  h = Gemm(f, w, b)"""


def test_a_flattened_gemm_is_a_product_in_three_dimensions() -> None:
    graph = parse(f"""(float[2,5,4] x) => (float[2,5,3] y, float[2,5,3] z) <float[4,3] w, float[3] b> {{
        {FLAT} y = Reshape(h, back)  r = Reshape(h, back)  z = Relu(r) }}""")
    after, report = apply(CanonicaliseLinear(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (2, ["MatMul", "Add", "Relu"])
    assert g.linear_layers(after)[0].x.name == "x"
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    ("outputs", "rest"),
    [
        ("float[2,5,3] y, float[10,3] h", "y = Reshape(h, back)"),
        ("float[2,5,3] y, float[10,3] z", "y = Reshape(h, back)  z = Relu(h)"),
        ("float[5,2,3] y", "other = Constant <value_ints = [5, 2, 3]> ()  y = Reshape(h, other)"),
    ],
    ids=["flat result is an output", "flat result is read", "other rows"],
)
def test_a_flat_result_that_is_needed_stays_flat(outputs: str, rest: str) -> None:
    graph = parse(f"(float[2,5,4] x) => ({outputs}) <float[4,3] w, float[3] b> {{ {FLAT} {rest} }}")
    after, report = apply(CanonicaliseLinear(), graph)
    assert report.changed == 1  # the Gemm
    assert [node.op for node in after.nodes][:3] == ["Reshape", "MatMul", "Add"]
    assert_same_outputs(graph, after)


# ---- merged projections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "widths"),
    [
        ("p, q, r = Split <axis = -1, num_outputs = 3> (a)", [3, 3, 3]),
        ("p, q, r = Split <axis = 2> (a, sizes)", [2, 4, 3]),
    ],
)
@pytest.mark.parametrize("bias", ["a = Add(m, b)", "a = Identity(m)"])
def test_a_split_projection_becomes_one_layer_per_part(split: str, widths: list[int], bias: str) -> None:
    outputs = ", ".join(f"float[B,S,{width}] {name}" for width, name in zip(widths, "pqr", strict=True))
    graph = parse(f"""(float[B,S,4] x) => ({outputs}) <float[4,9] w, float[9] b> {{
        sizes = Constant <value_ints = [2, 4, 3]> ()  m = MatMul(x, w)  {bias}  {split} }}""")
    after, report = apply(CanonicaliseLinear(), graph)
    linear = "Add" in bias  # an Identity in between is for SimplifyShapes to remove
    assert report.changed == int(linear)
    assert [len(layer.weight) for layer in g.linear_layers(after)] == (widths if linear else [9])
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    ("outputs", "split"),
    [
        ("float[B,S,3] p, float[B,S,3] q, float[B,S,2] r", "p, q, r = Split <axis = -1, num_outputs = 3> (m)"),
        ("float[2,S,8] p, float[2,S,8] q", "p, q = Split <axis = 0, num_outputs = 2> (m)"),
        ("float[B,S,4] p, float[B,S,4] q, float[B,S,8] m", "p, q = Split <axis = -1, num_outputs = 2> (m)"),
        ("float[B,S,4] p, float[B,S,4] q, float[B,S,8] n",
         "p, q = Split <axis = -1, num_outputs = 2> (m)  n = Neg(m)"),
    ],
    ids=["a smaller last part", "another axis", "the whole is an output", "the whole is read"],
)  # fmt: skip
def test_other_splits_are_kept(outputs: str, split: str) -> None:
    graph = parse(f"(float[B,S,4] x) => ({outputs}) <float[4,8] w> {{ m = MatMul(x, w)  {split} }}")
    after, report = apply(CanonicaliseLinear(), graph)
    assert report.changed == 0
    assert_same_outputs(graph, after, dims={"B": 4, "S": 3})


def test_a_weight_behind_an_identity() -> None:
    graph = parse("""(float[B,S,4] x) => (float[B,S,4] p, float[B,S,4] q) <float[4,8] w, float[8] b> {
        i = Identity(w)  m = MatMul(x, i)  a = Add(m, b)  p, q = Split <axis = -1, num_outputs = 2> (a) }""")
    after, report = apply(CanonicaliseLinear(), graph)
    assert (report.changed, report.detail) == (1, {"linear": 2})
    assert_same_outputs(graph, after)


def test_a_quantized_layer_is_not_split() -> None:
    graph = parse("""(float[B,S,4] x) => (float[B,S,4] p, float[B,S,4] q) <int8[4,8] w> {
        scale = Constant <value_float = 0.1> ()  d = DequantizeLinear(w, scale)  m = MatMul(x, d)
        p, q = Split <axis = -1, num_outputs = 2> (m) }""")
    after, report = apply(CanonicaliseLinear(), graph)
    assert (report.changed, report.detail) == (0, {"linear": 1})
    assert_same_outputs(graph, after)
