"""From every committed model to a plan: the same outputs as its Q/DQ graph, on every ISA, at any thread count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from compiled import FAMILIES, MODELS, NAMES, NATIVE, compiled, feeds

import nmcompile
from nmcompile import _native
from nmcompile import ir as g
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.compare import Comparison, real_tokens
from nmcompile.pipeline import Pipeline
from nmcompile.plan import read_plan
from nmcompile.recipes import canonical_passes

# The bound between a plan and the Q/DQ graph it was lowered from, per output over ragged batches. The engine rounds the
# softmax's shares to 8 bits, which the graph does not; everything else is the same integer arithmetic.
LEAST_COSINE = 0.998
LEAST_SQNR = 25.0  # dB

ISAS = _native.available_isas()


def marked(names: list[str]) -> list[Any]:
    """Names as parameters, those of the job for emulated CPUs marked so."""
    return [pytest.param(name, marks=pytest.mark.emulated if name in FAMILIES else ()) for name in names]


@pytest.mark.parametrize("name", marked(NAMES))
def test_plan_agrees_with_its_qdq_graph(name: str) -> None:
    made = compiled(name)
    graph = g.load(made.qdq)
    reference, session = g.runner(graph), nmcompile.load(made.plan)
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(made.source):
        comparison.add(reference(batch), session.run(batch), real_tokens(batch))
    found = comparison.differences()
    assert set(found) == {info.name for info in g.outputs(graph)}
    for output, difference in found.items():
        assert difference.sqnr > LEAST_SQNR, (output, difference)
        assert not difference.cosine < LEAST_COSINE, (output, difference)


@pytest.mark.parametrize("name", NATIVE)
def test_known_architectures_are_one_native_segment(name: str) -> None:
    assert compiled(name).result.native, compiled(name).result.notes


@pytest.mark.parametrize("name", marked(NATIVE))
def test_bits_do_not_depend_on_threads_or_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(name)
    expected: list[dict[str, np.ndarray]] | None = None
    for isa in ISAS:
        monkeypatch.setenv("NMCOMPILE_ISA", isa)
        for threads in (1, 2):
            session = nmcompile.load(made.plan, threads=threads)
            assert session.isa == isa and session.threads == threads
            found = [session.run(batch) for batch in feeds(made.source)]
            if expected is None:
                expected = found
            for one, other in zip(expected, found, strict=True):
                for output, values in one.items():
                    np.testing.assert_array_equal(values, other[output], err_msg=f"{isa}, {threads} threads, {output}")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in NATIVE])
def test_layers_of_a_plan_name_their_weights_in_the_file(name: str) -> None:
    made = compiled(name)
    held = {t.name for t in onnx.load(made.source).graph.initializer}
    with read_plan(made.plan) as plan:
        keys = [layer["weight"] for layer in plan.header["layers"]]
    graph, _ = Pipeline(canonical_passes()).run(g.load(made.source))
    assert keys and len(set(keys)) == len(keys) and set(keys) <= set(g.layer_keys(graph).values())
    assert all(key.partition("[")[0].partition("@")[0] in held for key in keys)


@pytest.mark.parametrize("pattern", ["2x4", "1x4", "4x1", "16x4", "3x5", "2:4", "unstructured"])
def test_pruned_plans_agree_with_their_qdq_graph(pattern: str) -> None:
    options = {} if ":" in pattern else {"sparsity": 0.7}
    made = compiled("bert-torchscript", pattern=pattern, **options)
    reference, session = g.runner(g.load(made.qdq)), nmcompile.load(made.plan)
    comparison = Comparison()
    for batch in feeds(made.source):
        comparison.add(reference(batch), session.run(batch), real_tokens(batch))
    assert comparison.differences()["last_hidden_state"].sqnr > LEAST_SQNR
    pruned = [layer for layer in made.result.layers if layer["precision"] == "int8"]
    assert pruned and all(layer["density"] <= (0.5 if ":" in pattern else 0.45) for layer in pruned)


@pytest.mark.parametrize("name", NAMES)
def test_the_qdq_graph_is_valid_onnx(name: str) -> None:
    onnx.checker.check_model(str(compiled(name).qdq), full_check=True)


@pytest.mark.parametrize(("name", "target"), [
    *(pytest.param(*item.values, "cpu", marks=item.marks) for item in marked(NAMES)),
    *(pytest.param(name, "tensorrt", marks=pytest.mark.emulated if name == FAMILIES[0] else ()) for name in NAMES),
])  # fmt: skip
def test_onnxruntime_runs_the_qdq_graph_with_all_its_optimizations(name: str, target: str, tmp_path: Path) -> None:
    made = compiled(name)
    path = made.qdq
    if target == "tensorrt":
        path = tmp_path / "qdq.onnx"
        nmcompile.compile(made.source, None, preset="fast", target=target, emit_onnx=path, solver="magnitude",
                          calibration=list(feeds(made.source)), engine=EngineOptions(version="8.6"))  # fmt: skip
    graph = g.load(path)
    plain, optimized = g.runner(graph), g.runner(graph, optimise=True)
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(made.source, ((2, 9),)):
        comparison.add(plain(batch), optimized(batch), real_tokens(batch))
    assert all(difference.sqnr > LEAST_SQNR for difference in comparison.differences().values())


def test_the_qdq_graph_is_close_to_the_float_model() -> None:
    made = compiled("bert-torchscript")
    source, graph = g.runner(g.load(made.source)), g.runner(g.load(made.qdq))
    comparison = Comparison()
    for batch in feeds(made.source):
        comparison.add(source(batch), graph(batch), real_tokens(batch))
    assert comparison.differences()["last_hidden_state"].cosine > 0.995


def test_padding_rows_are_zero_and_do_not_change_the_others() -> None:
    made = compiled("bert-torchscript")
    session = nmcompile.load(made.plan)
    ids = np.arange(5, 17, dtype=np.int64).reshape(2, 6)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.int64)
    types = np.zeros_like(ids)
    both = session.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["last_hidden_state"]
    alone = session.run({"input_ids": ids[1:, :3], "attention_mask": mask[1:, :3], "token_type_ids": types[1:, :3]})
    assert not both[1, 3:].any()
    np.testing.assert_array_equal(both[1, :3], alone["last_hidden_state"][0])


def test_the_same_model_gives_the_same_bytes(tmp_path: object) -> None:
    made = compiled("distilbert-dynamo")
    again = made.plan.with_name("again.plan")
    nmcompile.compile(made.source, again, preset="fast", measure=False)
    assert again.read_bytes() == made.plan.read_bytes()


def test_without_native_code_everything_still_runs() -> None:
    for name in ("cnn", "lstm", "control-flow"):
        kinds = [segment["kind"] for segment in compiled(name).result.segments]
        assert kinds == ["onnxruntime"], name
    mixed = {segment["kind"] for segment in compiled("t5-torchscript").result.segments}
    assert mixed == {"native", "onnxruntime"}


def test_require_native_names_what_fell_out() -> None:
    with pytest.raises(nmcompile.NmcompileError, match=r"not one native segment: /0/Conv"):
        nmcompile.compile(MODELS / "cnn.onnx", None, preset="fast", require="native")


def test_a_result_that_reads_padding_is_not_made_without_it(tmp_path: Path) -> None:
    """A mean over all positions, padding too: the engine does not compute padding and must leave the attention."""
    graph = g.load(MODELS / "bert-torchscript.onnx")
    hidden = next(t for t in graph.outputs if t.name == "last_hidden_state")
    mean = gs.Variable("mean", np.dtype(np.float32), ["batch", 64])
    axes = gs.Constant("mean_axes", np.array([1], np.int64))
    graph.opset = 18
    graph.nodes.append(gs.Node("ReduceMean", "mean", {"keepdims": 0}, [hidden, axes], [mean]))
    graph.outputs = [mean]
    plan = tmp_path / "mean.plan"
    result = nmcompile.compile(graph, plan, preset="fast", measure=False)
    assert any("may read padding, which the engine does not compute, at ReduceMean 'mean'" in n for n in result.notes)
    reference, session = g.runner(graph), nmcompile.load(plan)
    comparison = Comparison(g.outputs(graph))
    for batch in feeds(MODELS / "bert-torchscript.onnx"):
        comparison.add(reference(batch), session.run(batch))
    assert comparison.differences()["mean"].cosine > 0.995
