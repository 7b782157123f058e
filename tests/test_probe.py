"""probe: derived shapes, feeds for runs, and parts of a graph run by themselves."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

from nmcompile import ir as g
from nmcompile import probe
from nmcompile.errors import GraphError
from nmcompile.tensorinfo import TensorInfo

IDS = "(int64[B,S] ids, float[B,S] weight_mask, bool[B,S] flags, float[B,S,4] x)"


def shapes(graph: gs.Graph) -> dict[str, object]:
    return {t.name: t.shape for node in graph.nodes for t in node.outputs}


# ---- annotate ---------------------------------------------------------------------------------------------


def test_shapes_that_inference_cannot_tell() -> None:
    graph = parse("""(float[B,S,8] x) => (float[?,?] y) { z = NonZero(x)  one = Constant <value_ints = [1]> ()
        n = Shape(x)  b = Slice(n, i0, one)  rest = Constant <value_ints = [-1, 4]> ()
        i0 = Constant <value_ints = [0]> ()
        to = Concat <axis = 0> (b, rest)  r = Reshape(x, to)  t = Transpose <perm = [1, 0, 2]> (r)
        y = ReduceSum <keepdims = 0> (t, one) }""")
    d = probe.annotate(graph)
    found = shapes(graph)
    assert found["r"] == ["B", None, 4] and found["t"] == [None, "B", 4]
    assert [str(size) for size in d.shape(graph.tensors()["r"]) or ()] == ["B", "2*S", "4"]
    assert found["y"] == [None, 4] and found["to"] == [3]


def test_sizes_that_only_look_like_a_dimension() -> None:
    graph = parse("""(float[B,S] x) => (float[B,S] y, float[M] t, float[M] u) { i0 = Constant <value_ints = [0]> ()
        two = Constant <value_ints = [32]> ()  end = Constant <value_ints = [-1]> ()
        one = Constant <value_ints = [1]> ()
        y = Relu(x)  f = ReduceSum <keepdims = 0> (y, i0)  t = Slice(f, i0, two)  u = Slice(f, i0, end) }""")
    d = probe.annotate(graph)
    assert (shapes(graph)["t"], shapes(graph)["u"]) == ([None], [None])
    assert [str((d.shape(graph.tensors()[name]) or ())[0]) for name in "tu"] == ["min(32, S)", "S - 1"]


def test_a_dimension_of_each_of_two_inputs() -> None:
    graph = parse("(float[B,S,4] x, float[B,T,4] m) => (float[B,S,T] y) {"
                  " t = Transpose <perm = [0, 2, 1]> (m)  y = MatMul(x, t) }")  # fmt: skip
    for node in graph.nodes:
        node.outputs[0].shape = None
    probe.annotate(graph)
    assert shapes(graph) == {"t": ["B", 4, "T"], "y": ["B", "S", "T"]}


def test_what_has_no_shape_says_at_which_operator_it_stopped() -> None:
    graph = parse("(float[B,S] x) => (float[M] y) { z = NonZero(x)  c = Cast <to = 1> (z)  y = Relu(c) }")
    d = probe.annotate(graph)
    assert d.shape(graph.tensors()["y"]) is None
    assert d.why["y"] == d.why["z"] == f"NonZero '{graph.nodes[0].name}': no rule for it"


# ---- feeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_free_dimension_has_a_size_of_its_own(count: int) -> None:
    names = tuple(f"d{i}" for i in range(count))
    infos = [
        TensorInfo("x", np.dtype(np.float32), (*names, 4)),
        TensorInfo("y", np.dtype(np.float32), names[:1]),
    ]
    first, second = (probe.free_sizes(infos, draw) for draw in (0, 1))
    assert list(first) == list(second) == list(names)
    assert len(set(zip(first.values(), second.values(), strict=True))) == count
    assert all(first[name] != second[name] for name in names)


@pytest.mark.parametrize("draw", [0, 1])
def test_integers_are_zeros_and_ones(draw: int) -> None:
    graph = parse(f"{IDS} => (float[B,S,4] y) {{ y = Relu(x) }}")
    feeds = probe.binary_feeds(graph, draw)
    assert {name: values.dtype for name, values in feeds.items()} == {
        "ids": np.int64, "weight_mask": np.float32, "flags": np.bool_, "x": np.float32}  # fmt: skip
    for name in ("ids", "weight_mask", "flags"):
        assert set(np.unique(feeds[name])) == {0, 1} and feeds[name][:, 0].all()
    assert len(np.unique(feeds["x"])) == feeds["x"].size
    assert feeds["ids"].shape == ((2, 5), (3, 7))[draw]
    again = probe.binary_feeds(graph, draw)
    assert all((again[name] == values).all() for name, values in feeds.items())


def test_concrete_shapes() -> None:
    assert probe.concrete(["B", 4, "S"], {"B": 2, "S": 5}) == (2, 4, 5)
    assert probe.concrete(["B", None], {"B": 2}) is None
    assert probe.concrete(None, {}) is None


# ---- parts ------------------------------------------------------------------------------------------------

PART = "(float[B,4] x, float[B,4] z) => (float[B,4] y) { a = Neg(x)  b = Relu(a)  y = Add(b, z) }"


def test_a_part_of_the_graph_on_given_values() -> None:
    graph = parse(PART)
    feeds = g.random_feeds(g.inputs(graph))
    found = probe.evaluate(graph, ["b"], feeds)
    np.testing.assert_array_equal(found["b"], np.maximum(-feeds["x"], 0))
    cut = {"b": np.full((2, 4), 7, np.float32), "z": feeds["z"]}
    np.testing.assert_array_equal(probe.evaluate(graph, ["y"], cut, ["b"])["y"], 7 + feeds["z"])
    with pytest.raises(GraphError, match="input 'z' is missing"):
        probe.evaluate(graph, ["y"], {"b": cut["b"]}, ["b"])
