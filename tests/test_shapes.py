"""Shapes are inferred and derived once per revision of a graph, and again whenever that could tell otherwise."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile import shapes
from nmcompile.contract import DERIVATION, SHAPES, Context, Pass, Report
from nmcompile.derive import Derivation
from nmcompile.errors import PassError
from nmcompile.pipeline import Pipeline
from nmcompile.shapes import Shapes
from nmcompile.symbolic import Index, Size, poly

TEXT = """(float[N,4] x) => (int64[2] y) <float[4,256] w, int64[2] to, int64[256] table> {
    h = MatMul(x, w)  r = Relu(h)  f = Cast <to = 1> (table)  a = Add(r, f)  z = Reshape(a, to)  y = Shape(z) }"""


@pytest.fixture
def counts(graph: gs.Graph, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a graph was inferred and derived."""
    found = {"inferred": 0, "derived": 0}
    infer, derive = g.infer_shapes, Derivation

    def inferred(graph: gs.Graph) -> None:
        found["inferred"] += 1
        infer(graph)

    def derived(graph: gs.Graph) -> Derivation:
        found["derived"] += 1
        return derive(graph)

    monkeypatch.setattr(g, "infer_shapes", inferred)
    monkeypatch.setattr(shapes, "Derivation", derived)
    return found


@pytest.fixture
def graph() -> gs.Graph:
    """Reshape gives [N, 256]; the table counts up."""
    graph = parse(TEXT)
    constants = {t.name: t for t in graph.tensors().values() if isinstance(t, gs.Constant)}
    constants["to"].values = np.array([0, 256])
    constants["table"].values = np.arange(256)
    return graph


def tensor(graph: gs.Graph, name: str) -> gs.Tensor:
    return graph.tensors()[name]


def element(found: Derivation, graph: gs.Graph, name: str) -> str:
    (size,) = found.value(tensor(graph, name)).shape
    return str(found.element(tensor(graph, name), (poly(Index("i", size)),)))


def test_a_graph_that_nobody_changes_is_derived_once(graph: gs.Graph, counts: dict[str, int]) -> None:
    known = Shapes()
    known.infer(graph)
    known.infer(graph)
    first = known.derive(graph)
    assert counts == {"inferred": 1, "derived": 1}
    assert known.derive(graph) is first and known.read(graph) is first
    assert counts == {"inferred": 1, "derived": 1}
    assert first.shape(tensor(graph, "z")) == (poly(Size("N")), poly(256))


def test_weights_that_are_set_cost_nothing(graph: gs.Graph, counts: dict[str, int]) -> None:
    known = Shapes()
    first = known.derive(graph)
    (layer,) = g.linear_layers(graph)
    g.set_weight(graph, layer, np.ones((256, 4), np.float32))
    assert known.derive(graph) is first and counts == {"inferred": 1, "derived": 1}
    # elements that were not asked for before are those of now
    assert first.element(tensor(graph, "w"), (poly(1), poly(2))) == poly(1)


def write_into_the_target(graph: gs.Graph) -> None:
    tensor(graph, "to").values[:] = (128, -1)


def write_into_the_table(graph: gs.Graph) -> None:
    tensor(graph, "table").values[7] = 0


def bind_another_table(graph: gs.Graph) -> None:
    tensor(graph, "table").values = np.zeros(256, np.int64)


def replace_the_table(graph: gs.Graph) -> None:
    node = next(node for node in graph.nodes if node.op == "Cast")
    node.inputs[0] = gs.Constant("table", np.arange(256) + 3)


def change_an_attribute(graph: gs.Graph) -> None:
    next(node for node in graph.nodes if node.op == "Cast").attrs["to"] = 7


def change_an_operator(graph: gs.Graph) -> None:
    next(node for node in graph.nodes if node.op == "Relu").op = "Size"


def rename_a_size(graph: gs.Graph) -> None:
    graph.inputs[0].shape = ["M", 4]


def forget_a_shape(graph: gs.Graph) -> None:
    tensor(graph, "h").shape = None


