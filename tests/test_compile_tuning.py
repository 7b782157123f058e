"""compile(tuning=...), --tuning and --no-tune: what is measured, kept, imported and reported. The times are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from compiled import MODELS, compiled, feeds
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.lower import Lowered, lower
from nmcompile.backends.cpu.pack import DENSE, FLOAT
from nmcompile.backends.cpu.tuning import Choice, read_table
from nmcompile.calibrate import Calibration, open_data
from nmcompile.cli import cli
from nmcompile.passes import InsertQdq
from nmcompile.pipeline import Pipeline
from nmcompile.plan import read_plan
from nmcompile.recipes import canonical_passes

BERT = MODELS / "bert-torchscript.onnx"


class Machine:
    """Made-up times in place of the engine's; counts what was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.slow: dict[str, float] = {}

    def __call__(self, cases: Sequence[measure.Case], **_: object) -> list[float]:
        self.asked += len(cases)
        return [case.inputs * case.outputs * (case.density + 0.01) * self.slow.get(case.kind.format, 1) * 1e-9
                for case in cases]  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(measure, "seconds", made)
    monkeypatch.setattr("nmcompile.compiler.DEFAULT_TUNING", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def compile_(plan: Path, **options: Any) -> nmcompile.Result:
    return nmcompile.compile(BERT, plan, preset="fast", measure=False, sparsity=0.8, **options)


def int8(result: nmcompile.Result) -> list[dict[str, Any]]:
    return [dict(layer) for layer in result.layers if layer["precision"] == "int8"]


def test_each_layer_tells_its_choice_and_the_times_behind_it(machine: Machine, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = compile_(tmp_path / "a.plan", report=report)
    for layer in int8(result):
        times = layer["microseconds"]
        assert layer["chosen_by"] == "measured" and {"dense", layer["kernel"]} <= set(times)
        assert times[layer["kernel"]] == min(times.values()) <= times["dense"]
    assert json.loads(report.read_text())["layers"] == [dict(layer) for layer in result.layers]
    assert machine.asked > 0


def test_times_are_taken_once_per_machine(machine: Machine, tmp_path: Path) -> None:
    first = compile_(tmp_path / "a.plan")
    asked = machine.asked
    second = compile_(tmp_path / "b.plan")
    assert machine.asked == asked and second.layers == first.layers
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_without_tuning_nothing_is_timed_or_kept(machine: Machine, tmp_path: Path) -> None:
    results = [compile_(tmp_path / f"{name}.plan", tuning="off") for name in "ab"]
    assert machine.asked == 0 and not (tmp_path / "cache").exists()
    assert {layer["chosen_by"] for layer in int8(results[0])} == {"cost model"}
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_a_table_is_exported_and_imported(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    measured = compile_(tmp_path / "a.plan", tuning=path)
    assert measured.layers == compile_(tmp_path / "b.plan").layers
    asked = machine.asked
    for cpu, isa in (("the same", "avx2"), ("another", "avxvnni")):  # what is asked for by name is used as it is
        table = replace(read_table(path), cpu=cpu, isa=isa, engine="?")
        table.save(path)
        before = path.read_bytes()
        result = compile_(tmp_path / "c.plan", tuning=path)
        assert f"kernels chosen by {path}, measured on {cpu} ({isa})" in result.notes
        assert result.layers == measured.layers and path.read_bytes() == before
        assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "c.plan").read_bytes()
    assert machine.asked == asked


def test_a_table_of_another_model_leaves_the_rest_to_the_cost_model(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    nmcompile.compile(MODELS / "electra-torchscript.onnx", None, preset="fast", tuning=path)
    result = compile_(tmp_path / "a.plan", tuning=path)
    assert any("has no times for layers of" in note for note in result.notes)
    assert "cost model" in {layer["chosen_by"] for layer in int8(result)}


def test_the_plan_says_nothing_of_times(machine: Machine, tmp_path: Path) -> None:
    """Its bytes follow from the choices, so that the same choices give the same plan."""
    compile_(tmp_path / "a.plan")
    layers = read_plan(tmp_path / "a.plan").header["layers"]
    assert layers and not any({"microseconds", "chosen_by"} & set(layer) for layer in layers)


def test_the_summary_says_that_sparse_layers_run_dense(machine: Machine, tmp_path: Path) -> None:
    machine.slow |= {"blocks": 50.0, "gather": 50.0}
    words = [BERT, "-o", tmp_path / "a.plan", "--preset", "fast", "--no-measure", "--sparsity", "0.8"]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert "12 x int8, kernel dense, pattern 2x4, density 19.9%; dense is faster here" in result.stdout
    assert "(by the cost model)" not in result.stdout


# ---- the command line --------------------------------------------------------------------------------------------


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(BERT), "--preset", "fast", "--no-measure", *map(str, words)])


def test_options_of_the_command(machine: Machine, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert run("-o", tmp_path / "a.plan", "--no-tune").exit_code == 0 and machine.asked == 0
    assert run("-o", tmp_path / "b.plan", "--tuning", table).exit_code == 0 and machine.asked > 0
    assert read_table(table).entries
    both = run("-o", tmp_path / "c.plan", "--tuning", table, "--no-tune")
    assert both.exit_code == 2 and "give either --tuning or --no-tune" in both.stderr


def test_a_recipe_may_switch_tuning_off(machine: Machine, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('no-tune = true\nattention = "float"\n')
    assert run("-o", tmp_path / "a.plan", "--recipe", recipe).exit_code == 0 and machine.asked == 0
    assert "insert-qdq(attention=float" in " ".join(read_plan(tmp_path / "a.plan").header["passes"])


@pytest.mark.parametrize("content", ["{", '{"version": 7}', "\x00"])
def test_a_damaged_table_is_one_line_and_leaves_nothing(content: str, machine: Machine, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(content)
    result = run("-o", tmp_path / "a.plan", "--tuning", table)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "table.json" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("name", ["no/such/folder/table.json", "."])
def test_a_table_that_cannot_be_written_is_refused_early(name: str, machine: Machine, tmp_path: Path) -> None:
    result = run("-o", tmp_path / "a.plan", "--tuning", tmp_path / name)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert machine.asked == 0 and not list(tmp_path.iterdir())


# ---- float where INT8 does not pay -------------------------------------------------------------------------------


def quantized_heads(name: str) -> Any:
    """A committed model whose pooler and head are quantized too."""
    graph = g.load(MODELS / f"{name}.onnx")
    data = Calibration(open_data(None, g.inputs(graph), max_length=16, limit=8))
    return Pipeline([*canonical_passes(), InsertQdq(heads=True)], calibration=data).run(graph)[0]


def heads_in_float(weight: np.ndarray, float_too: bool = False, quantizes: bool = False) -> Choice:
    return Choice(FLOAT if float_too and len(weight) <= 3 else DENSE, 1.0)


def steps(lowered: Lowered) -> list[str]:
    segments: Any = lowered.header["segments"]
    return [step["step"] for segment in segments for step in segment["steps"]]


def test_layers_that_read_and_write_floats_may_run_in_float() -> None:
    graph = quantized_heads("bert-classifier")
    g.infer_shapes(graph)
    offered = []

    def choose(weight: np.ndarray, float_too: bool = False, quantizes: bool = False) -> Choice:
        offered.append((weight.shape, float_too, quantizes))
        return Choice(FLOAT if float_too and len(offered) <= 2 else DENSE, 1.0)

    plain, found = steps(lower(graph)), steps(lower(graph, choose))
    floats = offered[:2]
    assert [item[:2] for item in floats] == [((3, 64), True), ((64, 64), True)]  # the head, then the pooler before it
    assert found.count("linear_float") == 2 and plain.count("linear_float") == 0
    saved = plain.count("quantize") - found.count("quantize")
    assert saved == sum(item[2] for item in floats) == 1  # of the pooler's input; the pooler itself wrote bytes


def test_such_a_plan_gives_what_its_graph_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized_heads("bert-classifier")
    reference = g.runner(graph)
    monkeypatch.setattr("nmcompile.targets.by_cost_model", heads_in_float)
    result = nmcompile.compile(graph, tmp_path / "a.plan", measure=False, tuning="off")
    session = nmcompile.load(tmp_path / "a.plan")
    assert [layer["precision"] for layer in result.layers if layer["outputs"] <= 3] == ["float32"]
    for batch in feeds(compiled("bert-classifier").source, shapes=((2, 9),)):
        expected, found = reference(batch), session.run(batch)
        for output, values in expected.items():
            assert np.abs(found[output] - values).max() < 0.05 * np.abs(values).max(), output


def test_a_layer_between_bytes_stays_int8() -> None:
    """Its input and its result would have to be written in float as well."""
    graph = parse("""(float[batch,tokens,16] x) => (float[batch,tokens,16] y, float[batch,tokens,16] z)
        <float[16,16] w1, float[16,16] w2, float[16,16] w3> {
        a = MatMul(x, w1)  b = Relu(a)  y = MatMul(b, w2)  z = MatMul(b, w3) }""")
    data = Calibration(open_data(None, g.inputs(graph), max_length=16, limit=8))
    quantized = Pipeline([InsertQdq(heads=True)], calibration=data).run(graph)[0]
    g.infer_shapes(quantized)
    found = lower(quantized, lambda _, float_too, __: Choice(FLOAT if float_too else DENSE, 1.0))
    assert [layer["precision"] for layer in found.layers] == ["int8", "int8", "int8"]
