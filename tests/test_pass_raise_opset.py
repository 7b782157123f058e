"""RaiseOpset: one version of every operator, whatever the size of the weights."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import RaiseOpset
from nmcompile.pipeline import Report

SQUEEZE = """(float[N,1,16] x) => (float[N,16] y) <float[16,16] w, float[16] b> {
    s = Squeeze <axes = [1]> (x)  m = MatMul(s, w)  y = Add(m, b) }"""


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = parse(SQUEEZE, opset=11)
    assert g.to_text(graph) == golden("raise_opset/before")
    after, report = apply(RaiseOpset(), graph)
    assert report == Report(changed=1, detail={"from": 11, "to": 23})
    assert g.to_text(after) == golden("raise_opset/after")


@pytest.mark.parametrize(
    ("text", "opsets"),
    [
        ("(float[N,4] x) => (float[N,1] y) { y = ReduceMean <axes = [-1], keepdims = 1> (x) }", [11, 13, 17]),
        ("(float[N,2,4] x) => (float[N,2,4] y) { y = Softmax <axis = 1> (x) }", [11, 13, 22]),
        ("(float[N,4] x) => (float[N,2] y, float[N,2] z) { y, z = Split <axis = 1> (x) }", [11, 13, 17]),
        ("(float[N,4] x) => (float[N,4] y) { a = Dropout(x)  y = Clip(a) }", [11, 13, 22]),
    ],
    ids=["reduce", "softmax", "split", "dropout"],
)
def test_operators_whose_form_changed(text: str, opsets: list[int]) -> None:
    for opset in opsets:
        graph = parse(text, opset)
        after, report = apply(RaiseOpset(), graph)
        assert report.changed == 1 and after.opset == 23
        assert_same_outputs(graph, after)
        onnx.checker.check_model(g.to_model(after), full_check=True)
        assert apply(RaiseOpset(), after)[1] == Report()


def test_weights_are_shared_captured_and_handed_out() -> None:
    graph = parse(
        """(float[N,16] x, bool flag) => (float[N,16] y, float[16,16] copy, float[N,16] m)
        <float[16,16] w, float[16,16] v> {
        m = MatMul(x, w)  n = MatMul(m, w)  k = MatMul(n, v)  copy = Identity(v)
        y = If(flag) <then_branch = yes () => (float[N,16] z) { z = MatMul(k, w) },
                      else_branch = no () => (float[N,16] z) { u = Unsqueeze <axes = [0]> (m)
                                                               z = Squeeze <axes = [0]> (u) } > }""",
        11,
    )
    after, report = apply(RaiseOpset(), graph)
    assert report.changed == 1
    assert_same_outputs(graph, after)
    weights = {layer.node.inputs[1].name for layer in g.linear_layers(after)}
    assert weights == {"w", "v"}
    assert [t.name for t in after.inputs] == ["x", "flag"]


def test_other_domains_keep_their_version() -> None:
    graph = parse("(float[N,16] x) => (float[N,16] y) { y = com.microsoft.QuickGelu <alpha = 1.0> (x) }", 13)
    after, report = apply(RaiseOpset(), graph)
    assert report.changed == 1
    assert_same_outputs(graph, after)


def test_the_version_is_an_option() -> None:
    graph = parse(SQUEEZE, opset=11)
    after, report = apply(RaiseOpset(version=17), graph)
    assert (after.opset, report.detail) == (17, {"from": 11, "to": 17})
    assert apply(RaiseOpset(version=13), after)[1] == Report()


def test_what_cannot_be_raised_is_kept_and_says_why() -> None:
    graph = parse(
        """(float[2,3,4] x) => (float[2,3,4] y, float[3] m) <float[3] s, float[3] b, float[3] mean, float[3] var> {
        y, m, v, a, c = BatchNormalization(x, s, b, mean, var) }""",
        opset=13,
    )  # a training graph
    after, report = apply(RaiseOpset(), graph)
    assert report.changed == 0
    assert len(report.notes) == 1 and report.notes[0].startswith("opset 13 kept, it cannot be raised to 23: ")
    assert g.to_text(after) == g.to_text(graph)
