"""masks: what a mask hides is derived exactly, and built again to the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.derive import Derivation
from nmcompile.derive.value import Underived
from nmcompile.mask_form import build_mask
from nmcompile.masks import LOWEST, Mask, match_bias, read_scores
from nmcompile.symbolic import ONE, Size, poly

INFINITE = float("-inf")
SQUARE = (poly(Size("B")), poly(2), poly(Size("S")), poly(Size("S")))
HEADER = """zero = Constant <value_float = 0.0> ()  low = Constant <value_float = -3.4028235e38> ()
    one = Constant <value_float = 1.0> ()  minus = Constant <value_float = -10000.0> ()
    half = Constant <value_float = 0.5> ()
    some = Constant <value_float = -100.0> ()  i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()
    i2 = Constant <value_int = 2> ()  i16 = Constant <value_int = 16> ()
    a0 = Constant <value_ints = [0]> ()  a1 = Constant <value_ints = [1]> ()  a12 = Constant <value_ints = [1, 2]> ()
    a13 = Constant <value_ints = [1, 3]> ()
    n0 = Shape(mask)  n = Gather(n0, i1)  at = Range(i0, n, i1)  q = Unsqueeze(at, a1)  k = Unsqueeze(at, a0)  """


def scores(text: str, mask: str = "int64[B,S] mask", others: str = "") -> gs.Graph:
    """Scores y computed from a product p = a b^T [B, 2, S, S] as the text says."""
    graph = parse(f"""(float[B,2,S,4] a, float[B,2,4,S] b, {mask}{others}) => (float[B,2,S,S] y) <float[1] inf> {{
        {HEADER} p = MatMul(a, b)  {text} }}""")
    for node in graph.nodes:  # text has no infinity
        node.inputs = [gs.Constant(x.name, np.array(INFINITE, np.float32)) if x.name == "inf" else x
                       for x in node.inputs]  # fmt: skip
    return graph


def read(graph: gs.Graph) -> tuple[float, Mask]:
    return read_scores(Derivation(graph), graph.outputs[0], "p")


PADDINGS = {
    "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  y = Where(m, p, low)": ("nonzero", LOWEST),
    "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  w = Where(m, zero, minus)  y = Add(p, w)": ("nonzero", -1e4),
    "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  w = Where(m, zero, inf)  y = Add(p, w)": ("nonzero", INFINITE),
    "e = Equal(mask, i0)  m = Unsqueeze(e, a12)  y = Where(m, minus, p)": ("nonzero", LOWEST),
    "e = Equal(mask, i1)  m = Unsqueeze(e, a12)  y = Where(m, p, low)": ("one", LOWEST),
    "e = Greater(mask, i0)  m = Unsqueeze(e, a12)  y = Where(m, p, low)": ("positive", LOWEST),
    "e = GreaterOrEqual(mask, i1)  m = Unsqueeze(e, a12)  y = Where(m, p, low)": ("positive", LOWEST),
    "c = Cast <to = 1> (mask)  m = Unsqueeze(c, a12)  h = Sub(one, m)  w = Mul(h, low)  y = Add(p, w)":
        ("linear", LOWEST),
    "c = Cast <to = 1> (mask)  m = Unsqueeze(c, a12)  h = Sub(one, m)  w = Mul(h, minus)  y = Add(w, p)":
        ("linear", -1e4),
    "c = Cast <to = 1> (mask)  m = Unsqueeze(c, a12)  h = Sub(one, m)  t = Cast <to = 9> (h)  w = Where(t, low, h)"
    "  y = Add(p, w)": ("one", LOWEST),
}  # fmt: skip


@pytest.mark.parametrize("text", PADDINGS)
def test_padding(text: str) -> None:
    factor, mask = read(scores(text))
    assert (factor, str(mask)) == (1.0, "padding by mask")
    assert (mask.test, mask.lowest) == PADDINGS[text]
    assert mask.assumes == (("binary",) if mask.test != "nonzero" else ())


def test_a_count_of_ones() -> None:
    text = """e = Equal(mask, i1)  f = Cast <to = 7> (e)  s = ReduceSum <keepdims = 1> (f, a1)  l = Less(k, s)
        m = Unsqueeze(l, a12)  y = Where(m, p, low)"""
    _, mask = read(scores(text))
    assert (str(mask), mask.test, mask.assumes) == ("padding by mask", "count", ("prefix",))


CAUSAL = "t = GreaterOrEqual(q, k)  "
PLACES = {
    "y = Identity(p)": "none",
    CAUSAL + "y = Where(t, p, low)": "causal",
    "u = Greater(k, q)  y = Where(u, low, p)": "causal",
    "d = Sub(k, q)  e = Less(d, i1)  y = Where(e, p, low)": "causal",
    # a count of places that are not what they are: none
    "g = GreaterOrEqual(at, i1)  w = Cast <to = 7> (g)  l = Mul(at, w)  e = Equal(l, at)  f = Not(e)"
    "  h = Cast <to = 7> (f)  c = CumSum(h, i0)  z = Equal(c, i0)  y = Where(z, p, low)": "none",
    CAUSAL + "f = Cast <to = 1> (t)  h = Sub(one, f)  w = Mul(h, minus)  y = Add(p, w)": "causal",
    # a second condition that the first one implies, or that always holds
    CAUSAL + "far = Sub(q, i16)  o = GreaterOrEqual(q, far)  both = And(t, o)  y = Where(both, p, low)": "causal",
    CAUSAL + "v = Less(k, n)  both = And(t, v)  y = Where(both, p, low)": "causal",
    CAUSAL + "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  both = And(t, m)  y = Where(both, p, low)":
        "padding by mask and causal",
    CAUSAL + "c = Cast <to = 1> (mask)  m = Unsqueeze(c, a12)  h = Sub(one, m)  w = Mul(h, minus)"
    "  x = Where(t, zero, low)  v = Add(x, w)  y = Add(p, v)": "padding by mask and causal",
}  # fmt: skip


@pytest.mark.parametrize("text", PLACES)
def test_places(text: str) -> None:
    factor, mask = read(scores(text))
    assert (factor, str(mask)) == (1.0, PLACES[text])


def test_the_factor_of_the_product() -> None:
    assert read(scores("y = Mul(p, half)"))[0] == 0.5
    text = "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  s = Mul(p, half)  y = Where(m, s, low)"
    factor, mask = read(scores(text))
    assert (factor, str(mask)) == (0.5, "padding by mask")


OTHERS = {
    # a window, whatever its size
    "d = Sub(q, k)  e = Less(d, i16)  y = Where(e, p, low)": "(-q + k + 15 >= 0)",
    CAUSAL + "d = Sub(q, k)  e = Less(d, i16)  o = And(t, e)  y = Where(o, p, low)": "(-q + k + 15 >= 0)",
    "d = Sub(q, k)  f = Abs(d)  e = LessOrEqual(f, i16)  y = Where(e, p, low)": "neither causal nor padding",
    # blocks, a prefix, the other triangle
    "x = Div(q, i16)  z = Div(k, i16)  e = Equal(x, z)  y = Where(e, p, low)": "// 16",
    CAUSAL + "e = Less(k, i16)  o = Or(t, e)  y = Where(o, p, low)": "(-k + 15 >= 0)",
    "u = Greater(k, q)  y = Where(u, p, low)": "neither causal nor padding",
    # masks that are read otherwise
    "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a13)  y = Where(m, p, low)": "mask[b, q], and not as padding",
    "e = Equal(mask, i0)  m = Unsqueeze(e, a12)  y = Where(m, p, low)": "the values of mask[b, k]",
    "e = Equal(mask, i2)  m = Unsqueeze(e, a12)  y = Where(m, low, p)": "the values of mask[b, k]",
    "c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  w = Where(m, zero, some)  y = Add(p, w)":
        "the values of mask[b, k]",
    # scores that are scaled by the length, or by what is looked up
    "f = Cast <to = 1> (n)  y = Mul(p, f)": "scaled by S",
    "r = Cast <to = 1> (mask)  m = Unsqueeze(r, a12)  y = Mul(p, m)": "scaled by mask[b, k]",
    "r = Cast <to = 1> (mask)  m = Unsqueeze(r, a12)  t = Tanh(m)  y = Add(p, t)": "by Tanh",
    "c = CumSum(mask, i1)  e = Greater(c, i0)  m = Unsqueeze(e, a12)  y = Where(m, p, low)": "sum(mask[b, #]",
    "y = Mul(p, p)": "their square",
    # parts of the mask
    "r = Slice(mask, a0, a1, a0)  c = Cast <to = 9> (r)  m = Unsqueeze(c, a12)  y = Where(m, p, low)":
        "mask[0, k], and not as padding",
    "a8 = Constant <value_ints = [8]> ()  l = Slice(mask, a0, a8, a1)  e = Equal(l, i1)  f = Cast <to = 7> (e)"
    "  s = ReduceSum <keepdims = 1> (f, a1)  g = Less(k, s)  m = Unsqueeze(g, a12)  y = Where(m, p, low)": "min(8, S)",
}  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_such_mask_is_said(text: str) -> None:
    with pytest.raises(Underived) as stop:
        read(scores(text))
    assert OTHERS[text] in str(stop.value)


def test_fractions_of_a_mask() -> None:
    """Seen above one half, which is no (1 - mask) * lowest; of whole numbers it is what is positive."""
    text = CAUSAL + """g = Greater(mask, half)  m = Unsqueeze(g, a12)  w = Where(m, zero, low)
        x = Where(t, zero, low)  v = Add(x, w)  y = Add(p, v)"""
    with pytest.raises(Underived, match="in turn"):
        read(scores(text, "float[B,S] mask"))
    text = text.replace("g = Greater(mask, half)", "f = Cast <to = 1> (mask)  g = Greater(f, half)")
    assert read(scores(text))[1].test == "positive"


def test_two_masks() -> None:
    text = """c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  e = Cast <to = 9> (seen)  l = Unsqueeze(e, a12)
        both = And(m, l)  y = Where(both, p, low)"""
    with pytest.raises(Underived, match=r"mask\[b, k\] and seen\[b, k\]"):
        read(scores(text, others=", int64[B,S] seen"))


def test_one_row_for_every_sequence_is_another_shape() -> None:
    _, mask = read(scores("c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)  y = Where(m, p, low)", "int64[1,S] mask"))
    assert mask.padding is not None and mask.padding.shape == [1, "S"]


# ---- the canonical form ------------------------------------------------------------------------------------


def built(mask: Mask, graph: gs.Graph) -> gs.Graph:
    y = build_mask(Builder(graph, "mask"), mask, graph.inputs[0])
    assert y is not None
    g.rewire(graph, graph.outputs[0], y)
    g.cleanup(graph)
    return graph


FORMS = [("nonzero", LOWEST, None), ("count", -1e4, None),
         ("one", -1e4, None), ("positive", INFINITE, None), ("linear", LOWEST, None),
         ("nonzero", -1e4, LOWEST), ("linear", -1e4, INFINITE)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["int64", "float", "bool"])
@pytest.mark.parametrize(("test", "lowest", "triangle"), FORMS)
def test_what_is_built_is_matched_again(test: str, lowest: float, triangle: float | None, dtype: str) -> None:
    if dtype == "bool" and test != "nonzero":
        return
    graph = parse(f"({dtype}[B,S] mask) => (float[B,1,M,S] y) {{ y = Identity(mask) }}")
    mask = Mask(graph.inputs[0], triangle is not None, test, lowest, triangle)
    found = match_bias(Derivation(built(mask, graph)), graph.outputs[0], SQUARE)
    assert found is not None and found.key == mask.key


def test_a_bias_of_other_tokens_is_no_mask_of_these() -> None:
    """A triangle of T tokens is broadcast over S where T is 1, and hides nothing then."""
    graph = parse(f"""(int64[B,S] scored, int64[B,T] mask) => (float[T,T] y) {{ {HEADER}
        t = GreaterOrEqual(q, k)  y = Where(t, zero, low) }}""")
    assert match_bias(Derivation(graph), graph.outputs[0], SQUARE) is None


def test_no_mask_is_no_tensor() -> None:
    graph = parse("(int64[B,S] mask) => (int64[B,S] y) { y = Identity(mask) }")
    assert build_mask(Builder(graph, "mask"), Mask(), graph.inputs[0]) is None
    assert match_bias(Derivation(graph), graph.outputs[0], SQUARE) is None
    assert (str(Mask()), str(Mask(graph.inputs[0], True))) == ("none", "padding by mask and causal")


VALUES = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [2, -1, 1, 0, 7]])


@pytest.mark.parametrize("text", [*PADDINGS, *PLACES])
def test_the_canonical_form_adds_the_same_numbers(text: str) -> None:
    """To every score, at any value of the mask; what is left of a score beside the lowest float does not count."""
    graph = scores(text)
    factor, mask = read(graph)
    feeds = g.random_feeds(g.inputs(graph), 3, {"B": 3, "S": 5}) | {"mask": VALUES}
    want = g.run(graph, feeds, ["p", "y"])
    form = parse("(int64[B,S] mask) => (float[B,1,M,S] y) { y = Identity(mask) }")
    padding = None if mask.padding is None else form.inputs[0]
    bias = build_mask(Builder(form, "m"), replace(mask, padding=padding), form.inputs[0])
    added: np.ndarray = np.zeros(1, np.float32)
    if bias is not None:
        g.rewire(form, form.outputs[0], bias)
        g.cleanup(form)
        added = g.run(form, feeds)["y"]
    shares = [softmax(item) for item in (want["y"], factor * want["p"] + added)]
    np.testing.assert_allclose(shares[1], shares[0], atol=1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        return np.asarray(wide / wide.sum(-1, keepdims=True))


def test_a_single_head_and_a_single_sequence() -> None:
    graph = parse(f"""(float[1,1,S,4] a, float[1,1,4,S] b, int64[1,S] mask) => (float[1,1,S,S] y) {{
        {HEADER} p = MatMul(a, b)  c = Cast <to = 9> (mask)  m = Unsqueeze(c, a12)
        y = Where(m, p, low) }}""")
    assert str(read(graph)[1]) == "padding by mask" and poly(1) == ONE


def test_a_mask_that_is_rounded_to_half_precision_is_another() -> None:
    """1e-9 is no zero, and one in half precision."""
    text = "f = Cast <to = 10> (mask)  c = Cast <to = 9> (f)  m = Unsqueeze(c, a12)  y = Where(m, p, low)"
    with pytest.raises(Underived):
        read(scores(text, "float[B,S] mask"))
    assert str(read(scores(text))[1]) == "padding by mask"  # whole numbers keep their zeros
