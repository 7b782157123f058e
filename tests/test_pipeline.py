"""pipeline, spec and observers: what goes on around passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_text import apply, parse

from nmcompile import ir as g
from nmcompile import spec as specs
from nmcompile.calibrate import Calibration
from nmcompile.canonical import check_canonical
from nmcompile.errors import GraphError, NmcompileError, PassError
from nmcompile.observers import Timing, dump_text
from nmcompile.passes import CanonicaliseLinear, InsertQdq, MagnitudePrune, PermuteFeatures, SmoothActivations
from nmcompile.pipeline import Context, Pass, Pipeline, Report, parse_spec, spec
from nmcompile.verification import difference

TEXT = """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] b1, float[8,3] w2> {
    h = MatMul(x, w1)  a = Add(h, b1)  r = Relu(a)  y = MatMul(r, w2) }"""


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """W -> factor * W in every linear layer."""

    preserves: ClassVar[bool] = True
    factor: float = 1.0
    layers: tuple[str, ...] = ()

    def run(self, graph: gs.Graph, context: Context) -> Report:
        chosen = [layer for layer in g.linear_layers(graph) if not self.layers or layer.name in self.layers]
        for layer in chosen:
            g.set_weight(graph, layer, layer.weight * self.factor)
        return Report(changed=len(chosen), detail={"factor": self.factor}, notes=("scaled",))


@dataclass(frozen=True)
class Break(Pass):
    """Whatever `how` says."""

    preserves: ClassVar[bool] = True
    how: str = "order"

    def run(self, graph: gs.Graph, context: Context) -> Report:
        if self.how == "order":
            graph.nodes[:] = graph.nodes[::-1]
        elif self.how == "mend":
            raise GraphError("break: node 'x' is odd;\nmend it")
        elif self.how == "bug":
            raise ZeroDivisionError("our bug")
        elif self.how == "inputs":
            graph.inputs.append(gs.Variable("more", np.dtype(np.float32), [1]))
        elif self.how == "run":
            graph.nodes[2].op = "NoSuchOperator"
        elif self.how == "shape":
            graph.nodes[2].op, graph.nodes[2].attrs["axis"] = "Flatten", 0
        return Report(changed=1)


@dataclass(frozen=True)
class Ranges(Pass):
    """Reads the ranges of what the layers read."""

    wanted: bool = True

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        return {layer.x.name: ("range",) for layer in g.linear_layers(graph)} if self.wanted else {}

    def run(self, graph: gs.Graph, context: Context) -> Report:
        return Report(detail={"statistics": context.gathered})


class Collected(Calibration):
    def __init__(self) -> None:
        pass

    def collect(self, graph: gs.Graph, needs: Mapping[str, Sequence[str]]) -> Any:
        return dict(needs)


# ---- the pipeline -------------------------------------------------------------------------------------------


def test_passes_run_in_order_on_a_copy() -> None:
    graph = parse(TEXT)
    changed, report = apply(ScaleWeights(factor=2.0), graph)
    assert report == Report(2, {"factor": 2.0}, ("scaled",))
    np.testing.assert_allclose(g.linear_layers(changed)[0].weight, 2 * g.linear_layers(graph)[0].weight)
    seen: list[tuple[str, int]] = []
    _, reports = Pipeline(
        [ScaleWeights(), ScaleWeights(layers=("nobody",))],
        observers=[lambda pass_, graph, report, seconds: seen.append((spec(pass_), report.changed))],
    ).run(graph)
    assert seen == [("scale-weights", 2), ("scale-weights(layers=nobody)", 0)]
    assert [item.changed for item in reports] == [2, 0]


def test_observers_write_text_and_keep_times(tmp_path: Path) -> None:
    timing = Timing()
    Pipeline([ScaleWeights(), ScaleWeights(factor=3.0)], observers=[timing, dump_text(tmp_path / "new")]).run(
        parse(TEXT)
    )
    names = sorted(item.name for item in (tmp_path / "new").iterdir())
    assert names == ["01-scale-weights.txt", "02-scale-weights.txt"]
    text = (tmp_path / "new" / names[1]).read_text()
    assert text.startswith("scale-weights(factor=3.0): 2 changed\n\nopset 20\n")
    assert [row[:2] for row in timing.rows] == [("scale-weights", 2), ("scale-weights(factor=3.0)", 2)]
    assert str(timing).count("\n") == 1
    (tmp_path / "file").touch()
    with pytest.raises(NmcompileError, match="cannot be written"):
        Pipeline([ScaleWeights()], observers=[dump_text(tmp_path / "file")]).run(parse(TEXT))


def test_errors_name_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError) as caught:
        Pipeline([ScaleWeights(factor=0.5), ScaleWeights(), Break(how="mend")]).run(parse(TEXT))
    assert str(caught.value) == (
        "break(how=mend): node 'x' is odd; mend it (after scale-weights(factor=0.5), scale-weights)"
    )
    with pytest.raises(PassError, match=r"^break: node '.*' \(MatMul\): input .* \(after scale-weights\)$"):
        Pipeline([ScaleWeights(), Break()]).run(parse(TEXT))
    with pytest.raises(ZeroDivisionError) as bug:
        Pipeline([ScaleWeights(), Break(how="bug")]).run(parse(TEXT))
    assert bug.value.__notes__ == ["in pass break(how=bug) (after scale-weights)"]


def test_calibrated_passes_get_their_statistics() -> None:
    _, (report,) = Pipeline([Ranges()], calibration=Collected()).run(parse(TEXT))
    assert report.detail["statistics"] == {"x": ("range",), "r": ("range",)}
    _, (report,) = Pipeline([Ranges(wanted=False)]).run(parse(TEXT))
    assert report.detail["statistics"] is None
    with pytest.raises(PassError, match=r"^ranges: needs calibration data; give"):
        Pipeline([Ranges()]).run(parse(TEXT))


GEMM = """(float[N,4] x) => (float[N,8] y) <float[8,4] w, float[8] b> { y = Gemm <transB = 1> (x, w, b) }"""


@pytest.mark.parametrize("pass_", [InsertQdq(), MagnitudePrune(), SmoothActivations(), PermuteFeatures()],
                         ids=lambda pass_: pass_.name)  # fmt: skip
def test_a_graph_that_is_not_canonical_is_refused(pass_: Pass) -> None:
    """Its layers would not be found, and nothing be done in silence."""
    graph = parse(GEMM)
    name = graph.nodes[0].name
    with pytest.raises(PassError) as caught:
        Pipeline([pass_], calibration=Collected()).run(graph)
    assert str(caught.value) == (
        f"{spec(pass_)}: node '{name}' is a Gemm, so the graph is not in canonical form; "
        "run the canonical passes first (canonicalise-linear among them)"
    )
    check_canonical(Pipeline([CanonicaliseLinear()]).run(graph)[0])


@pytest.mark.parametrize("text", [
    "(float[4,N] x) => (float[N,8] y) <float[4,8] w> { y = Gemm <transA = 1> (x, w) }",
    "(float[N,4] x, float[4,8] w) => (float[N,8] y) { y = Gemm(x, w) }",
    "(float[N,4] x) => (float[N,8] y) <float[4,8] w, float[3,8] b> { y = Gemm(x, w, b) }",
])  # fmt: skip
def test_a_gemm_that_stays_one_is_canonical(text: str) -> None:
    graph, (report,) = Pipeline([CanonicaliseLinear()]).run(parse(text))
    assert report.changed == 0 and len(report.notes) == 1 and "Gemm kept, its" in report.notes[0]
    check_canonical(graph)


@pytest.mark.parametrize("parameters", ["graph", "graph, statistics=None", "graph, calibration=None", "graph, x, y",
                                        "graph, *, context"])  # fmt: skip
def test_passes_of_an_older_contract_are_told_what_run_takes(parameters: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def run(self, {parameters}): return None", space)
    kind: Any = type("ScaleRows", (Pass,), {"run": space["run"]})
    old = dataclass(frozen=True)(kind)()
    seen: list[str] = []
    with pytest.raises(PassError, match=r"^scale-rows: its run\(graph.*\) is of an older contract; write") as caught:
        Pipeline([ScaleWeights(), old], observers=[lambda pass_, *_: seen.append(pass_.name)]).run(parse(TEXT))
    assert "\n" not in str(caught.value) and not seen  # before any pass has run


@pytest.mark.parametrize("parameters", ["graph, context", "graph, ctx, more=1", "*arguments"])
def test_what_a_context_is_called_does_not_matter(parameters: str) -> None:
    space: dict[str, Any] = {"Report": Report}
    exec(f"def run(self, {parameters}): return Report(3)", space)
    kind: Any = type("ScaleRows", (Pass,), {"run": space["run"]})
    odd = dataclass(frozen=True)(kind)()
    assert Pipeline([odd]).run(parse(TEXT))[1] == (Report(3),)


# ---- verify -------------------------------------------------------------------------------------------------


def test_verifying_lets_small_differences_pass() -> None:
    Pipeline([ScaleWeights(factor=1.0001), ScaleWeights()], verify=True).run(parse(TEXT))


def test_verifying_names_the_first_node_that_differs() -> None:
    second = g.linear_layers(parse(TEXT))[1].name
    for layers, place in (((), r"node '.*' \(MatMul\): 'h' differs in 16 of 16 values"),
                          ((second,), r"node '.*' \(MatMul\): 'y' differs in 6 of 6 values")):  # fmt: skip
        with pytest.raises(PassError, match=place) as caught:
            Pipeline([ScaleWeights(), ScaleWeights(factor=1.1, layers=layers)], verify=True).run(parse(TEXT))
        assert str(caught.value).startswith("scale-weights(factor=1.1") and "(after scale-weights)" in str(caught.value)
    Pipeline([ScaleWeights(factor=1.1)]).run(parse(TEXT))  # not verified


@pytest.mark.parametrize(("how", "message"), [
    ("inputs", "changes the graph's inputs"),
    ("run", "the graph after it does not run: .*NoSuchOperator"),
    ("shape", "does not run|has shape"),
])  # fmt: skip
def test_verifying_finds(how: str, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        Pipeline([Break(how=how)], verify=True).run(parse(TEXT))
    assert "\n" not in str(caught.value)


def test_differences() -> None:
    a = np.array([1.0, -100.0, np.inf, np.nan], np.float32)
    assert difference(a, a + np.float32(1e-3)) == ""
    assert difference(a, np.array([1.5, -100, np.inf, np.nan], np.float32)).startswith("differs in 1 of 4 values")
    assert "1 of 4" in difference(a, np.array([1, -100, np.inf, 0], np.float32))
    assert "1 of 4" in difference(a, np.array([1, -100, -np.inf, np.nan], np.float32))
    assert difference(np.zeros(3), np.full(3, 1e-5)) == ""
    assert difference(np.zeros(3), np.zeros(4)) == "has shape [4] instead of [3]"
    assert difference(np.zeros(3), np.zeros(3, np.float32)) == "has type float32 instead of float64"
    assert difference(np.array([1, 2]), np.array([1, 3])).startswith("differs in 1 of 2")


# ---- spec strings -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(Pass):
    """Every type an option may have."""

    share: float = 0.5
    count: int = 1
    block: str = "2x4"
    exact: bool = False
    limit: int | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needy(Pass):
    """An option without a default."""

    size: int


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "BUILTIN", (ScaleWeights, Options, Needy))
    monkeypatch.setattr(specs, "entry_points", lambda group: [])


@pytest.mark.parametrize(("text", "pass_"), [
    ("options", Options()),
    ("options(share=0.9, count=3, block=1x4, exact=true)", Options(0.9, 3, "1x4", True)),
    ("options(share=1e-05, limit=4, names=a*|/l.[0-3]/b)", Options(share=1e-5, limit=4, names=("a*", "/l.[0-3]/b"))),
    ('options(block="a, (b)|c", names="x y"|none|"none")', Options(block="a, (b)|c", names=("x y", "none", "none"))),
    ("needy(size=-3)", Needy(-3)),
])  # fmt: skip
def test_specs_are_read(text: str, pass_: Pass) -> None:
    assert parse_spec(text) == [pass_]
    assert parse_spec(spec(pass_)) == [pass_]


def test_lists_of_specs() -> None:
    assert parse_spec("") == [] and parse_spec("  ") == []
    assert parse_spec(" options ( share = 1 ) ,needy(size=2),scale-weights, ") == [
        Options(1.0),
        Needy(2),
        ScaleWeights(),
    ]
    assert spec(Options(exact=True, share=0.9)) == "options(share=0.9, exact=true)"


@given(st.builds(Options, st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text(), st.booleans(),
                 st.none() | st.integers(), st.lists(st.text()).map(tuple)))  # fmt: skip
def test_specs_are_read_back(pass_: Options) -> None:
    assert parse_spec(f"{spec(pass_)}, {spec(pass_)}") == [pass_, pass_]


@pytest.mark.parametrize(("text", "message"), [
    ("option", "there is no pass 'option'; did you mean 'options'?"),
    ("zzzz", "there is no pass 'zzzz'; known are needy, options, scale-weights"),
    ("options(shre=1)", "options has no option 'shre'; did you mean 'share'?"),
    ("needy", "needy needs the option 'size'"),
    ("options(share=much)", "options(share=...): 'much' is not a number"),
    ("options(share=nan)", "'nan' is not a number"),
    ("options(count=1.5)", "'1.5' is not a whole number"),
    ("options(exact=yes)", "'yes' is not true or false"),
    ("options(count=1|2)", "one value is wanted, not 2"),
    ("options(share=1, share=2)", "option 'share' is given twice"),
    ("options(share=1", "the bracket is not closed"),
    ("options(share)", "'share)' is not option=value"),
    ("options(share=)", "')' is not a value"),
    ("options options", "a comma is missing before 'options'"),
    ("(x)", "'(x)' is not the name of a pass"),
    ('options(block="\\q")', "is not a quoted text"),
])  # fmt: skip
def test_specs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_spec(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_passes_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_package:Pass", specs.GROUP)
    monkeypatch.setattr(specs, "entry_points", lambda group: [SimpleNamespace(load=lambda: Break)])
    assert parse_spec("break(how=bug)") == [Break("bug")]
    monkeypatch.setattr(specs, "entry_points", lambda group: [broken])
    assert parse_spec("options") == [Options()]
    with pytest.raises(PassError, match="'no_such_package:Pass' cannot be imported"):
        parse_spec("other")


def test_names_are_made_of_class_names() -> None:
    class FuseGelu(Pass): ...

    class NMPrune(Pass):
        name: ClassVar[str] = "n-m-prune"

    assert (FuseGelu.name, NMPrune.name) == ("fuse-gelu", "n-m-prune")
