"""--attention float: queries, keys, values and the softmax keep their floats, in the Q/DQ graph and in the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compiled import NATIVE, compiled, feeds
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.compare import Comparison, real_tokens
from nmcompile.errors import PassError
from nmcompile.plan import read_plan

# What is left between a plan and its Q/DQ graph are values that fall on the other side of a rounding step. The bound
# for quantized attention is 25 dB, because the engine rounds the softmax's shares and the graph does not.
LEAST_SQNR = 30.0  # dB

ENCODER = """(float[batch,tokens,16] x, int64[batch,tokens] mask) => (float[batch,tokens,16] y)
    <float[16,16] wq, float[16,16] wk, float[16,16] wv, float[16,16] wo, float[16] gamma, float[16] beta> {
    by_head = Constant <value_ints = [0, 0, 2, 8]> ()  flat = Constant <value_ints = [0, 0, 16]> ()
    root = Constant <value_float = 0.35355339> ()  middle = Constant <value_ints = [1, 2]> ()
    zero = Constant <value_float = 0.0> ()  low = Constant <value_float = -3.4028235e38> ()
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    qr = Reshape(q, by_head)  qh = Transpose <perm = [0, 2, 1, 3]> (qr)
    kr = Reshape(k, by_head)  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
    vr = Reshape(v, by_head)  vh = Transpose <perm = [0, 2, 1, 3]> (vr)
    qk = MatMul(qh, kt)  s = Mul(qk, root)
    is = Cast <to = 9> (mask)  keep = Unsqueeze(is, middle)  bias = Where(keep, zero, low)  h = Add(s, bias)
    p = Softmax <axis = -1> (h)  c = MatMul(p, vh)  t = Transpose <perm = [0, 2, 1, 3]> (c)  f = Reshape(t, flat)
    o = MatMul(f, wo)  r = Add(o, x)  y = LayerNormalization <axis = -1> (r, gamma, beta) }"""


def kinds(plan: Path) -> list[str]:
    segments = read_plan(plan).header["segments"]
    return [step["step"] for segment in segments if segment["kind"] == "native" for step in segment["steps"]]


def inside_attention(graph: gs.Graph) -> list[str]:
    """Operators that feed the products around each softmax."""
    products = [g.producer(node.inputs[0]) for node in graph.nodes if node.op == "Softmax"]
    found = []
    while products:
        node = products.pop()
        if node is not None and node.op in ("Mul", "Div", "Add", "Where"):
            products += [g.producer(x) for x in node.inputs]
        elif node is not None and node.op == "MatMul":
            makers = [g.producer(x) for x in node.inputs]
            found += [maker.op for maker in makers if maker is not None]
    return found


@pytest.mark.parametrize("name", NATIVE)
def test_plan_and_graph_agree(name: str) -> None:
    made = compiled(name, attention="float")
    steps = kinds(made.plan)
    assert "attention_float" in steps and "attention" not in steps
    graph = g.load(made.qdq)
    operators = inside_attention(graph)
    assert operators and "DequantizeLinear" not in operators
    reference, session = g.runner(graph), nmcompile.load(made.plan)
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(made.source):
        comparison.add(reference(batch), session.run(batch), real_tokens(batch))
    for output, difference in comparison.differences().items():
        assert difference.sqnr > LEAST_SQNR, (output, difference)


def test_int8_is_the_default() -> None:
    assert "attention" in kinds(compiled("bert-torchscript").plan)


@pytest.mark.parametrize("tokens", [65, 600, 4096])
def test_long_sequences(tokens: int, tmp_path: Path) -> None:
    """Compared with onnxruntime on the float graph's own Q/DQ form, padding at the end of the second sequence."""
    plan, qdq = tmp_path / "model.plan", tmp_path / "qdq.onnx"
    rng = np.random.default_rng(0)
    samples = {"x": rng.standard_normal((4, 32, 16)).astype(np.float32), "mask": np.ones((4, 32), np.int64)}
    nmcompile.compile(parse(ENCODER), plan, preset="fast", attention="float", calibration=[samples], emit_onnx=qdq,
                      measure=False)  # fmt: skip
    assert "attention_float" in kinds(plan)
    batch = 1 if tokens > 1000 else 2
    mask = np.ones((batch, tokens), np.int64)
    mask[-1, tokens // 2 + 3 :] = 0
    x = rng.standard_normal((batch, tokens, 16)).astype(np.float32)
    x[:, 7] *= 3  # one token that others look at
    found = nmcompile.load(plan).run({"x": x, "mask": mask})["y"]
    expected = g.runner(g.load(qdq))({"x": x, "mask": mask})["y"]
    error = (found - expected)[mask == 1]
    assert 10 * np.log10(np.square(expected[mask == 1]).mean() / np.square(error).mean()) > LEAST_SQNR
    assert not found[mask == 0].any()


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(PassError, match="attention=fp16 is not known; choose int8 or float"):
        nmcompile.compile(parse(ENCODER), None, attention="fp16")
