"""graph: running in onnxruntime, made-up inputs, and what verify finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse, parse_model, seeded

from nmcompile import ir as g
from nmcompile.errors import GraphError

TWO_LAYERS = """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] b1, float[8,3] w2> {
    h = MatMul(x, w1)  a = Add(h, b1)  r = Relu(a)  y = MatMul(r, w2) }"""


def tensor(graph: gs.Graph, name: str) -> gs.Tensor:
    return graph.tensors()[name]


# ---- running ------------------------------------------------------------------------------------------------


def test_running_gives_any_tensor() -> None:
    graph = parse(TWO_LAYERS)
    found = g.run(graph, {"x": np.ones((1, 4), np.float32), "other": np.ones(1)}, ["x", "b1", "h", "y"])
    assert list(found) == ["x", "b1", "h", "y"]
    np.testing.assert_allclose(found["h"], np.ones((1, 4)) @ seeded("w1", [4, 8]), rtol=1e-6)


def test_large_bfloat16_weights_run() -> None:
    graph = parse("(float[N,64] x) => (float[N,64] y) <bfloat16[64,64] w> { f = Cast <to = 1> (w)  y = MatMul(x, f) }")
    found = g.run(graph, {"x": np.ones((1, 64), np.float32)})["y"]
    np.testing.assert_allclose(found[0], seeded("w", [64, 64], 16).astype(np.float32).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("feeds", "message"), [
    ({}, "input 'x' is missing"),
    ({"x": np.ones((1, 5), np.float32)}, "cannot run the model: .*x"),
    ({"x": np.ones((1, 4), np.int64)}, "cannot run the model: .*x"),
])  # fmt: skip
def test_inputs_that_do_not_fit(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        g.run(parse(TWO_LAYERS), feeds)
    assert "\n" not in str(caught.value)


def test_an_unknown_operator_is_loaded_but_running_names_the_node() -> None:
    model = parse_model("(float[N,4] x) => (float[N,4] y) { y = com.nobody.Magic(x) }")
    model.graph.node[0].name = "the_node"
    graph = g.load(model)
    with pytest.raises(GraphError, match=r"the_node|Magic") as caught:
        g.run(graph, {"x": np.ones((1, 4), np.float32)})
    assert "\n" not in str(caught.value)


def test_made_up_inputs() -> None:
    infos = [g.TensorInfo(name, np.dtype(dtype), ("batch", "sequence")) for name, dtype in
             [("input_ids", np.int64), ("attention_mask", np.int64), ("token_type_ids", np.int32),
              ("position_ids", np.int64), ("pixel_values", np.float32)]]  # fmt: skip
    feeds = g.random_feeds(infos, seed=3, dims={"batch": 5})
    again = g.random_feeds(infos, seed=3, dims={"batch": 5})
    assert all((feeds[name] == again[name]).all() and feeds[name].shape == (5, 8) for name in feeds)
    mask = feeds["attention_mask"]
    assert (np.diff(mask, axis=1) <= 0).all() and mask[:, 0].all() and mask[0].all()
    assert set(np.unique(feeds["token_type_ids"])) <= {0, 1} and feeds["token_type_ids"].dtype == np.int32
    assert (feeds["position_ids"] == np.arange(8)).all()
    with pytest.raises(GraphError, match="too many"):
        g.random_feeds([g.TensorInfo("x", np.dtype(np.float32), (1 << 40,))])


# ---- verify -------------------------------------------------------------------------------------------------


def _bad_graphs() -> dict[str, tuple[Callable[[gs.Graph], object], str]]:
    def drop(graph: gs.Graph) -> None:
        del graph.nodes[1]

    def swap(graph: gs.Graph) -> None:
        graph.nodes[:] = graph.nodes[::-1]

    def rename(graph: gs.Graph) -> None:
        graph.nodes[1].name = graph.nodes[0].name

    def unname(graph: gs.Graph) -> None:
        graph.nodes[1].name = ""

    def twin(graph: gs.Graph) -> None:
        graph.nodes[2].inputs[0] = gs.Variable("h", np.dtype(np.float32))

    def twice(graph: gs.Graph) -> None:
        graph.nodes[1].outputs[0] = graph.nodes[0].outputs[0]

    def output(graph: gs.Graph) -> None:
        graph.outputs[0] = gs.Variable("lost", np.dtype(np.float32))

    def cycle(graph: gs.Graph) -> None:
        graph.nodes[0].inputs[0] = graph.nodes[2].outputs[0]

    return {
        "drop": (drop, "is computed by '.*', which is not in the graph"), "swap": (swap, "is computed later"),
        "rename": (rename, "both named"), "unname": (unname, "has no name"), "twin": (twin, "shares its name"),
        "twice": (twice, "also produced by|computed later|not computed"), "output": (output, "'lost' is not computed"),
        "cycle": (cycle, "a cycle"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _bad_graphs())
def test_verify_names_what_is_wrong(name: str) -> None:
    graph = parse(TWO_LAYERS)
    g.verify(graph, "good")
    spoil, message = _bad_graphs()[name]
    spoil(graph)
    with pytest.raises(GraphError, match=f"^stage[:,].*({message})"):
        g.verify(graph, "stage")


@pytest.mark.parametrize(("scale", "message"), [(0.0, "not finite and > 0"), (np.nan, "not finite and > 0")])
def test_verify_checks_scales(scale: float, message: str) -> None:
    graph = parse("""(float[N,4] x) => (float[N,4] y) <float s, uint8 z> {
        q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }""")
    tensor(graph, "s").values = np.array(0.5, np.float32)
    g.verify(graph, "insert-qdq")
    tensor(graph, "s").values = np.array(scale, np.float32)
    with pytest.raises(GraphError, match=message):
        g.verify(graph, "insert-qdq")


def test_verify_wants_a_dequantize_for_every_quantize() -> None:
    graph = parse("""(float[N,4] x) => (float[N,4] y) <float s, uint8 z> {
        q = QuantizeLinear(x, s, z)  c = Cast <to = 1> (q)  y = Relu(c) }""")
    tensor(graph, "s").values = np.array(0.5, np.float32)
    with pytest.raises(GraphError, match="no DequantizeLinear"):
        g.verify(graph, "insert-qdq")


def test_cycles_are_named() -> None:
    graph = parse(TWO_LAYERS)
    graph.nodes[0].inputs[0] = graph.nodes[2].outputs[0]
    with pytest.raises(GraphError, match=r"node '.*' \(.*\) is on or behind a cycle"):
        g.cleanup(graph)
