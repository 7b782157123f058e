"""LowerOpset: the same values from the operators of an older set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.errors import PassError
from nmcompile.passes import LowerOpset
from nmcompile.pipeline import Report

NEW = {
    "gelu": "(float[N,4] x) => (float[N,4] y) { y = Gelu(x) }",
    "tanh gelu": '(float[N,4] x) => (float[N,4] y) { y = Gelu <approximate = "tanh"> (x) }',
    "rms norm": "(float[N,4] x) => (float[N,4] y) <float[4] w> { y = RMSNormalization <epsilon = 0.01> (x, w) }",
    "rms norm of two axes": "(float[N,3,4] x) => (float[N,3,4] y) <float[3,4] w> { "
                            "y = RMSNormalization <axis = 1> (x, w) }",
    "reduction": "(float[N,4] x) => (float[N,1] y) { a = Constant <value_ints = [1]> ()  y = ReduceMax(x, a) }",
    "reduction over all": "(float[N,4] x) => (float[1,1] y) { y = ReduceMean(x) }",
    "no reduction": "(float[N,4] x) => (float[N,4] y) { y = ReduceMean <noop_with_empty_axes = 1> (x) }",
    "equal split": "(float[N,4] x) => (float[N,2] y, float[N,2] z) { y, z = Split <axis = 1, num_outputs = 2> (x) }",
    "unequal split": "(float[N,5] x) => (float[N,3] y, float[N,2] z) { y, z = Split <axis = 1, num_outputs = 2> (x) }",
    "pad of one axis": "(float[N,4] x) => (float[N,7] y) { p = Constant <value_ints = [1, 2]> ()  "
                       "a = Constant <value_ints = [1]> ()  y = Pad(x, p, , a) }",
    "reshape and cast": "(float[N,4] x) => (int64[N,2,2] y) { s = Constant <value_ints = [0, 2, 2]> ()  "
                        "r = Reshape(x, s)  y = Cast <to = 7, saturate = 1> (r) }",
}  # fmt: skip


@pytest.mark.parametrize("version", [17, 19])
@pytest.mark.parametrize("name", NEW)
def test_values_stay(name: str, version: int) -> None:
    graph = parse(NEW[name], 23)
    after, report = apply(LowerOpset(version=version), graph)
    assert after.opset == version and report.changed == 1
    onnx.checker.check_model(g.to_model(after), full_check=True)
    assert g.to_model(after).opset_import[0].version == version
    assert_same_outputs(graph, after)
    assert apply(LowerOpset(version=version), after)[1] == Report()


def test_before_and_after(golden: Callable[[str], str]) -> None:
    after, _ = apply(LowerOpset(), parse(NEW["gelu"], 23))
    assert g.to_text(after) == golden("lower_opset/gelu")


def test_inside_a_branch() -> None:
    text = """(bool c, float[N,4] x) => (float[N,4] y) {
        y = If (c) <then_branch = then () => (float[N,4] t) { t = Gelu(x) },
                    else_branch = other () => (float[N,4] e) { e = Neg(x) }> }"""
    graph = parse(text, 23)
    after, _ = apply(LowerOpset(), graph)
    assert "= Gelu" not in g.to_text(after) and "Erf" in g.to_text(after)
    for taken in (True, False):
        feeds = {"c": np.array(taken), "x": np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)}
        np.testing.assert_allclose(g.run(after, feeds)["y"], g.run(graph, feeds)["y"], atol=1e-6)


def test_an_older_graph_stays() -> None:
    assert apply(LowerOpset(version=17), parse("(float[N] x) => (float[N] y) { y = Relu(x) }", 13))[1] == Report()


@pytest.mark.parametrize(
    "text, message",
    [
        ("(float[N] x) => (float[N] y) { y = Mish(x) }", r"'Mish_\d+': opset 17 has no operator Mish; export"),
        ("(float[N,4] x, int64[1] a) => (float[N,M] y) { y = ReduceMax(x, a) }", "its axes are computed"),
        ("(float[N,1,4,4] x) => (float[N,1,A,B] y) { y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }",
         "AveragePool of opset 17 has no attribute dilations"),
    ],
)  # fmt: skip
def test_what_the_older_set_cannot_say(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply(LowerOpset(), parse(text, 23))
