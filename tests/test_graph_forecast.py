"""What a model asks for is known before it runs: bombs are refused in one line, at once, and real models are not."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper
from onnx_text import apply, parse, parse_model

import nmcompile
from nmcompile import ir as g
from nmcompile import probe
from nmcompile.errors import BudgetError, EndlessError, GraphError, NmcompileError
from nmcompile.ir.edit import model_facts
from nmcompile.ir.forecast import by_name, forecast
from nmcompile.passes import FoldConstants

MODELS = Path(__file__).parents[1] / "models"
ROOM = 3 << 30  # bytes that a broken guard may take before the test fails instead of the machine
SECONDS = 8.0  # on a busy machine; they take a few hundredths

# Each in the place of "grow"; its result w is added to the input x.
BOMBS = {
    "range": "w = Range(zero, big, one)",
    "range of computed limits": "m = Mul(thousands, millions)  w = Range(zero, m, one)",
    "tile": "w = Tile(x, bigs)",
    "tile a constant": "w = Tile(ones, bigs)",
    "constant of shape": "w = ConstantOfShape(bigs)",
    "constant of shape of computed size": "f = Cast <to = 1> (million)  t = Sqrt(f)  u = Mul(t, f)  v = Mul(u, f)"
                                          " i = Cast <to = 7> (v)  w = ConstantOfShape(i)",
    "expand": "w = Expand(x, bigs)",
    "expand a constant": "w = Expand(ones, bigs)",
    "pad": "p = Concat <axis = 0> (zeros, bigs)  w = Pad(x, p)",
    "resize by factors": "f = Cast <to = 1> (bigs)  w = Resize <mode = \"nearest\"> (x, , f)",
    "resize to sizes": "w = Resize <mode = \"nearest\"> (x, , , bigs)",
    "one hot": "v = Concat <axis = 0> (ones, ones)  w = OneHot(zeros, big, v)",
    "random": "w = RandomNormal <shape = [8589934592]> ()",
    "window": "w = HannWindow(big)",
    "eye": "s = Concat <axis = 0> (million, million)  e = ConstantOfShape(s)  w = EyeLike(e)",
    "product of a column and a row": "c = Expand(ones, million)  a = Unsqueeze(c, ends)  b = Unsqueeze(c, zeros)"
                                     " w = MatMul(a, b)",
    "sum of a column and a row": "c = Expand(ones, million)  a = Unsqueeze(c, ends)  w = Add(a, c)",
    "gather": "i = Expand(zeros, million)  t = Expand(ones, million)  u = Unsqueeze(t, zeros)  w = Gather(u, i)",
    "doubled": "d0 = Concat <axis = 0> (x, x)  "
               + "  ".join(f"d{i + 1} = Concat <axis = 0> (d{i}, d{i})" for i in range(34)) + "  w = Identity(d34)",
    "padded convolution": "u = Unsqueeze(x, many)  k = Unsqueeze(ones, many)"
                          " w = Conv <pads = [1073741824, 1073741824]> (u, k)",
}  # fmt: skip


def bomb(grow: str) -> onnx.ModelProto:
    model = parse_model(f"(float[1] x) => (float y) {{ {grow}  last = Cast <to = 1> (w)  y = Add(x, last) }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    known = {"zero": 0, "one": 1, "big": 1 << 33, "thousands": 1 << 12, "millions": 1 << 22, "bigs": [1 << 33],
             "zeros": [0], "ends": [-1], "million": [1 << 20], "many": [0, 1]}  # fmt: skip
    for name, value in known.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "ones"))
    return model


def looping(body: str, turns: int | None, end: str = "c = Identity(go)") -> onnx.ModelProto:
    """A Loop over s of at most `turns` turns (None: as long as the body says)."""
    text = f"(int64 i, bool go, float[N] s) => (bool c, float[M] t) {{ {body} {end} }}"
    inner = onnx.parser.parse_graph("body " + text)
    for info in [*inner.input, *inner.output]:
        if info.name in ("s", "t"):
            info.type.tensor_type.ClearField("shape")
    model = bomb("w = Identity(x)")
    loop = helper.make_node("Loop", ["turns" if turns is not None else "", "yes", "x"], ["w"], "loop", body=inner)
    model.graph.node[0].CopyFrom(loop)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(turns or 0, np.int64), "turns"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-5, np.float32), "never"))
    return model


ENDLESS = "q = ReduceSum <keepdims = 0> (t)  e = Equal(q, never)  c = Not(e)"


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Memory is bounded, so that a guard that does not hold costs the test and not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    start = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("grow", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_when_it_is_loaded(grow: str, tmp_path: Path) -> None:
    onnx.save(bomb(grow), tmp_path / "m.onnx")
    with pytest.raises(BudgetError, match=r"node '.*' \(\w+\) makes '.*' of .*: the model asks for") as caught:
        g.load(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value) and str(tmp_path / "m.onnx") in str(caught.value)


@pytest.mark.parametrize("grow", ["w = Expand(x, million)", "w = Range(zero, thousands, one)", "w = Tile(x, million)"])
def test_what_grows_to_a_size_that_is_fine_loads_and_runs(grow: str) -> None:
    graph = g.load(bomb(grow))
    assert g.run(graph, {"x": np.ones(1, np.float32)})["y"].size >= 1 << 12


def test_shapes_of_a_megabyte_are_not_propagated_as_values() -> None:
    graph = g.load(bomb("a = Expand(x, million)  b = Mul(a, x)  c = Mul(b, b)  w = Mul(c, a)"))
    assert model_facts(graph)["propagates"] is False
    assert model_facts(g.load(MODELS / "bert-torchscript.onnx"))["propagates"] is True


def test_a_loop_of_too_many_turns_is_refused() -> None:
    for turns in (1 << 60, 1 << 24):
        with pytest.raises(BudgetError, match="goes round"):
            g.load(looping("t = Add(s, s)", turns))
    assert g.run(g.load(looping("t = Add(s, s)", 10)), {"x": np.ones(1, np.float32)})["y"] == 1025


def test_a_loop_without_an_end_is_stopped() -> None:
    graph = g.load(looping("t = Mul(s, s)", None, ENDLESS))
    with pytest.raises(EndlessError, match="does not end within 2 s"):
        g.run(graph, {"x": np.ones(1, np.float32)})


def test_a_loop_that_takes_all_memory_is_stopped() -> None:
    graph = g.load(looping("t = Concat <axis = 0> (s, s)", None, ENDLESS))
    with pytest.raises(BudgetError, match="takes more than 268 MB"):
        g.run(graph, {"x": np.ones(1, np.float32)})


def test_a_compile_of_a_loop_without_an_end_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NmcompileError, match="does not end within 2 s") as caught:
        nmcompile.compile(looping("t = Mul(s, s)", None, ENDLESS), tmp_path / "m.plan", tuning="off")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_sizes_that_depend_on_what_an_input_holds_are_forecast_for_each_run() -> None:
    model = parse_model("(int64[1] n) => (float[M] y) { y = ConstantOfShape(n) }")
    run = g.runner(g.load(model))
    assert run({"n": np.array([1000])})["y"].shape == (1000,)
    with pytest.raises(BudgetError, match=r"makes 'y' of \[8589934592\]"):
        run({"n": np.array([1 << 33])})
    assert run({"n": np.array([5])})["y"].shape == (5,)


def test_sizes_that_grow_with_the_input_are_forecast_for_each_size() -> None:
    text = "(float[N] x) => (float[M] y) { s = Shape(x)  t = Mul(s, s)  u = Mul(t, t)  y = ConstantOfShape(u) }"
    run = g.runner(parse(text))
    assert run({"x": np.ones(4, np.float32)})["y"].shape == (256,)
    with pytest.raises(BudgetError, match=r"makes 'y' of \[6553600000000\]"):
        run({"x": np.ones(1600, np.float32)})


def test_sizes_that_cannot_be_told_are_not_run() -> None:
    text = """(float[N] x) => (float[M] y) {
        m = ReduceMax <keepdims = 1> (x)  n = Cast <to = 7> (m)  y = ConstantOfShape(n) }"""
    run = g.runner(parse(text))
    assert run({"x": np.array([1, 3], np.float32)})["y"].shape == (3,)  # few values are followed
    with pytest.raises(GraphError, match=r"node '.*' \(ConstantOfShape\): the size .* not known before"):
        run({"x": np.full(1 << 17, 3, np.float32)})


def test_results_without_a_known_size_are_watched_and_run() -> None:
    graph = parse("(float[N] x) => (int64[1,M] y) { y = NonZero(x) }")
    values = np.zeros(1 << 17, np.float32)
    values[7] = 1
    np.testing.assert_array_equal(g.run(graph, {"x": values})["y"], [[7]])


def test_a_branch_that_is_not_taken_does_not_count() -> None:
    def branch(grow: str) -> onnx.GraphProto:
        graph = onnx.parser.parse_graph("b () => (float[M] o) { " + grow + " }")
        graph.output[0].type.tensor_type.ClearField("shape")
        return graph

    model = bomb("w = Identity(x)")
    small, large = branch("o = Tile(x, one_more)"), branch("o = Tile(x, bigs)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one_more"))
    for yes, fine in ((True, True), (False, False)):
        made = onnx.ModelProto.FromString(model.SerializeToString())
        made.graph.node[0].CopyFrom(
            helper.make_node("If", ["yes"], ["w"], "if", then_branch=small, else_branch=large)
        )
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(yes), "yes"))
        if fine:
            assert g.run(g.load(made), {"x": np.ones(1, np.float32)})["y"] == 2
        else:
            with pytest.raises(BudgetError, match="Tile"):
                g.load(made)


def test_large_made_up_inputs_are_refused() -> None:
    for shape in ([1 << 29], [1 << 14, 1 << 14]):
        graph = parse(f"(float{shape} x) => (float{shape} y) {{ y = Relu(x) }}")
        with pytest.raises(GraphError, match="too many to make up"):
            g.random_feeds(g.inputs(graph))


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_the_sizes_of_committed_models_are_forecast_as_they_are(path: Path) -> None:
    """The sum of all results, at two sizes, as they run; nothing is left open but what is not ONNX's own."""
    graph = g.load(path)
    names = [y.name for node in graph.nodes for y in node.outputs if y.name and not isinstance(y, gs.Constant)]
    model, weights = g.weightless(graph)
    for draw in (0, 1):
        infos = g.inputs(graph)
        feeds = g.random_feeds(infos, seed=draw, dims=probe.free_sizes(infos, draw))
        found = forecast(model, weights, feeds, names)
        held = sum(np.asarray(value).nbytes for value in g.run(graph, feeds, names).values())
        assert not found.unknown
        if not any(node.domain == "com.microsoft" for node in graph.nodes) and not list(graph.subgraphs()):
            assert found.peak == held and not found.open


