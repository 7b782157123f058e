"""canonical: what is built is matched again, computes what it says, and a small change is no match."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.canonical import Attention, attentions, build_attention, match_attention, role
from nmcompile.derive import Derivation
from nmcompile.mask_form import build_mask
from nmcompile.masks import LOWEST, Mask

QKV = "(float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, int64[B,S] mask) => (float[B,S,8] y) { y = Identity(q) }"
IDS = "(int64[B,S] ids) => (int64[B,S] y) { y = Identity(ids) }"
SIZES = {"B": 2, "S": 5}


def finish(graph: gs.Graph, y: gs.Tensor) -> gs.Graph:
    """`y` as the graph's only output, checked."""
    g.rewire(graph, graph.outputs[0], y)
    g.cleanup(graph)
    g.infer_shapes(graph)
    g.verify(graph, "test")
    onnx.checker.check_model(g.to_model(graph))
    return graph


def masks(graph: gs.Graph) -> dict[str, Mask]:
    padding = graph.inputs[-1]
    return {str(mask): mask for mask in (Mask(), Mask(padding), Mask(causal=True), Mask(padding, True))}


# ---- attention --------------------------------------------------------------------------------------------


def attention(mask: str, scale: float = 0.3) -> tuple[gs.Graph, Attention]:
    graph = parse(QKV)
    b = Builder(graph, "layer")
    q, k, v, _ = graph.inputs
    finish(graph, build_attention(b, q, k, v, 2, scale, build_mask(b, masks(graph)[mask], q)))
    (found,) = attentions(graph)
    return graph, found


@pytest.mark.parametrize("name", ["none", "padding by mask", "causal", "padding by mask and causal"])
def test_what_is_built_is_matched_and_computes_attention(name: str) -> None:
    graph, found = attention(name)
    assert (found.heads, str(found.mask)) == (2, name) and found.scale == pytest.approx(0.3)
    assert [t.name for t in (found.q, found.k, found.v, found.y)] == ["q", "k", "v", "y"]
    assert {id(node) for node in found.nodes} <= {id(node) for node in graph.nodes}
    feeds = g.random_feeds(g.inputs(graph), 3, SIZES)
    q, k, v = (feeds[n].reshape(2, 5, 2, 4).astype(np.float64) for n in "qkv")
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    keep = np.ones(scores.shape, bool)
    keep &= (feeds["mask"] != 0)[:, None, None, :] if "mask" in name else True
    keep &= np.tril(np.ones((5, 5), bool)) if "causal" in name else True
    share = np.where(keep, np.exp(scores), 0)
    y = np.einsum("bhqk,bkhd->bqhd", share / share.sum(-1, keepdims=True), v).reshape(2, 5, 8)
    np.testing.assert_allclose(g.run(graph, feeds)["y"], y, atol=1e-5)


def test_masks_hide_by_the_lowest_float_and_never_make_nan() -> None:
    graph, _ = attention("padding by mask")
    feeds = g.random_feeds(g.inputs(graph), 3, SIZES)
    feeds["mask"][:] = 0
    assert np.isfinite(g.run(graph, feeds)["y"]).all()
    assert float(np.finfo(np.float32).min) == LOWEST


