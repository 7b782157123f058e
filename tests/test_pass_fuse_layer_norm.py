"""FuseLayerNorm: LayerNormalization and RMSNormalization from their decomposed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import FuseLayerNorm
from nmcompile.pipeline import Report

CONSTANTS = """two = Constant <value_float = 2.0> ()  eps = Constant <value_float = 0.00001> ()
    one = Constant <value_float = 1.0> ()  last = Constant <value_ints = [-1]> ()"""
DIVIDE = "n = Div(d, s)"
SCALE = "g = Mul(n, gamma)  y = Add(g, beta)"


def layer_norm(
    *,
    inputs: str = "float[B,S,4] x",
    outputs: str = "float[B,S,4] y",
    weights: str = "float[4] gamma, float[4] beta",
    mean: str = "m = ReduceMean <axes = [-1]> (x)",
    centre: str = "d = Sub(x, m)",
    square: str = "p = Pow(d, two)",
    variance: str = "v = ReduceMean <axes = [-1]> (p)",
    divide: str = DIVIDE,
    scale: str = SCALE,
    opset: int = 17,
) -> gs.Graph:
    return parse(f"""({inputs}) => ({outputs}) <{weights}> {{ {CONSTANTS} {mean} {centre} {square} {variance}
        e = Add(v, eps)  s = Sqrt(e)  {divide}  {scale} }}""", opset)  # fmt: skip


def rms_norm(
    *,
    outputs: str = "float[B,S,4] y",
    square: str = "p = Pow(x, two)",
    mean: str = "v = ReduceMean(p, last)",
    divide: str = "n = Div(x, s)",
    opset: int = 23,
) -> gs.Graph:
    return parse(f"""(float[B,S,4] x) => ({outputs}) <float[4] gamma> {{ {CONSTANTS} {square} {mean}
        e = Add(v, eps)  s = Sqrt(e)  {divide}  y = Mul(gamma, n) }}""", opset)  # fmt: skip


def fused(graph: gs.Graph, op: str = "LayerNormalization") -> gs.Graph:
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, report.detail, report.notes) == (1, {"matched": "1/1"}, ())
    assert [node.op for node in after.nodes] == [op]
    assert_same_outputs(graph, after)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    again, second = apply(FuseLayerNorm(), after)
    assert (second.changed, second.detail) == (0, {"matched": "1/1"})
    assert g.to_text(again) == g.to_text(after)
    return after


def missed(graph: gs.Graph, reason: str) -> None:
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, report.detail) == (0, {"matched": "0/1"})
    assert len(report.notes) == 1 and reason in report.notes[0]
    assert [node.op for node in after.nodes] == [node.op for node in graph.nodes]


def test_before_and_after(golden: Callable[[str], str]) -> None:
    assert g.to_text(layer_norm()) == golden("fuse_layer_norm/before")
    assert g.to_text(fused(layer_norm())) == golden("fuse_layer_norm/after")
    assert g.to_text(fused(rms_norm(), "RMSNormalization")) == golden("fuse_layer_norm/rms")


@pytest.mark.parametrize(
    "change",
    [
        {"square": "p = Mul(d, d)"},
        {"divide": "r = Reciprocal(s)  n = Mul(d, r)"},
        {"divide": "r = Div(one, s)  n = Mul(r, d)"},
        {"divide": "d2 = Sub(x, m)  n = Div(d2, s)"},
        {"divide": "m2 = ReduceMean <axes = [2]> (x)  d2 = Sub(x, m2)  n = Div(d2, s)"},
        {"mean": "m = ReduceMean <axes = [2]> (x)", "variance": "v = ReduceMean <axes = [2]> (p)"},
        {"mean": "m = ReduceMean(x, last)", "variance": "v = ReduceMean(p, last)"},
        {"scale": "g = Mul(gamma, n)  y = Add(beta, g)"},
        {"scale": "y = Mul(n, gamma)"},
        {"scale": "y = Add(n, beta)"},
        {"scale": "y = Identity(n)", "outputs": "float[B,S,4] n"},
        {"weights": "float[1,1,4] gamma, float[1] beta"},
    ],
    ids=lambda change: " ".join(change.values()),
)
def test_spellings(change: dict[str, str]) -> None:
    opset = 18 if "last" in change.get("mean", "") else 17
    fused(layer_norm(**change, opset=opset))


@pytest.mark.parametrize("change", [{"square": "p = Mul(x, x)"}, {"divide": "r = Reciprocal(s)  n = Mul(x, r)"},
                                    {"mean": "a = Constant <value_ints = [2]> ()  v = ReduceMean(p, a)"}])  # fmt: skip
def test_spellings_of_rms(change: dict[str, str]) -> None:
    fused(rms_norm(**change), "RMSNormalization")  # type: ignore[arg-type]  # mypy sees opset=str


def test_double_precision() -> None:
    graph = parse("""(double[B,4] x) => (double[B,4] y) {
        c = Constant <value_float = 0.00001> ()  eps = Cast <to = 11> (c)
        m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)  p = Mul(d, d)  v = ReduceMean <axes = [-1]> (p)
        e = Add(v, eps)  s = Sqrt(e)  y = Div(d, s) }""", 17)  # fmt: skip
    _, report = apply(FuseLayerNorm(), graph)
    assert report.changed == 0  # the Cast is for FoldConstants
    graph.nodes[0].outputs[0].to_constant(g.run(graph, {}, ["eps"])["eps"])
    graph.nodes[0].outputs.clear()
    g.cleanup(graph)
    fused(graph)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (lambda: rms_norm(mean="one_ = Constant <value_ints = [1]> ()  v = ReduceMean(p, one_)"), "over the last axis"),
        (lambda: rms_norm(mean="v = ReduceMean(p)"), "over the last axis"),
        (lambda: layer_norm(variance="v = ReduceMean <axes = [1, 2]> (p)"), "over the last axis"),
        (lambda: layer_norm(square="p = Mul(d, x)"), "not a square"),
        (lambda: layer_norm(square="three = Constant <value_float = 3.0> ()  p = Pow(d, three)"), "not a square"),
        (lambda: layer_norm(inputs="float[B,S,4] x, float[B,S,4] z", divide="d2 = Sub(x, z)  n = Div(d2, s)"),
         "no division by the standard deviation"),
        (lambda: layer_norm(divide="n = Div(s, d)"), "no division by the standard deviation"),
        (lambda: layer_norm(inputs="float[B,S,W] x", outputs="float[B,S,W] n", scale=""), "the width is not known"),
        (lambda: layer_norm(opset=13), "LayerNormalization needs opset 17, the graph has 13"),
        (lambda: layer_norm(opset=11), "LayerNormalization needs opset 17, the graph has 11"),
        (lambda: rms_norm(opset=20), "RMSNormalization needs opset 23, the graph has 20"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)  # fmt: skip
def test_near_misses_say_why(graph: Callable[[], gs.Graph], reason: str) -> None:
    missed(graph(), reason)


@pytest.mark.parametrize("axes", ["<keepdims = 0> (x, last)", "(x, first)"])
def test_centred_by_another_mean_it_is_rms_of_what_was_centred(axes: str) -> None:
    graph = parse(f"""(float[4,4] x) => (float[4,4] y) {{ {CONSTANTS} first = Constant <value_ints = [0]> ()
        m = ReduceMean {axes}  d = Sub(x, m)  p = Pow(d, two)  v = ReduceMean(p, last)
        e = Add(v, eps)  s = Sqrt(e)  y = Div(d, s) }}""", 23)  # fmt: skip
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (
        1,
        ["ReduceMean", "Sub", "RMSNormalization"],
    )
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    ("shape", "result"),
    [("float[4,1]", "float[4,4]"), ("float[1,1,4]", "float[1,4,4]")],
    ids=["column", "rank"],
)
def test_a_factor_that_is_not_one_per_feature_stays_a_product(shape: str, result: str) -> None:
    graph = layer_norm(inputs="float[4,4] x", outputs=f"{result} y", weights=f"{shape} gamma",
                       scale="y = Mul(n, gamma)")  # fmt: skip
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (1, ["LayerNormalization", "Mul"])
    assert_same_outputs(graph, after)


@pytest.mark.parametrize(
    ("extra", "ops"),
    [
        ("float[B,S,4] n", ["LayerNormalization", "Mul", "Add"]),
        ("float[B,S,4] g", ["LayerNormalization", "Add"]),
        ("float[B,S,1] v", ["ReduceMean", "Sub", "Pow", "ReduceMean", "LayerNormalization"]),
    ],
)
def test_a_part_that_is_a_graph_output(extra: str, ops: list[str]) -> None:
    graph = layer_norm(outputs=f"float[B,S,4] y, {extra}")
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (1, ops)
    assert_same_outputs(graph, after)
    assert apply(FuseLayerNorm(), after)[1].changed == 0


def test_two_normalisations_share_their_weights() -> None:
    second = """m2 = ReduceMean <axes = [-1]> (y1)  d2 = Sub(y1, m2)  p2 = Pow(d2, two)
        v2 = ReduceMean <axes = [-1]> (p2)  e2 = Add(v2, eps)  s2 = Sqrt(e2)  n2 = Div(d2, s2)
        g2 = Mul(n2, gamma)  y = Add(g2, beta)"""
    graph = layer_norm(scale=f"{SCALE.replace('y =', 'y1 =')} {second}")
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, report.detail) == (2, {"matched": "2/2"})
    assert_same_outputs(graph, after, atol=1e-4)


def test_a_branch_that_divides() -> None:
    divide = """y = If(flag) <then_branch = yes () => (float[B,S,4] z) { z = Div(d, s) },
                              else_branch = no () => (float[B,S,4] z) { z = Neg(d) } >"""
    graph = layer_norm(inputs="float[B,S,4] x, bool flag", divide=divide, scale="")
    missed(graph, "no division by the standard deviation")


def test_a_branch_that_goes_on_with_the_result() -> None:
    graph = layer_norm(inputs="float[B,S,4] x, bool flag", scale="""y = If(flag) <
        then_branch = yes () => (float[B,S,4] z) { z = Mul(n, gamma) },
        else_branch = no () => (float[B,S,4] z) { z = Neg(x) } >""")  # fmt: skip
    after, report = apply(FuseLayerNorm(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (1, ["LayerNormalization", "If"])
    assert_same_outputs(graph, after)


def test_the_axis_is_written_one_way() -> None:
    graph = parse("""(float[B,S,4] x) => (float[B,S,4] y) <float[4] gamma> {
        y = LayerNormalization <axis = 2> (x, gamma) }""")
    after, report = apply(FuseLayerNorm(), graph)
    assert report == Report(detail={"matched": "1/1"})
    assert after.nodes[0].attrs["axis"] == -1
    assert_same_outputs(graph, after)


def test_a_square_root_of_something_else_is_no_candidate() -> None:
    graph = parse("(float[B,4] x) => (float[B,4] y) { a = Abs(x)  s = Sqrt(a)  y = Div(x, s) }")
    assert apply(FuseLayerNorm(), graph)[1] == Report(detail={"matched": "0/0"})


def test_an_empty_gain_is_no_gain() -> None:
    graph = layer_norm()
    product = next(node for node in graph.nodes if node.op == "Mul" and any(t.name == "gamma" for t in node.inputs))
    product.inputs[1] = gs.Constant("none", np.zeros(0, np.float32))  # damaged: broadcasts with nothing
    after, _ = apply(FuseLayerNorm(), graph)
    assert any(node.op == "Mul" and any(t.name == "none" for t in node.inputs) for node in after.nodes)