def test_sizes_of_inputs_that_are_not_known_are_those_asked_for() -> None:
    model = parse_model("(float[N,3,0] x, float y) => (float z) { z = Identity(y) }")
    assert by_name(model.graph.input, 2) == {"x": [2, 3, 0], "y": []}


def test_folding_does_not_make_a_model_large() -> None:
    """Many results of a few megabytes each, of nothing: some are folded, the rest stay nodes, with a reason."""
    parts = "  ".join(f"e{i} = Expand(c, size)  y{i} = Add(x, e{i})" for i in range(40))
    outputs = ", ".join(f"float[2097152] y{i}" for i in range(40))
    model = parse_model(f"(float[1] x) => ({outputs}) {{ {parts} }}")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "c"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 21]), "size"))
    graph, report = apply(FoldConstants(), parse("(float[N] x) => (float[N] y) { y = Relu(x) }"))
    assert report.changed == 0
    with pytest.raises(BudgetError):
        g.load(model)  # 40 results kept to the end are 336 MB
    del model.graph.output[24:]
    graph, report = apply(FoldConstants(), g.load(model))
    folded = sum(np.asarray(t.values).nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant))
    assert 0 < folded <= (1 << 26) + 100 and any("not folded, its value takes 8.4 MB" in note for note in report.notes)