def swap_an_input(graph: gs.Graph) -> None:
    other = gs.Variable("x", np.dtype(np.float32), ["N", 4])
    graph.nodes[0].inputs[0] = other
    graph.inputs[0] = other


CHANGES = (write_into_the_target, write_into_the_table, bind_another_table, replace_the_table, change_an_attribute,
           change_an_operator, rename_a_size, forget_a_shape, swap_an_input)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: Callable[[gs.Graph], None], graph: gs.Graph) -> None:
    known = Shapes()
    before = known.derive(graph)
    assert element(before, graph, "f") == "i"  # the table has been read
    change(graph)
    other = g.copy(graph)
    found, fresh = known.derive(graph), Shapes().derive(other)
    assert (found is before) == (change is forget_a_shape)  # which inference finds again
    assert g.to_text(graph) == g.to_text(other)
    assert element(found, graph, "f") == element(fresh, graph, "f")
    assert all(given is own for given, own in zip(found.inputs.values(), graph.inputs, strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_inferred_again(change: Callable[[gs.Graph], None], graph: gs.Graph) -> None:
    known = Shapes()
    known.infer(graph)
    change(graph)
    other = g.copy(graph)
    known.infer(graph)
    g.infer_shapes(other)
    assert g.to_text(graph) == g.to_text(other)


def test_a_copy_is_another_graph(graph: gs.Graph, counts: dict[str, int]) -> None:
    known = Shapes()
    known.derive(graph)
    again = g.copy(graph)
    assert known.derive(again).inputs["x"] is again.inputs[0] and counts["derived"] == 2


def test_bodies_of_loops_count(counts: dict[str, int]) -> None:
    graph = parse("""(float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <then_branch = t () => (float[N,4] a) { a = Relu(x) },
                    else_branch = e () => (float[N,4] b) { b = Neg(x) }> }""")
    known = Shapes()
    known.derive(graph)
    known.derive(graph)
    assert counts == {"inferred": 2, "derived": 1}  # once by the reader
    graph.nodes[0].attrs["then_branch"].nodes[0].op = "Abs"
    known.derive(graph)
    assert counts == {"inferred": 3, "derived": 2}


# ---- what passes are given -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look(Pass):
    """Keeps what it saw."""

    requires: ClassVar[tuple[str, ...]] = (SHAPES, DERIVATION)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        return Report(detail={"h": tensor(graph, "h").shape, "z": context.shapes.dims(tensor(graph, "z"))})


@dataclass(frozen=True)
class SetWeights(Pass):
    """W -> 2 W"""

    def run(self, graph: gs.Graph, context: Context) -> Report:
        for layer in g.linear_layers(graph):
            g.set_weight(graph, layer, 2 * layer.weight)
        return Report()


@dataclass(frozen=True)
class Ask(Pass):
    """Asks for a derivation that it does not require."""

    def run(self, graph: gs.Graph, context: Context) -> Report:
        return Report(detail={"shapes": context.shapes})


def test_the_runner_provides_what_is_required(graph: gs.Graph, counts: dict[str, int]) -> None:
    for node in graph.nodes:
        node.outputs[0].shape = None
    _, reports = Pipeline([Look(), SetWeights(), Look()]).run(graph)
    assert reports[0].detail == reports[2].detail == {"h": ["N", 256], "z": ["N", 256]}
    assert counts == {"inferred": 1, "derived": 1}
    with pytest.raises(PassError, match=r"^ask: asks for a derivation without requiring it; add DERIVATION"):
        Pipeline([Ask()]).run(graph)


def test_no_pass_infers_shapes_itself() -> None:
    """Nor does it derive: the context does, and remembers."""
    folder = Path(nmcompile.__file__).parent / "passes"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
            assert name not in ("infer_shapes", "annotate", "Derivation"), f"{file.name}:{node.lineno}"  # type: ignore[attr-defined]
            assert name not in ("infer", "derive") or owner == "context", f"{file.name}: {owner}.{name}"
