"""padding: what comes after a native segment is followed by operators; what cannot be followed reads padding."""

from __future__ import annotations

import pytest
from onnx_text import parse

from nmcompile.backends.cpu.padding import Reading, reads_padding
from nmcompile.derive import Derivation

CONSTANTS = """zero = Constant <value_float = 0.0> ()  low = Constant <value_float = -3.4028235e38> ()
    one = Constant <value_float = 1.0> ()  tiny = Constant <value_float = 1e-9> ()  i0 = Constant <value_int = 0> ()
    i1 = Constant <value_int = 1> ()  i2 = Constant <value_int = 2> ()  a0 = Constant <value_ints = [0]> ()
    a1 = Constant <value_ints = [1]> ()  a2 = Constant <value_ints = [2]> ()  a12 = Constant <value_ints = [1, 2]> ()
    c = Cast <to = 1> (mask)  m = Unsqueeze(c, a2)  b = Cast <to = 9> (m)  """
HEADS = """by = Constant <value_ints = [0, 0, 2, 4]> ()  kr = Reshape(x, by)  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
    vh = Transpose <perm = [0, 2, 1, 3]> (kr)  s = MatMul(q, kt)  d = Cast <to = 9> (mask)
    keep = Unsqueeze(d, a12)  """


def reading(text: str, outputs: str = "float[B,8] y", more: str = "") -> Reading:
    """Of a graph that reads the token tensor x [B, S, 8]."""
    weights = "<float[8,8] w, float[8] g, float[8] beta>"
    graph = parse(f"""(float[B,S,8] x, int64[B,S] mask, float[B,2,T,4] q{more}) => ({outputs}) {weights} {{
        {CONSTANTS} {text} }}""")
    return reads_padding(graph, Derivation(graph), "mask", ["x"])


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("h = MatMul(x, w)  n = LayerNormalization(h, g, beta)  y = Gelu(n)", "float[B,S,8] y"),
        ("p = MatMul(x, w)  y = Softmax(p)", "float[B,S,8] y"),
        ("y = ReduceSum <keepdims = 0> (x, a2)", "float[B,S] y"),
        # a mean over the tokens that the mask shows
        ("k = Mul(x, m)  t = ReduceSum <keepdims = 0> (k, a1)  n = ReduceSum <keepdims = 0> (m, a1)"
         "  l = Max(n, tiny)  y = Div(t, l)", "float[B,8] y"),
        ("n = Shape(x)  e = Expand(m, n)  k = Mul(e, x)  y = ReduceSum <keepdims = 0> (k, a1)", "float[B,8] y"),
        ("k = Where(b, x, low)  y = ReduceMax <keepdims = 0> (k, a1)", "float[B,8] y"),
        ("h = Sub(one, m)  f = Cast <to = 9> (h)  k = Where(f, zero, x)  y = ReduceSum <keepdims = 0> (k, a1)",
         "float[B,8] y"),
        ("r = Relu(x)  n = Shape(r)  y = Gather(n, i1)", "int64 y"),
    ],
    ids=["by rows", "over features", "sum over features", "masked mean", "expanded mask", "masked maximum",
         "filled where hidden", "sizes"],
)  # fmt: skip
def test_rows_by_themselves_and_what_the_mask_takes_out(text: str, outputs: str) -> None:
    assert reading(text, outputs) == Reading()


@pytest.mark.parametrize(
    "text",
    ["y = Gather <axis = 1> (x, i0)", "s = Slice(x, a0, a1, a1)  y = Squeeze(s, a1)",
     "h = MatMul(x, w)  f = Gather <axis = 1> (h, i0)  y = Tanh(f)"],
)  # fmt: skip
def test_the_first_token(text: str) -> None:
    assert reading(text) == Reading(first=True)


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("y = ReduceMean <keepdims = 0> (x, a1)", "ReduceMean"),
        ("y = ReduceMax <keepdims = 0> (x, a1)", "ReduceMax"),
        ("h = Sub(one, m)  k = Mul(x, h)  y = ReduceSum <keepdims = 0> (k, a1)", "ReduceSum"),  # the wrong way round
        ("o = Unsqueeze(other, a2)  k = Mul(x, o)  y = ReduceSum <keepdims = 0> (k, a1)", "ReduceSum"),
        ("t = Transpose <perm = [1, 0, 2]> (m)  k = Mul(x, t)  y = ReduceSum <keepdims = 0> (k, a1)", "Mul"),
        ("y = Gather <axis = 1> (x, i2)", "Gather"),
        ("n = ReduceSum <keepdims = 0> (mask, a1)  k = Sub(n, i1)  y0 = Gather <axis = 1> (x, k)"
         "  y = ReduceSum <keepdims = 0> (y0, a1)", "Gather"),
        ("s = CumSum(x, i1)  y = ReduceSum <keepdims = 0> (s, a1)", "CumSum"),
        ("y = Transpose <perm = [0, 2, 1]> (x)", "output y"),
        ("k = Concat <axis = 1> (x, x)  y = ReduceSum <keepdims = 0> (k, a1)", "Concat"),
    ],
)
def test_what_reads_padding_is_named(text: str, leak: str) -> None:
    found = reading(text, "float[B,M] y", ", float[B,S] other")
    assert found.leak.startswith(leak)


def test_a_mean_over_as_many_tokens_as_features() -> None:
    graph = parse("""(float[B,64,64] x, int64[B,64] mask) => (float[B,64] y) { a1 = Constant <value_ints = [1]> ()
        y = ReduceMean <keepdims = 0> (x, a1) }""")
    assert reads_padding(graph, Derivation(graph), "mask", ["x"]).leak.startswith("ReduceMean")


@pytest.mark.parametrize(
    ("scores", "leak"),
    [
        ("k = Where(keep, s, low)  p = Softmax(k)  y = MatMul(p, vh)", ""),
        ("f = Where(keep, zero, low)  k = Add(s, f)  p = Softmax(k)  bad = IsNaN(p)  o = Where(bad, zero, p)"
         "  y = MatMul(o, vh)", ""),
        ("p = Softmax(s)  y = MatMul(p, vh)", "Softmax"),
        ("no = Not(keep)  k = Where(no, s, low)  p = Softmax(k)  y = MatMul(p, vh)", "Softmax"),
        ("k = Where(keep, s, low)  p = Softmax(k)"
         "  t = Transpose <perm = [0, 1, 3, 2]> (p)  y = MatMul(t, q)", "MatMul"),
        ("k = Where(keep, s, zero)  p = Softmax(k)  y = MatMul(p, vh)", "Softmax"),
    ],
)
def test_another_attention_that_hides_the_same_padding(scores: str, leak: str) -> None:
    """As a decoder looks at the encoder's tokens."""
    found = reading(HEADS + scores, "float[B,2,T,M] y")
    assert found.leak.startswith(leak) and bool(found.leak) == bool(leak)
    assert found.keys == (not leak)