def test_a_quantized_operand_still_matches() -> None:
    graph, found = attention("none")
    scale, zero = gs.Constant("scale", np.array(0.1, np.float32)), gs.Constant("zero", np.array(0, np.int8))
    for operand, (reader, index) in zip(found.operands, found.readers, strict=True):
        small = gs.Variable(f"{operand.name}/q", np.dtype(np.int8))
        wide = gs.Variable(f"{operand.name}/d", np.dtype(np.float32))
        graph.nodes.append(
            gs.Node("QuantizeLinear", f"{operand.name}/q", {}, [operand, scale, zero], [small])
        )
        graph.nodes.append(gs.Node("DequantizeLinear", f"{operand.name}/d", {}, [small, scale, zero], [wide]))
        reader.inputs[index] = wide
    g.cleanup(graph)
    (again,) = attentions(graph)
    assert (again.q.name, again.k.name, again.v.name, again.heads) == ("q", "k", "v", 2)
    assert all(g.producer(t).op == "DequantizeLinear" for t in again.operands)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", ["perm of q", "perm of k", "merge", "heads", "flat", "rows", "axis", "scale", "second reader", "mask"]
)
def test_a_small_change_is_no_match(change: str) -> None:
    graph, found = attention("padding by mask")
    by_output = {node.outputs[0].name: node for node in graph.nodes}
    first, second = (node for node in graph.nodes if node.op == "MatMul")
    if change == "perm of q":
        by_output[first.inputs[0].name].attrs["perm"] = [0, 2, 3, 1]
    elif change == "perm of k":
        by_output[first.inputs[1].name].attrs["perm"] = [0, 2, 1, 3]
    elif change == "merge":
        next(node for node in graph.nodes if node.inputs[0] is second.outputs[0]).attrs["perm"] = [0, 1, 2, 3]
    elif change == "heads":
        by_output[by_output[second.inputs[1].name].inputs[0].name].inputs[1] = gs.Constant(
            "4", np.array([0, 0, 4, 2])
        )
    elif change == "flat":
        by_output["y"].inputs[1].values = np.array([-1, 8])
    elif change == "rows":
        by_output["y"].inputs[1].values = np.array([-1, 5, 8])
    elif change == "axis":
        next(node for node in graph.nodes if node.op == "Softmax").attrs["axis"] = 2
    elif change == "scale":
        next(node for node in graph.nodes if node.op == "Mul").inputs[1] = graph.inputs[0]
    elif change == "second reader":
        softmax = next(node for node in graph.nodes if node.op == "Softmax")
        y = gs.Variable("other", np.dtype(np.float32))
        graph.nodes.append(gs.Node("Neg", "other", {}, [softmax.outputs[0]], [y]))
        graph.outputs.append(y)
    else:
        next(node for node in graph.nodes if node.op == "Where").inputs[2].values = np.float32(-1)
    assert attentions(graph) == []
    assert found.name


def test_only_a_softmax_is_the_middle_of_attention() -> None:
    graph, _ = attention("none")
    d = Derivation(graph)
    assert [match_attention(node, d) is not None for node in graph.nodes] == [n.op == "Softmax" for n in graph.nodes]


def test_rows_without_a_key_are_guarded_against_nan() -> None:
    graph = parse(QKV)
    b, (q, k, v, mask) = Builder(graph, "layer"), graph.inputs
    bias = build_mask(b, Mask(mask, lowest=float("-inf")), q)
    finish(graph, build_attention(b, q, k, v, 2, 0.3, bias, guarded=True))
    (found,) = attentions(graph)
    assert found.guarded and found.mask.lowest == float("-inf")
    feeds = g.random_feeds(g.inputs(graph), 3, SIZES)
    feeds["mask"][:] = [[0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]
    y = g.run(graph, feeds)["y"]
    assert not y[0].any() and np.isfinite(y).all()


# ---- builder and roles ------------------------------------------------------------------------------------


def test_names_are_fresh_before_any_node_reads_them() -> None:
    graph = parse(IDS)
    b = Builder(graph, "layer")
    names = [b.scalar(1.0).name, b.scalar(2.0).name, Builder(graph, "layer").scalar(3.0).name]
    assert names[:2] == ["layer/scalar", "layer/scalar_1"]
    assert b("Neg", graph.inputs[0], dtype=np.int64).name != b("Neg", graph.inputs[0], dtype=np.int64).name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(float[B,S,4] x) => (float[B,S,3] y) <float[4,3] w> { m = MatMul(x, w)  y = Relu(m) }", ""),
        ("(float[B,S,4] x) => (float[B,S,3] y) <float[4,3] w> { y = MatMul(x, w) }", "head"),
        ("(float[B,S,4] x) => (float[B,S,3] y) <float[4,3] w, float[3] b> { m = MatMul(x, w)  y = Add(m, b) }", "head"),
        ("(float[B,S,4] x) => (float[B,S] p, float[B,S] q) <float[4,2] w> {"
         " m = MatMul(x, w)"
         "  i = Constant <value_ints = [-1]> ()  a, c = Split <axis = -1, num_outputs = 2> (m)"
         "  p = Squeeze(a, i)  q = Squeeze(c, i) }", "head"),
        ("(float[B,S,4] x) => (float[B,S,3] y) <float[4,3] w> { m = MatMul(x, w)  y = Softmax(m) }", "head"),
        ("(float[B,4] x) => (float[B,3] y) <float[4,3] w> { m = MatMul(x, w)  y = Relu(m) }", "pooler"),
    ],
)  # fmt: skip
def test_roles(text: str, expected: str) -> None:
    graph = parse(text)
    (layer,) = g.linear_layers(graph)
    assert role(graph, layer) == expected
