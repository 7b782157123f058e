"""Free names are found without a walk over the graph each time, and are those that a walk would find."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.ir.names import Index

TEXT = """(float[N,4] x) => (float[N,4] y) <float[4,4] w> {
    a = MatMul(x, w)  b = Relu(a)  c = Neg(b)  y = Add(c, a) }"""
STEMS = ("a", "b", "a_1", "new", "w", "c_before", "Relu", "")


def append(graph: gs.Graph, rng: np.random.Generator) -> None:
    stem = STEMS[rng.integers(len(STEMS) - 1)]
    source = [t for node in graph.nodes for t in node.outputs][rng.integers(len(graph.nodes))]
    made = gs.Variable(f"{g.fresh(graph, stem)}_out", np.dtype(np.float32))
    graph.nodes.append(gs.Node("Relu", g.fresh(graph, f"{stem}_node"), {}, [source], [made]))


def rename(graph: gs.Graph, rng: np.random.Generator) -> None:
    node = graph.nodes[rng.integers(len(graph.nodes))]
    node.name = g.fresh(graph, STEMS[rng.integers(len(STEMS))])
    node.outputs[0].name = g.fresh(graph, STEMS[rng.integers(len(STEMS))])


def bind(graph: gs.Graph, rng: np.random.Generator) -> None:
    graph.nodes[0].inputs[1] = gs.Constant(g.fresh(graph, STEMS[rng.integers(len(STEMS))]), np.eye(4, dtype=np.float32))


def waste(graph: gs.Graph, rng: np.random.Generator) -> None:
    g.fresh(graph, STEMS[rng.integers(len(STEMS))])  # a name that nobody takes


def rewire(graph: gs.Graph, rng: np.random.Generator) -> None:
    last = graph.nodes[-1]
    g.cleanup(graph)
    if last.outputs and last in graph.nodes and not g.is_output(graph, last.outputs[0]):
        g.rewire(graph, graph.outputs[0], last.outputs[0])


def drop(graph: gs.Graph, rng: np.random.Generator) -> None:
    node = graph.nodes[-1]
    if not g.consumers(node.outputs[0]) and not g.is_output(graph, node.outputs[0]):
        node.inputs.clear()
        node.outputs.clear()
        del graph.nodes[-1]


def put_first(graph: gs.Graph, rng: np.random.Generator) -> None:
    made = gs.Variable("first_out", np.dtype(np.float32))
    if "first" not in g.names(graph):
        graph.nodes.insert(0, gs.Node("Relu", "first", {}, [graph.inputs[0]], [made]))
        graph.nodes.append(graph.nodes.pop(0))


@pytest.mark.parametrize("seed", range(20))
def test_the_name_is_the_one_that_a_walk_finds(seed: int) -> None:
    rng, graph = np.random.default_rng(seed), parse(TEXT)
    edits = (append, append, rename, bind, waste, rewire, drop, put_first)
    for _ in range(40):
        edits[rng.integers(len(edits))](graph, rng)
        for stem in rng.permutation(STEMS):
            assert g.fresh(graph, str(stem)) == g.unused(g.names(graph), str(stem))


def test_bodies_count() -> None:
    graph = parse("""(float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <then_branch = t () => (float[N,4] a) { a = Relu(x) },
                    else_branch = e () => (float[N,4] b) { b = Neg(x) }> }""")
    assert g.fresh(graph, "a") == "a_1"
    body = graph.nodes[0].attrs["then_branch"]
    body.nodes.append(gs.Node("Relu", "late", {}, [body.outputs[0]], [gs.Variable("late_out")]))
    assert g.fresh(graph, "late") == "late_1"


def test_a_builder_walks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, look = 0, Index._look

    def counted(self: Index) -> None:
        nonlocal looks
        looks += 1
        look(self)

    monkeypatch.setattr(Index, "_look", counted)
    graph = parse(TEXT)
    x = graph.inputs[0]
    b = Builder(graph, "layer")
    for _ in range(50):
        x = b("Add", x, b.scalar(1.0))
    assert looks <= 1
    assert [node.name for node in graph.nodes[-3:]] == ["layer/Add_47", "layer/Add_48", "layer/Add_49"]
    assert len({t.name for t in graph.tensors().values()}) == 5 + 2 * 50 + 1
