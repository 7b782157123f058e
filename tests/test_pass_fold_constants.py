"""FoldConstants: nodes of constants become constants, and everything that must not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.passes import FoldConstants

CHAIN = """(float[N,4] x) => (float[N,3] y) <float[3,4] w, float[3] b> {
    t = Transpose <perm = [1, 0]> (w)  half = Constant <value_float = 0.5> ()  c = Mul(b, half)
    m = MatMul(x, t)  y = Add(m, c) }"""


def ops(text: str) -> tuple[list[str], int]:
    """Operators after folding, and how many tensors were folded; outputs must stay the same."""
    graph = parse(text)
    after, report = apply(FoldConstants(), graph)
    assert_same_outputs(graph, after, atol=0)
    again, second = apply(FoldConstants(), after)
    assert second.changed == 0 and g.to_text(again) == g.to_text(after)
    return [node.op for node in after.nodes], report.changed


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = parse(CHAIN)
    assert g.to_text(graph) == golden("fold_constants/before")
    after, report = apply(FoldConstants(), graph)
    assert (report.changed, report.notes) == (2, ())
    assert g.to_text(after) == golden("fold_constants/after")
    assert ops(CHAIN) == (["MatMul", "Add"], 2)


def test_only_the_ends_of_a_constant_chain_are_kept() -> None:
    text = """(float[N,4] x) => (float[N,4] y) <float[4] w> {
        a = Neg(w)  b = Exp(a)  c = Sqrt(b)  d = Add(x, c)  y = Mul(d, b) }"""
    assert ops(text) == (["Add", "Mul"], 2)


def test_a_shared_weight_keeps_its_other_reader() -> None:
    text = """(float[N,4] x) => (float[N,4] y) <float[4,4] w> {
        t = Transpose <perm = [1, 0]> (w)  m = MatMul(x, t)  y = MatMul(m, w) }"""
    graph = parse(text)
    after, _ = apply(FoldConstants(), graph)
    first, second = (node.inputs[1].values for node in after.nodes)
    assert (first == second.T).all()
    assert ops(text) == (["MatMul", "MatMul"], 1)


def test_a_constant_graph_output_keeps_its_node() -> None:
    text = """(float[N,4] x) => (float[N,4] y, float[4] s) <float[4] a, float[4] b> {
        m = Mul(a, b)  s = Add(m, b)  y = Add(x, s) }"""
    assert ops(text) == (["Mul", "Add", "Add"], 0)


def test_one_of_two_results_is_a_graph_output() -> None:
    """The other's place must stay: `q` is the second half of the split."""
    text = """(float[N,2] x) => (float[N,2] y, float[2,2] q) <float[2,4] w> {
        p, q = Split <axis = 1, num_outputs = 2> (w)  y = MatMul(x, p) }"""
    assert ops(text) == (["Split", "MatMul"], 1)


def test_two_results_of_one_node() -> None:
    text = """(float[N,2] x) => (float[N,2] y) <float[2,4] w> {
        p, q = Split <axis = 1, num_outputs = 2> (w)  m = MatMul(x, p)  y = MatMul(m, q) }"""
    assert ops(text) == (["MatMul", "MatMul"], 2)


def test_constants_that_a_branch_captures() -> None:
    text = """(float[N,4] x, bool flag) => (float[N,4] y) <float[4] a, float[4] b> {
        s = Add(a, b)  u = Neg(s)  y = If(flag) <
            then_branch = yes () => (float[N,4] z) { z = Add(x, s) },
            else_branch = no () => (float[N,4] z) { v = Mul(x, u)  w = Neg(a)  z = Add(v, w) } > }"""
    assert ops(text) == (["If"], 2)


def test_constants_that_a_loop_captures() -> None:
    text = """(float[4] x, int64 trips) => (float[4] y) <float[4] a, float[4] b> {
        s = Add(a, b)  go = Constant <value_int = 1> ()  on = Cast <to = 9> (go)
        y = Loop(trips, on, x) <body = step (int64 i, bool c, float[4] state) => (bool c2, float[4] next) {
            c2 = Identity(c)  next = Add(state, s) }> }"""
    assert ops(text) == (["Loop"], 2)


def test_a_constant_condition_leaves_the_branch() -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        one = Constant <value_int = 1> ()  always = Cast <to = 9> (one)
        y = If(always) <then_branch = yes () => (float[N,4] z) { z = Neg(x) },
                        else_branch = no () => (float[N,4] z) { z = Exp(x) } > }"""
    assert ops(text) == (["If"], 1)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("r = RandomNormal <shape = [4], seed = 1.0> ()  z = Mul(r, zero)", ["RandomNormal", "Mul"]),
        ("q = Constant <value_int = 3> ()  i = Cast <to = 3> (q)  z = DequantizeLinear(i, half)",
         ["DequantizeLinear"]),
        ("z = com.microsoft.QuickGelu(zero)", ["QuickGelu"]),
        ("s = SequenceConstruct(zero)  i = Constant <value_int = 0> ()  z = SequenceAt(s, i)",
         ["SequenceConstruct", "SequenceAt"]),
    ],
    ids=["random", "dequantize", "other domain", "sequence"],
)  # fmt: skip
def test_nodes_that_are_never_folded(body: str, kept: list[str]) -> None:
    graph = parse(f"""(float[N,4] x) => (float[N,4] y) {{
        zero = Constant <value_float = 0.0> ()  half = Constant <value_float = 0.5> ()  {body}  y = Add(x, z) }}""")
    after, _ = apply(FoldConstants(), graph)
    assert [node.op for node in after.nodes] == [*kept, "Add"]


def test_a_result_too_large_stays_a_node() -> None:
    text = """(float[64,64] x) => (float[64,64] y) { zero = Constant <value_float = 0.5> ()
        shape = Constant <value_ints = [64, 64]> ()  big = Expand(zero, shape)  y = Add(x, big) }"""
    graph = parse(text)
    for limit, kept in ((64 * 64 * 4, ["Add"]), (64 * 64 * 4 - 1, ["Expand", "Add"])):
        after, _ = apply(FoldConstants(max_bytes=limit), graph)
        assert [node.op for node in after.nodes] == kept


def test_what_onnxruntime_cannot_compute_is_said() -> None:
    graph = parse("""(float[N,4] x) => (float[N,4] y) <float[4] w> {
        four = Constant <value_ints = [5]> ()  r = Reshape(w, four)  y = Add(x, r) }""")
    after, report = apply(FoldConstants(), graph)
    assert report.changed == 0
    assert len(report.notes) == 1 and report.notes[0].startswith("r: not folded, onnxruntime cannot")
    assert g.to_text(after) == g.to_text(graph)


def test_types_survive() -> None:
    graph = parse("""(int64[N] x) => (int64[N] y) <int32[1] i, float16[1] h> {
        a = Cast <to = 7> (i)  b = Cast <to = 7> (h)  c = Add(a, b)  y = Add(x, c) }""")
    after, _ = apply(FoldConstants(), graph)
    assert after.nodes[0].inputs[1].values.dtype == np.int64
    assert_same_outputs(graph, after, atol=0)
