"""FuseGelu: every spelling of GELU, found by what it computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import FuseGelu
from nmcompile.passes.fuse_gelu import gelu, gelu_tanh
from nmcompile.pipeline import Report

ERF = "d = Div(x, root2)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)"
TANH = "p = Pow(x, three)  q = Mul(p, cubic)  s = Add(x, q)  u = Mul(s, slope)  w = Tanh(u)  "


def graph_of(
    body: str, outputs: str = "float[N,4] y", inputs: str = "float[N,4] x", opset: int = 20
) -> gs.Graph:
    return parse(f"""({inputs}) => ({outputs}) <float[4,4] weight> {{
        half = Constant <value_float = 0.5> ()  one = Constant <value_float = 1.0> ()
        two = Constant <value_float = 2.0> ()  three = Constant <value_float = 3.0> ()
        root2 = Constant <value_float = 1.4142135> ()  inverse = Constant <value_float = 0.70710678> ()
        cubic = Constant <value_float = 0.044715> ()  slope = Constant <value_float = 0.7978845608> ()
        {body} }}""", opset)  # fmt: skip


def fused(body: str, approximate: str = "none") -> gs.Graph:
    graph = graph_of(body)
    after, report = apply(FuseGelu(), graph)
    assert (report.changed, report.detail, report.notes) == (1, {"matched": "1/1"}, ())
    assert [(node.op, node.attrs) for node in after.nodes] == [("Gelu", {"approximate": approximate})]
    assert_same_outputs(graph, after)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    again, second = apply(FuseGelu(), after)
    assert (second.changed, second.detail) == (0, {"matched": "1/1"})
    assert g.to_text(again) == g.to_text(after)
    return after


def test_before_and_after(golden: Callable[[str], str]) -> None:
    assert g.to_text(graph_of(ERF)) == golden("fuse_gelu/before")
    assert g.to_text(fused(ERF)) == golden("fuse_gelu/exact")
    assert g.to_text(fused(TANH + "a = Add(w, one)  b = Mul(x, half)  y = Mul(b, a)", "tanh")) == golden(
        "fuse_gelu/tanh"
    )


@pytest.mark.parametrize(
    "body",
    [
        "d = Mul(x, inverse)  e = Erf(d)  a = Add(one, e)  b = Mul(half, a)  y = Mul(b, x)",
        "h = Mul(x, half)  d = Mul(inverse, x)  e = Erf(d)  a = Add(e, one)  y = Mul(h, a)",
        "d = Div(x, root2)  e = Erf(d)  a = Add(e, one)  m = Mul(a, x)  y = Div(m, two)",
    ],
)
def test_spellings_with_erf(body: str) -> None:
    fused(body)


@pytest.mark.parametrize(
    "body",
    [
        "xx = Mul(x, x)  p = Mul(xx, x)  q = Mul(cubic, p)  s = Add(q, x)  u = Mul(slope, s)  w = Tanh(u)"
        "  a = Add(one, w)  b = Mul(half, x)  y = Mul(b, a)",
        "xx = Mul(x, x)  q = Mul(xx, cubic)  s = Add(one, q)  t = Mul(x, s)  u = Mul(t, slope)  w = Tanh(u)"
        "  a = Add(w, one)  b = Mul(a, half)  y = Mul(x, b)",
    ],
)
def test_spellings_with_tanh(body: str) -> None:
    fused(body, "tanh")


def test_the_definitions() -> None:
    x = np.array([-1.0, 0.0, 1.0, 3.0])
    np.testing.assert_allclose(
        gelu(x), [-0.15865525, 0, 0.84134475, 2.99595031], atol=1e-8
    )  # x Phi(x), a table
    assert np.abs(gelu_tanh(x) - gelu(x)).max() < 5e-4


@pytest.mark.parametrize(
    "body",
    [
        ERF.replace("Div(x, root2)", "Mul(x, half)"),
        ERF.replace("Mul(m, half)", "Mul(m, two)"),
        ERF.replace("Add(e, one)", "Add(e, two)"),
        ERF.replace("m = Mul(x, a)", "n = Neg(x)  m = Mul(n, a)"),
        "y = Erf(x)",
    ],
)
def test_near_misses_say_why(body: str) -> None:
    graph = graph_of(body)
    after, report = apply(FuseGelu(), graph)
    assert (report.changed, report.detail) == (0, {"matched": "0/1"})
    assert (
        len(report.notes) == 1
        and "Erf not matched, the nodes around it do not compute GELU" in report.notes[0]
    )
    assert g.to_text(after) == g.to_text(graph)


@pytest.mark.parametrize("body", ["r = Relu(x)  y = Mul(r, r)", "y = Tanh(x)", TANH + "y = Mul(w, x)"])
def test_other_activations_are_no_candidates(body: str) -> None:
    assert apply(FuseGelu(), graph_of(body))[1] == Report(detail={"matched": "0/0"})


def test_an_older_opset_has_no_gelu() -> None:
    _, report = apply(FuseGelu(), graph_of(ERF, opset=19))
    assert report == Report(notes=("Gelu needs opset 20, the graph has 19",))


def test_the_nearest_input_and_result_are_taken() -> None:
    graph = graph_of(
        "z = Mul(x, two)  " + ERF.replace("(x,", "(z,").replace("y =", "g =") + "  y = Mul(g, one)"
    )
    after, report = apply(FuseGelu(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (1, ["Mul", "Gelu", "Mul"])
    assert_same_outputs(graph, after)


def test_parts_that_are_graph_outputs() -> None:
    graph = graph_of(ERF, "float[N,4] y, float[N,4] e, float[N,4] m")
    after, report = apply(FuseGelu(), graph)
    assert report.changed == 1 and sum(node.op == "Gelu" for node in after.nodes) == 1
    assert_same_outputs(graph, after)


def test_a_constant_of_higher_rank_changes_the_shape() -> None:
    body = ERF.replace("y = Mul(m, half)", "h3 = Constant <value = float[1,1,1] {0.5}> ()  y = Mul(m, h3)")
    graph = graph_of(body, "float[1,N,4] y")
    after, report = apply(FuseGelu(), graph)
    assert (report.changed, report.detail) == (0, {"matched": "0/1"})
    assert_same_outputs(graph, after)


def test_around_shared_weights() -> None:
    body = f"""x = MatMul(x0, weight)  {ERF.replace("y =", "y0 =")} x1 = MatMul(y0, weight)
        d1 = Div(x1, root2)  e1 = Erf(d1)  a1 = Add(e1, one)  m1 = Mul(x1, a1)  y = Mul(m1, half)"""
    graph = graph_of(body, inputs="float[N,4] x0")
    after, report = apply(FuseGelu(), graph)
    assert (report.changed, [node.op for node in after.nodes]) == (2, ["MatMul", "Gelu"] * 2)
    assert after.nodes[0].inputs[1] is after.nodes[2].inputs[1]
    assert_same_outputs(graph, after)


def test_a_branch_that_goes_on_with_the_result() -> None:
    body = ERF.replace("y = Mul(m, half)", """y = If(flag) <
        then_branch = yes () => (float[N,4] z) { z = Mul(m, half) },
        else_branch = no () => (float[N,4] z) { z = Neg(x) } >""")  # fmt: skip
    graph = graph_of(body, inputs="float[N,4] x, bool flag")
    after, report = apply(FuseGelu(), graph)
    assert report.changed == 0
    assert_same_outputs(graph, after)
