"""ExpandFused: fused operators of onnxruntime and of opset 23 in plain operators, or kept with a reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.errors import NmcompileError
from nmcompile.passes import ExpandFused
from nmcompile.pipeline import Report

SIZES = {"B": 2, "S": 5, "T": 7}
SKIP = "com.microsoft.SkipLayerNormalization <epsilon = 0.00001>"
ATTENTION = """(float[B,S,8] x, int32[B,S] mask) => (float[B,S,8] y) <float[8,24] w, float[24] b> {
    y = com.microsoft.Attention <num_heads = 2> (x, w, b, mask) }"""
HEADS = "(float[B,S,8] q, float[B,T,8] k, float[B,T,8] v, int32[B,T] mask) => (float[B,S,8] y) <float[24] b>"
PLAIN = "(float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, float[B,2,S,S] m) => (float[B,S,8] y)"
EMBED = """(int32[B,S] ids, int32[B,S] token_type, int32[B,S] mask) => (float[B,S,4] y{outputs})
    <float[20,4] w, float[10,4] p, float[2,4] t, float[4] g, float[4] o> {{
    {results} = com.microsoft.EmbedLayerNormalization <epsilon = 0.00001> (ids, token_type, w, p, t, g, o, mask)
    {rest} }}"""


def expanded(graph: gs.Graph) -> gs.Graph:
    after, report = apply(ExpandFused(), graph)
    assert report == Report(changed=1)
    assert not any(node.domain == "com.microsoft" or node.op == "Attention" for node in after.nodes)
    assert_same_outputs(graph, after, dims=SIZES)
    assert_same_outputs(graph, after, dims={"B": 1, "S": 1, "T": 1})
    assert apply(ExpandFused(), after)[1] == Report()
    return after


def kept(graph: gs.Graph, reason: str) -> None:
    after, report = apply(ExpandFused(), graph)
    assert report.changed == 0
    assert len(report.notes) == 1 and reason in report.notes[0], report.notes
    assert g.to_text(after) == g.to_text(graph)


def test_before_and_after(golden: Callable[[str], str]) -> None:
    assert g.to_text(parse(ATTENTION)) == golden("expand_fused/before")
    assert g.to_text(expanded(parse(ATTENTION))) == golden("expand_fused/after")


@pytest.mark.parametrize(
    "text",
    [
        "(float[B,3,4] x, float[B,3,4] z) => (float[B,3,3] y) {"
        " y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (x, z) }",
        "(float[4,N] x) => (float[N,3] y) <float[3,4] w> {"
        " y = com.microsoft.FusedMatMul <transA = 1, transB = 1> (x, w) }",
        '(float[N,4] x) => (float[N,3] y) <float[3,4] w, float[3] b> {'
        ' y = com.microsoft.FusedGemm <transB = 1, activation = "Tanh"> (x, w, b) }',
        "(float[N,4] x) => (float[N,4] y) <float[4] b> { y = com.microsoft.BiasGelu(x, b) }",
        "(float[N,4] x) => (float[N,4] y) <float[4] b> { y = com.microsoft.FastGelu(x, b) }",
        "(float[N,4] x) => (float[N,4] y) { y = com.microsoft.FastGelu(x) }",
        "(float[N,4] x) => (float[N,4] y) { y = com.microsoft.Gelu(x) }",
        "(float[N,4] x) => (float[N,4] y) { y = com.microsoft.QuickGelu <alpha = 1.5> (x) }",
    ],
)  # fmt: skip
def test_products_and_activations(text: str) -> None:
    expanded(parse(text))


@pytest.mark.parametrize(
    ("outputs", "call"),
    [
        ("float[B,S,4] y", f"y = {SKIP} (x, z, g)"),
        ("float[B,S,4] y", f"y = {SKIP} (x, z, g, o)"),
        ("float[B,S,4] y, float[B,S,4] sum", f"y, , , sum = {SKIP} (x, z, g, o, b)"),
        ("float[B,S,4] y, float[B,S,4] sum",
         "y, , , sum = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (x, z, g)"),
    ],
)  # fmt: skip
def test_normalisation(outputs: str, call: str) -> None:
    graph = (
        f"(float[B,S,4] x, float[B,S,4] z) => ({outputs}) <float[4] g, float[4] o, float[4] b> {{ {call} }}"
    )
    expanded(parse(graph, 23))


@pytest.mark.parametrize(
    ("outputs", "results", "rest"),
    [("", "y, i", ""), (", float[B,S,4] s", "y, , s", ""),
     (", float[B,S,4] a", "y, i", "a = com.microsoft.Attention <num_heads = 2> (y, wa, ba, i)")],
)  # fmt: skip
def test_embeddings(outputs: str, results: str, rest: str) -> None:
    text = EMBED.format(outputs=outputs, results=results, rest=rest).replace(
        "float[4] o>", "float[4] o, float[4,12] wa, float[12] ba>"
    )
    graph = parse(text)
    after, report = apply(ExpandFused(), graph)
    assert report == Report(changed=2 if rest else 1)
    assert_same_outputs(graph, after, dims=SIZES)


@pytest.mark.parametrize(
    "change",
    [("", ""), ("b, mask", "b"), ("num_heads = 2", "num_heads = 2, unidirectional = 1"),
     ("num_heads = 2", "num_heads = 2, scale = 0.3")],
)  # fmt: skip
def test_attention_of_onnxruntime(change: tuple[str, str]) -> None:
    expanded(parse(ATTENTION.replace(*change)))


def test_attention_with_narrow_values() -> None:
    text = ATTENTION.replace("24", "20").replace(
        "num_heads = 2", "num_heads = 2, qkv_hidden_sizes = [8, 8, 4]"
    )
    expanded(parse(text.replace("(float[B,S,8] y)", "(float[B,S,4] y)")))


def test_two_attentions_share_a_weight() -> None:
    graph = parse(ATTENTION.replace("y = com.microsoft.Attention <num_heads = 2> (x,", """
        h = com.microsoft.Attention <num_heads = 2> (x, w, b, mask)
        y = com.microsoft.Attention <num_heads = 2> (h,"""))  # fmt: skip
    after, report = apply(ExpandFused(), graph)
    assert report == Report(changed=2)
    assert_same_outputs(graph, after, dims=SIZES)


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        (HEADS + "{ y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b, mask) }", 20),
        (HEADS + "{ y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.3> (q, k, v) }", 20),
        (HEADS.replace("T", "S")
         + "{ y = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1> (q, k, v, b, mask) }", 20),
        (PLAIN + "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }", 23),
        (PLAIN + "{ y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v) }", 23),
        (PLAIN + "{ y = Attention <q_num_heads = 2, kv_num_heads = 2, scale = 0.3> (q, k, v, m) }", 23),
        (PLAIN.replace("B,S,8", "B,2,S,4") + "{ y = Attention(q, k, v, m) }", 23),
    ],
)  # fmt: skip
def test_attention_over_projections(text: str, opset: int) -> None:
    expanded(parse(text, opset))


def test_a_boolean_mask() -> None:
    text = PLAIN.replace("float[B,2,S,S] m", "bool[S,S] m") + (
        "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, m) }"
    )
    graph = parse(text, 23)
    after, _ = apply(ExpandFused(), graph)
    feeds = g.random_feeds(g.inputs(graph), 0, SIZES)
    feeds["m"] = np.tril(np.ones((5, 5), bool))  # no row hides every key: then runtimes differ
    np.testing.assert_allclose(g.run(after, feeds)["y"], g.run(graph, feeds)["y"], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ('(float[N,4] x) => (float[N,3] y) <float[4,3] w, float[3] b> { y = com.microsoft.FusedGemm'
         ' <activation = "LeakyRelu"> (x, w, b) }', 20, "its activation is LeakyRelu"),
        ("(float[N,4] x) => (float[N,4] y) { y = com.microsoft.Gelu(x) }", 19, "Gelu needs opset 20, the graph has 19"),
        (f"(float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y) <float[4] g> {{ y = {SKIP} (x, z, g) }}", 13,
         "LayerNormalization needs opset 17"),
        ("(float[B,S,4] x) => (float[B,S,4] y) <float[4] g> {"
         " y = com.microsoft.SkipSimplifiedLayerNormalization (x, x, g) }", 20, "RMSNormalization needs opset 23"),
        (f"(float[B,S,4] x, float[B,S,4] z, float[4] g) => (float[B,S,4] y) {{ y = {SKIP} (x, z, g) }}", 20,
         "its scale is not constant"),
        (f"(float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y, float[B,S,1] m) <float[4] g> {{"
         f" y, m = {SKIP} (x, z, g) }}",
         20, "its output 1 is used"),
        (f"(float[B,S,4] x, float[B,S,4] z) => (float[B,S,4] y, float[B,S,1] i) <float[4] g> {{"
         f" y, , i, s = {SKIP} (x, z, g) }}",
         20, "its output 2 is used"),
        (ATTENTION.replace("int32[B,S] mask", "int32[B] mask"), 20, "its mask has 1 dimensions"),
        (ATTENTION.replace("int32[B,S] mask", "int32[B,S,S] mask"), 20, "its mask has 3 dimensions"),
        (ATTENTION.replace("int32[B,S] mask", "int32[B,S] mask, float[8,24] w").replace("<float[8,24] w, ", "<"), 20,
         "its weights are not constant"),
        ("(float[B,S,2,3,4] q) => (float[B,S,8] y) { y = com.microsoft.MultiHeadAttention <num_heads = 2> (q) }", 20,
         "its inputs are packed"),
        (PLAIN + "{ y = Attention <q_num_heads = 2, kv_num_heads = 2, softcap = 2.0> (q, k, v) }", 23, "soft cap"),
        (PLAIN.replace("B,S,8", "B,2,S,4") + "{ y = Attention <is_causal = 1> (q, k, v) }", 23, "four dimensions"),
        (PLAIN.replace("float[B,S,8] k, float[B,S,8] v", "float[B,S,4] k, float[B,S,4] v")
         + "{ y = Attention <q_num_heads = 2, kv_num_heads = 1> (q, k, v) }", 23, "groups of heads share their keys"),
        (PLAIN.replace("y)", "y, float[B,2,S,S] s)")
         + "{ y, , , s = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }", 23, "its output 3 is used"),
        (PLAIN.replace("float[B,S,8] k", "float k") + "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }",
         23, "not of one rank"),
        ("(float[N,4] x) => (float[N,4] y) { y = com.microsoft.Inverse(x) }", 20, "it runs on onnxruntime"),
    ],
)  # fmt: skip
def test_what_is_kept_says_why(text: str, opset: int, reason: str) -> None:
    kept(parse(text, opset), reason)


def test_a_fused_node_in_a_branch_is_left_there() -> None:
    graph = parse("""(float[N,4] x, bool flag) => (float[N,4] y) { y = If(flag) <
        then_branch = a () => (float[N,4] p) { p = com.microsoft.QuickGelu(x) },
        else_branch = b () => (float[N,4] q) { q = Neg(x) }> }""")
    after, report = apply(ExpandFused(), graph)
    assert report == Report() and g.to_text(after) == g.to_text(graph)


MALFORMED = {
    "attention without weights": ("com.microsoft.Attention <num_heads = 2> (x)", "its input 1 is missing"),
    "attention of no heads": ("com.microsoft.Attention <num_heads = 0> (x, w, b)", "num_heads is 0"),
    "attention without heads": ("com.microsoft.Attention (x, w, b)", "num_heads is missing"),
    "heads that do not divide": ("com.microsoft.Attention <num_heads = 3> (x, w, b)", "do not fit"),
    "a bias of another size": ("com.microsoft.Attention <num_heads = 2> (x, w, g)", "do not fit"),
    "a weight of one dimension": ("com.microsoft.Attention <num_heads = 2> (x, b, b)", "has 1 dimensions"),
    "sizes that do not add up": ("com.microsoft.Attention <num_heads = 2, qkv_hidden_sizes = [8, 8, 16]> (x, w, b)",
                                 "do not fit"),
    "sizes of another type": ("com.microsoft.Attention <num_heads = 2, qkv_hidden_sizes = \"8\"> (x, w, b)",
                              "qkv_hidden_sizes is of the wrong type"),
    "a number that is a text": ("com.microsoft.SkipLayerNormalization <epsilon = \"a\"> (x, x, g, g)", "wrong type"),
    "a norm without its scale": ("com.microsoft.SkipLayerNormalization (x, x)", "its input 2 is missing"),
    "an activation without bias": ("com.microsoft.BiasGelu (x)", "its input 1 is missing"),
    "a product of one": ("com.microsoft.FusedMatMul (x)", "its input 1 is missing"),
    "heads of a text": ("com.microsoft.MultiHeadAttention <num_heads = \"2\"> (x, x, x)", "wrong type"),
    "many heads that do not divide": ("com.microsoft.MultiHeadAttention <num_heads = 3> (x, x, x)", "do not divide"),
    "a table that is missing": ("com.microsoft.EmbedLayerNormalization (i)", "an embedding table is missing"),
}  # fmt: skip


@pytest.mark.parametrize("call, reason", MALFORMED.values(), ids=MALFORMED)
def test_malformed_nodes_are_kept_with_a_reason(call: str, reason: str) -> None:
    """Nothing has checked them, as onnx knows nothing of onnxruntime's operators; that refuses them when they run."""
    weights = "<float[8,24] w, float[24] b, float[8] g>"
    text = f"(float[B,S,8] x, int32[B,S] i) => (float[B,S,8] y) {weights} {{ y = {call} }}"
    _, report = apply(ExpandFused(), parse(text))
    assert report.changed == 0 and reason in report.notes[0]


def test_attention_without_its_values_is_refused_when_loaded() -> None:
    with pytest.raises(NmcompileError, match="has 2 inputs, the operator takes 3 to 6"):
        parse("(float[B,S,8] q) => (float[B,S,8] y) { y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, q) }", 23)
    with pytest.raises(NmcompileError, match=r"lacks its input 2 \(V\)"):
        parse("(float[B,S,8] q) => (float[B,S,8] y) { y = Attention <q_num_heads=2, kv_num_heads=2> (q, q, , q) }", 23)
