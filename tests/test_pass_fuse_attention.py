"""FuseAttention: one canonical form from every spelling of self-attention, and what is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse

from nmcompile import ir as g
from nmcompile.canonical import attentions
from nmcompile.passes import FuseAttention
from nmcompile.pipeline import Report

SIZES = {"B": 2, "S": 5, "T": 3}
WEIGHTS = "float[8,8] wq, float[8,8] wk, float[8,8] wv"
PROJECT = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
SPLIT = """qr = Reshape(q, by_head)  qh = Transpose <perm = [0, 2, 1, 3]> (qr)
    kr = Reshape(k, by_head)  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
    vr = Reshape(v, by_head)  vh = Transpose <perm = [0, 2, 1, 3]> (vr)"""
SCALE = "qk = MatMul(qh, kt)  s = Div(qk, two)"
MERGE = "t = Transpose <perm = [0, 2, 1, 3]> (c)  y = Reshape(t, flat)"

KEEP = "is = Cast <to = 9> (mask)  keep = Unsqueeze(is, middle)  "
FLOATS = "f = Cast <to = 1> (mask)  f4 = Unsqueeze(f, middle)  hidden = Sub(one, f4)  "
TRIANGLE = """shape = Shape(x)  length = Gather(shape, i1)  at = Range(i0, length, i1)
    row = Unsqueeze(at, a0)  column = Unsqueeze(at, a1)  below = LessOrEqual(row, column)  """
MASKS = {
    "none": ("m = Identity(s)", "none"),
    "where": (KEEP + "m = Where(keep, s, low)", "padding by mask"),
    "where inverted": (KEEP + "drop = Not(keep)  m = Where(drop, low, s)", "padding by mask"),
    "additive lowest": (FLOATS + "bias = Mul(hidden, low)  m = Add(s, bias)", "padding by mask"),
    "additive -10000": (FLOATS + "bias = Mul(hidden, minus)  m = Add(s, bias)", "padding by mask"),
    "bias first": (FLOATS + "bias = Mul(hidden, low)  m = Add(bias, s)", "padding by mask"),
    "causal": (TRIANGLE + "m = Where(below, s, low)", "causal"),
    "causal by Trilu": (
        """shape = Shape(x)  length = Gather(shape, a1)  square = Concat <axis = 0> (length, length)
           full = Expand(low, square)  upper = Trilu <upper = 1> (full, i1)  m = Add(s, upper)""",
        "causal",
    ),
    "causal and padding": (
        KEEP + TRIANGLE + "both = And(keep, below)  m = Where(both, s, low)",
        "padding by mask and causal",
    ),
    "two biases": (
        FLOATS + TRIANGLE + "bias = Mul(hidden, low)  h = Where(below, s, low)  m = Add(h, bias)",
        "padding by mask and causal",
    ),
}


def attention(
    *,
    inputs: str = "float[B,S,8] x, int64[B,S] mask",
    outputs: str = "float[B,S,8] y",
    weights: str = WEIGHTS,
    project: str = PROJECT,
    split: str = SPLIT,
    scale: str = SCALE,
    mask: str = MASKS["where"][0],
    softmax: str = "p = Softmax <axis = -1> (m)  c = MatMul(p, vh)",
    merge: str = MERGE,
) -> gs.Graph:
    """Two heads of four features over x [B, S, 8]; each part may be spelt in another way."""
    body = f"{project} {split} {scale} {mask} {softmax} {merge}"
    return parse(attention_text(body, inputs, outputs, weights))


def attention_text(body: str, inputs: str, outputs: str, weights: str = WEIGHTS) -> str:
    return f"""({inputs}) => ({outputs}) <{weights}> {{
        by_head = Constant <value_ints = [0, 0, 2, 4]> ()  flat = Constant <value_ints = [0, 0, 8]> ()
        two = Constant <value_float = 2.0> ()  one = Constant <value_float = 1.0> ()
        half = Constant <value_float = 0.5> ()  root = Constant <value_float = 0.70710678> ()
        low = Constant <value_float = -3.4028235e38> ()  minus = Constant <value_float = -10000.0> ()
        i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()  i2 = Constant <value_int = 2> ()
        a0 = Constant <value_ints = [0]> ()  a1 = Constant <value_ints = [1]> ()
        middle = Constant <value_ints = [1, 2]> ()  far = Constant <value_int = 15> ()
        {body} }}"""


def fused(graph: gs.Graph, mask: str = "padding by mask", scale: float = 0.5) -> gs.Graph:
    """The graph with its one attention in canonical form, checked."""
    after, report = apply(FuseAttention(), graph)
    assert (report.changed, report.detail, report.notes) == (1, {"matched": "1/1"}, ())
    (found,) = attentions(after)
    assert (found.heads, str(found.mask)) == (2, mask)
    assert found.scale == pytest.approx(scale, rel=1e-4)
    assert_same_outputs(graph, after, dims=SIZES)
    assert_same_outputs(graph, after, dims={"B": 1, "S": 1, "T": 1})
    again, second = apply(FuseAttention(), after)
    assert (second.changed, second.detail) == (0, {"matched": "1/1"})
    assert g.to_text(again) == g.to_text(after)
    return after


def missed(graph: gs.Graph, reason: str) -> Report:
    after, report = apply(FuseAttention(), graph)
    assert report.changed == 0
    assert len(report.notes) == 1 and reason in report.notes[0], report.notes
    assert [node.op for node in after.nodes] == [node.op for node in graph.nodes]
    return report


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = attention()
    assert g.to_text(graph) == golden("fuse_attention/before")
    assert g.to_text(fused(graph)) == golden("fuse_attention/after")


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    text, mask = MASKS[name]
    fused(attention(mask=text), mask)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("q2 = Mul(qh, half)  s = MatMul(q2, kt)", 0.5),
        ("k2 = Div(kt, two)  s = MatMul(qh, k2)", 0.5),
        ("q2 = Mul(root, qh)  k2 = Mul(kt, root)  s = MatMul(q2, k2)", 0.5),
        ("qk = MatMul(qh, kt)  s = Mul(half, qk)", 0.5),
        ("q2 = Mul(qh, half)  qk = MatMul(q2, kt)  s = Div(qk, two)", 0.25),
        ("s = MatMul(qh, kt)", 1.0),
    ],
)
def test_where_the_scale_stands(scale: str, factor: float) -> None:
    fused(attention(scale=scale), scale=factor)


def test_a_scale_before_the_heads_stays_there() -> None:
    project = "q0 = MatMul(x, wq)  q = Mul(q0, half)  k = MatMul(x, wk)  v = MatMul(x, wv)"
    fused(attention(project=project, scale="s = MatMul(qh, kt)"), scale=1.0)


MERGED = "qkv = MatMul(x, w)  a = Add(qkv, b)  "


@pytest.mark.parametrize(
    ("project", "split"),
    [
        (MERGED + "q, k, v = Split <axis = -1, num_outputs = 3> (a)", SPLIT),
        (MERGED + """five = Constant <value_ints = [0, 0, 3, 2, 4]> ()  r = Reshape(a, five)
            all = Transpose <perm = [2, 0, 3, 1, 4]> (r)
            qh = Gather <axis = 0> (all, i0)  k4 = Gather <axis = 0> (all, i1)
            vh = Gather <axis = 0> (all, i2)  kt = Transpose <perm = [0, 1, 3, 2]> (k4)""", ""),
        (MERGED + """wide = Constant <value_ints = [0, 0, 2, 12]> ()  r = Reshape(a, wide)
            all = Transpose <perm = [0, 2, 1, 3]> (r)  qh, k4, vh = Split <axis = -1, num_outputs = 3> (all)
            kt = Transpose <perm = [0, 1, 3, 2]> (k4)""", ""),  # each head's q, k, v side by side (GPT-NeoX)
    ],
    ids=["split", "gather", "by head"],
)  # fmt: skip
def test_merged_projections_are_taken_apart(project: str, split: str) -> None:
    graph = attention(weights="float[8,24] w, float[24] b", project=project, split=split)
    after = fused(graph)
    assert [layer.weight.shape for layer in g.linear_layers(after)] in ([(8, 8)] * 3, [(24, 8)])


def test_multi_query_keys_are_written_out() -> None:
    project = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
    split = """qr = Reshape(q, by_head)  qh = Transpose <perm = [0, 2, 1, 3]> (qr)
        single = Constant <value_ints = [0, 0, 1, 4]> ()  heads = Constant <value_ints = [1, 2, 1, 1]> ()
        kr = Reshape(k, single)  k1 = Transpose <perm = [0, 2, 3, 1]> (kr)  kt = Expand(k1, heads)
        vr = Reshape(v, single)  v1 = Transpose <perm = [0, 2, 1, 3]> (vr)  vh = Expand(v1, heads)"""
    weights = "float[8,8] wq, float[8,4] wk, float[8,4] wv"
    after = fused(attention(weights=weights, project=project, split=split))
    assert [layer.weight.shape for layer in g.linear_layers(after)] == [(8, 8)] * 3


def test_a_guard_against_nan() -> None:
    softmax = """p0 = Softmax <axis = -1> (m)  bad = IsNaN(p0)  zero = Constant <value_float = 0.0> ()
        p = Where(bad, zero, p0)  c = MatMul(p, vh)"""
    fused(attention(softmax=softmax))


def test_a_result_merged_to_two_dimensions() -> None:
    merge = """t = Transpose <perm = [0, 2, 1, 3]> (c)  rows = Constant <value_ints = [-1, 8]> ()
        y = Reshape(t, rows)"""
    fused(attention(outputs="float[R,8] y", merge=merge))


def test_heads_that_are_computed_sizes() -> None:
    split = """sizes = Shape(q)  lead = Slice(sizes, a0, middle_end)  rest = Constant <value_ints = [2, 4]> ()
        by = Concat <axis = 0> (lead, rest)
        qr = Reshape(q, by)  qh = Transpose <perm = [0, 2, 1, 3]> (qr)
        kr = Reshape(k, by)  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
        vr = Reshape(v, by)  vh = Transpose <perm = [0, 2, 1, 3]> (vr)"""
    fused(attention(split="middle_end = Constant <value_ints = [2]> ()  " + split))


def test_two_attentions_share_one_mask_and_one_weight() -> None:
    second = """q_ = MatMul(y1, wq)  k_ = MatMul(y1, wq)  v_ = MatMul(y1, wv)
        q_r = Reshape(q_, by_head)  q_h = Transpose <perm = [0, 2, 1, 3]> (q_r)
        k_r = Reshape(k_, by_head)  k_t = Transpose <perm = [0, 2, 3, 1]> (k_r)
        v_r = Reshape(v_, by_head)  v_h = Transpose <perm = [0, 2, 1, 3]> (v_r)
        qk_ = MatMul(q_h, k_t)  s_ = Div(qk_, two)  m_ = Where(keep, s_, low)
        p_ = Softmax <axis = -1> (m_)  c_ = MatMul(p_, v_h)
        t_ = Transpose <perm = [0, 2, 1, 3]> (c_)  y = Reshape(t_, flat)"""
    graph = attention(merge=MERGE.replace("y = ", "y1 = ") + second)
    after, report = apply(FuseAttention(), graph)
    assert (report.changed, report.detail) == (2, {"matched": "2/2"})
    assert sum(node.op == "Where" for node in after.nodes) == 1
    layers = g.linear_layers(after)
    assert len(layers) == 6
    assert len({layer.node.inputs[1].name for layer in layers}) == 3
    assert_same_outputs(graph, after, dims=SIZES)


def test_the_softmax_is_a_graph_output() -> None:
    graph = attention(outputs="float[B,S,8] y, float[B,2,S,S] p, float[B,2,S,4] c")
    after, report = apply(FuseAttention(), graph)
    assert report.changed == 1 and len(attentions(after)) == 1
    assert_same_outputs(graph, after, dims=SIZES)
    assert apply(FuseAttention(), after)[1].changed == 0


def test_projections_are_graph_outputs() -> None:
    fused(attention(outputs="float[B,S,8] y, float[B,S,8] q, float[B,2,4,S] kt"))


def test_an_input_that_is_attended_to_as_it_is() -> None:
    fused(attention(weights="float[8,8] wq", project="q = MatMul(x, wq)  k = Identity(x)  v = Identity(x)"))


# ---- near misses ------------------------------------------------------------------------------------------


def test_rotary_embeddings_do_not_match() -> None:
    scale = """end = Constant <value_ints = [9]> ()  last = Constant <value_ints = [3]> ()
        two_i = Constant <value_ints = [2]> ()
        left = Slice(qh, a0, two_i, last)  right = Slice(qh, two_i, end, last)  neg = Neg(right)
        turned = Concat <axis = -1> (neg, left)  by_cos = Mul(qh, cos)  by_sin = Mul(turned, sin)
        rotated = Add(by_cos, by_sin)  qk = MatMul(rotated, kt)  s = Div(qk, two)"""
    inputs = "float[B,S,8] x, int64[B,S] mask, float[S,4] cos, float[S,4] sin"
    missed(attention(inputs=inputs, scale=scale), "turned by position at Add 'Add_")


def test_relative_position_biases_do_not_match() -> None:
    mask = "biased = Add(s, relative)  " + MASKS["where"][0].replace("keep, s", "keep, biased")
    inputs = "float[B,S,8] x, int64[B,S] mask, float[B,2,S,S] relative"
    missed(attention(inputs=inputs, mask=mask), "a bias other than a mask")


def test_cross_attention_does_not_match() -> None:
    inputs = "float[B,S,8] x, float[B,T,8] memory, int64[B,T] mask"
    project = "q = MatMul(x, wq)  k = MatMul(memory, wk)  v = MatMul(memory, wv)"
    missed(attention(inputs=inputs, project=project), "cross-attention")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softmax": "p = Softmax <axis = -1> (m)  p2 = Relu(p)  c = MatMul(p2, vh)"}, "feeds a Relu"),
        ({"softmax": "p = Softmax <axis = -1> (m)  n = Neg(p)  c0 = MatMul(p, vh)  c1 = MatMul(n, vh)"
          "  c = Sub(c0, c1)"}, "several consumers"),
        ({"scale": SCALE + "  v2 = Mul(vh, half)",
          "softmax": "p = Softmax <axis = -1> (m)  c = MatMul(p, v2)"}, "values are scaled"),
        ({"merge": "t = Transpose <perm = [0, 2, 3, 1]> (c)  y = Reshape(t, flat)",
          "inputs": "float[B,8,8] x, int64[B,8] mask", "outputs": "float[B,8,8] y"}, "merged by heads"),
        ({"merge": "y = Identity(c)", "outputs": "float[B,2,S,4] y"}, "not merged by heads"),
        ({"mask": MASKS["additive lowest"][0].replace("middle", "a1"),
          "inputs": "float[B,S,8] x, int64[B,S,S] mask"}, "its mask is read as mask[b, q, k], and not as padding"),
        ({"mask": "m = Add(s, mask)",
          "inputs": "float[B,S,8] x, float[B,1,S,S] mask"},
         "a bias other than a mask is added to its scores, mask[b, 0, q, k]"),
        ({"mask": "drop = Equal(mask, i2)  d4 = Unsqueeze(drop, middle)  m = Where(d4, low, s)"},
         "it depends on the values of mask[b, k]"),
        ({"mask": "ones = Equal(mask, i1)  d4 = Unsqueeze(ones, middle)  m = Where(d4, low, s)"},
         "it depends on the values of mask[b, k]"),
        ({"mask": TRIANGLE + "upper = Not(below)  m = Where(upper, s, low)"},
         "neither causal nor padding: it depends on (-q + k - 1 >= 0)"),
        ({"mask": TRIANGLE + "gap = Sub(column, row)  near = Less(gap, far)  m = Where(near, s, low)"},
         "neither causal nor padding: it depends on (-q + k + 14 >= 0)"),
        ({"mask": TRIANGLE + "f = Cast <to = 1> (length)  m = Mul(s, f)"}, "scaled by S"),
    ],
    ids=["relu", "two readers", "scaled values", "wrong merge", "no merge", "3-D mask", "4-D mask",
         "padded by 2", "padded by 1", "upper triangle", "window", "scaled by the length"],
)  # fmt: skip
def test_near_misses_say_why(change: dict[str, str], reason: str) -> None:
    missed(attention(**change), reason)


def test_scores_that_are_made_otherwise_are_a_reason() -> None:
    """Disentangled attention, caps, merged heads: a softmax that weighs values is an attention all the same."""
    missed(attention(scale="p0 = MatMul(qh, kt)  s = Tanh(p0)", mask="m = Identity(s)"), "made by Tanh 'Tanh_")


def test_a_softmax_over_classes_is_no_attention() -> None:
    graph = parse("(float[B,8] x) => (float[B,3] y) <float[8,3] w> { h = MatMul(x, w)  y = Softmax(h) }")
    _, report = apply(FuseAttention(), graph)
    assert report == Report()


def test_inputs_without_dimension_names_are_no_padding_of_each_other() -> None:
    graph = attention()
    graph.inputs[0].shape = [None, None, 8]
    missed(graph, "which need not agree")


def test_two_sequences_have_a_triangle_each() -> None:
    """Both causal; the one built for the encoder's length was added to the decoder's scores as well."""
    causal = MASKS["causal"][0]
    rename = ("q", "k", "v", "qr", "qh", "kr", "kt", "vr", "vh", "qk", "s", "shape", "length", "at", "row", "column",
              "below", "m", "p", "c", "t", "y", "x")  # fmt: skip
    body = f"{PROJECT} {SPLIT} {SCALE} {causal} p = Softmax <axis = -1> (m)  c = MatMul(p, vh)  {MERGE}"
    second = re.sub(rf"\b({'|'.join(rename)})\b", r"\1_", body)
    text = attention_text(body + "  " + second, "float[B,S,8] x, float[B,T,8] x_", "float[B,S,8] y, float[B,T,8] y_")
    graph = parse(text)
    after, report = apply(FuseAttention(), graph)
    assert report.changed == 2 and [str(item.mask) for item in attentions(after)] == ["causal"] * 2
    for sizes in (SIZES, {"B": 1, "S": 1, "T": 9}):
        assert_same_outputs(graph, after, dims=sizes)
