"""Profiles: what steps have to do, how times add up, what-ifs, traces, plots, the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from compiled import MODELS, compiled

import nmcompile
from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.pack import Kind
from nmcompile.backends.cpu.session import Session, Span, Trace
from nmcompile.backends.cpu.steps.linear import Linear
from nmcompile.backends.cpu.steps.tokens import Embed
from nmcompile.cli import cli
from nmcompile.cli.profile import inputs
from nmcompile.errors import InputError, PlanError
from nmcompile.profile import Machine, Profile, Row, TimedStep, grouped, kind_of, profile, steps_of, what_if
from nmcompile.profile.chrome import trace_events
from nmcompile.profile.timing import split
from nmcompile.session import load_cpu

BATCH, TOKENS = 3, 33
MACHINE = Machine("avx512vnni", 2, 400e9, 20e9)


@pytest.fixture(scope="module")
def plan() -> Path:
    return compiled("bert-dynamo", sparsity=0.5).plan


@pytest.fixture(scope="module")
def session(plan: Path) -> Session:
    return load_cpu(plan, threads=2)


@pytest.fixture(scope="module")
def feeds(session: Session) -> dict[str, np.ndarray]:
    found = inputs(session, (BATCH, TOKENS))
    found["attention_mask"][1, 20:] = 0
    found["attention_mask"][2, 1:] = 0
    return found


@pytest.fixture(scope="module")
def found(session: Session, feeds: dict[str, np.ndarray]) -> Profile:
    return profile(session, feeds, runs=8)


LENGTHS = np.array([33, 20, 1])


def test_steps_are_named_after_the_models_layers(session: Session, found: Profile) -> None:
    layers = [layer["name"] for layer in session.header["layers"]]
    assert [row.step.layer for row in found.rows if row.step.layer] == layers
    assert [(row.step.kind) for row in found.rows] == [kind for kind, _ in session.trace(inputs_of(session)).steps]
    by_name = {row.step.layer: row for row in found.rows if row.step.linear}
    for layer in session.header["layers"]:
        linear = by_name[layer["name"]].step.linear
        assert linear is not None and (linear.outputs, linear.inputs) == (layer["outputs"], layer["inputs"])


def inputs_of(session: Session) -> dict[str, np.ndarray]:
    return inputs(session, (1, 4))


def test_products_are_those_of_kept_blocks_and_real_tokens(session: Session, found: Profile) -> None:
    assert (found.tokens, found.padded, found.batch) == (LENGTHS.sum(), BATCH * TOKENS, BATCH)
    by_name = {row.step.layer: row for row in found.rows if row.step.linear}
    for layer in session.header["layers"]:
        row = by_name[layer["name"]]
        tokens = BATCH if row.step.geometry == "first" else LENGTHS.sum()
        expected = layer["outputs"] * layer["inputs"] * layer["computed"] * tokens
        assert row.macs == pytest.approx(expected, rel=1e-3) and row.tokens == tokens
    attention = [row for row in found.rows if row.step.kind == "attention"]
    assert {row.macs for row in attention} == {2 * 64 * int((LENGTHS**2).sum())}


def test_causal_attention_and_class_tokens_are_counted() -> None:
    gpt = load_cpu(compiled("gpt2-dynamo").plan, threads=1)
    rows = profile(gpt, inputs(gpt, (2, 5)), runs=1).rows
    assert {row.macs for row in rows if row.step.kind == "attention"} == {2 * 32 * 2 * (5 * 6 // 2)}
    vit = load_cpu(compiled("vit-dynamo").plan, threads=1)
    seen = profile(vit, inputs(vit, (2, None)), runs=1)
    patches = next(row.tokens for row in seen.rows if row.step.kind == "patches") // 2
    assert seen.tokens == seen.padded == 2 * (patches + 1)
    assert {row.macs for row in seen.rows if row.step.kind == "attention"} == {2 * 32 * 2 * (patches + 1) ** 2}
    names = [row.step.layer for row in seen.rows if row.step.layer]
    assert names == ["patches", *(layer["name"] for layer in vit.header["layers"])]


def test_bytes_are_activations_weights_and_rows_of_tables(session: Session, found: Profile) -> None:
    tokens = int(LENGTHS.sum())
    rows = {row.step.kind: row for row in reversed(found.rows)}
    embed, layer = rows["embed"].step.declared, rows["linear"].step.declared
    assert isinstance(embed, Embed) and isinstance(layer, Linear)
    tables = [table.of(session.plan.arrays) for table in embed.tables]
    looked_up = sum(min(tokens * table.itemsize * 64, table.nbytes) for table in tables)
    assert rows["embed"].bytes == looked_up + tokens * 64 * 4
    assert rows["attention"].bytes == 4 * 64 * tokens
    assert rows["leave"].bytes == 4 * 64 * (tokens + BATCH * TOKENS)  # padding rows are written too
    linear = rows["linear"]
    arrays = [ref.of(session.plan.arrays).nbytes for ref in layer.weight.arrays()]
    assert linear.bytes == 2 * 64 * tokens + sum(arrays) + 2 * 4 * 64  # with scales and biases


def test_times_add_up_to_the_run(found: Profile) -> None:
    assert sum(row.seconds for row in found.rows) + found.waiting + found.outside == pytest.approx(found.seconds)
    assert all(row.seconds > 0 for row in found.rows) and found.waiting >= 0 and found.outside > 0
    assert found.runs == 8 and 1 <= found.workers <= 2 and found.plain > 0 and found.preempted >= 0


def test_groups_keep_the_sums(found: Profile) -> None:
    groups = grouped(found.rows)
    assert sum(row.count for row in groups) == len(found.rows)
    for value in ("seconds", "macs", "bytes"):
        assert sum(getattr(r, value) for r in groups) == pytest.approx(sum(getattr(r, value) for r in found.rows))
    counts = {row.label: row.count for row in groups}
    assert counts["linear 64 -> 64 2x4 50%"] == 6 and counts["linear 64 -> 64 2x4 50% + residual"] == 2
    assert counts["linear 64 -> 64 float tanh of first tokens"] == 1 and counts["attention 4 heads of 16"] == 2


def test_times_of_threads_are_shared_out() -> None:
    steps = (("a", ""), ("b", ""), ("onnxruntime", "s"))
    native, other = Span(True, 0, 2, (), None), Span(False, 2, 1, (), None)
    events = np.array([[0, 0, 0, 10, 30], [0, 1, 1, 10, 20], [1, 0, 0, 30, 40], [1, 1, 1, 25, 50], [2, 0, -1, 60, 90]])
    waiting, outside, *times = split(Trace(steps, events, (native, other), 100))
    assert times == [15, 17.5, 30] and waiting == 40 - 32.5 and outside == 100 - 40 - 30


def test_what_limits_a_step() -> None:
    def bound(macs: float, moved: float, kind: str = "linear") -> str:
        step = TimedStep(kind, "", in_float=kind == "linear_float")
        return Row(step, "", 1, 1.0, 1, int(macs), int(moved), ()).bound(MACHINE)

    assert bound(300e9, 1e9) == "compute" and bound(100e9, 15e9) == "memory" and bound(0, 30e9) == "cache"
    assert bound(100e9, 1e9) == "overhead" and bound(0, 0, "onnxruntime") == "-"
    assert bound(90e9, 1e9, "linear_float") == "compute"  # of the float peak, a quarter of the int8 one


def test_steps_of_another_engine_are_refused(session: Session) -> None:
    steps = session.trace(inputs_of(session)).steps
    assert len(steps_of(session.header, session.plan.arrays, steps)) == len(steps)
    with pytest.raises(PlanError, match="compile it again"):
        steps_of(session.header, session.plan.arrays, steps[1:])


# ---- what if ----------------------------------------------------------------------------------------------


def by_products(cases: Sequence[measure.Case], **_: object) -> list[float]:
    return [case.outputs * case.inputs * case.density * 1e-9 for case in cases]


def test_what_if_scales_layers_by_the_ratio_of_their_kernels(found: Profile) -> None:
    first, *shapes, every = what_if(found, MACHINE, [0.9], seconds=by_products)
    assert (first.inputs, first.outputs, first.count, first.pattern) == (64, 64, 8, "2x4")
    assert first.then == pytest.approx(first.now * 0.1 / 0.5, rel=0.02)
    assert (every.outputs, every.count) == (0, 12) and len(shapes) == 2
    assert every.now == pytest.approx(sum(item.now for item in (first, *shapes)))
    assert every.model_then == pytest.approx(found.seconds - every.now + every.then)
    assert every.model_now == found.seconds and every.gains


def test_what_if_leaves_alone_what_is_sparse_and_what_would_be_slower(found: Profile) -> None:
    for item in what_if(found, MACHINE, [0.3, 0.5], seconds=by_products):
        assert item.then == item.now and not item.gains
    slower = what_if(found, MACHINE, [0.6], seconds=lambda cases, **_: [2.0 - case.density for case in cases])
    assert all(item.then == item.now and item.gains for item in slower)


def test_patterns_have_kernels() -> None:
    assert kind_of("2x4") == Kind("blocks", 2) and kind_of("16x4") == Kind("blocks", 16)
    for pattern in ("3x4", "2:4", "2x3", "x", "²x4"):
        with pytest.raises(InputError, match="choose one of 1x4, 2x4"):
            kind_of(pattern)


# ---- files ----------------------------------------------------------------------------------------------------


def test_the_trace_is_of_one_run(found: Profile) -> None:
    content = json.loads(json.dumps(trace_events([found, found], ["one", "two"], MACHINE)))
    events = [item for item in content["traceEvents"] if item["ph"] == "X"]
    assert {item["pid"] for item in events} == {0, 1}
    events = [item for item in events if item["pid"] == 0]
    (run,) = [item for item in events if item["tid"] == 0]
    steps = [item for item in events if item["tid"] > 0]
    assert run["ts"] == 0 and run["dur"] == found.trace.nanoseconds / 1e3
    assert all(item["ts"] >= 0 and item["ts"] + item["dur"] <= run["dur"] and item["dur"] >= 0 for item in steps)
    assert {item["args"]["step"] for item in steps} == set(range(len(found.rows)))
    for thread in {item["tid"] for item in steps}:
        own = sorted((item["ts"], item["ts"] + item["dur"]) for item in steps if item["tid"] == thread)
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in pairwise(own))
    table = split(found.trace)[2:] / 1e3
    for index, expected in enumerate(table):
        spent = sum(item["dur"] for item in steps if item["args"]["step"] == index) / found.workers
        assert spent == pytest.approx(expected)
    rows = {item["tid"]: item["args"]["name"] for item in content["traceEvents"]
            if item["name"] == "thread_name" and item["pid"] == 1}  # fmt: skip
    assert rows[0] == "whole run" and rows[1] == "thread 0"


def test_plots_are_pictures(found: Profile) -> None:
    pytest.importorskip("matplotlib")
    from nmcompile.profile.plot import draw

    svg = draw([found], ["1x33"], MACHINE, "svg")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "int8 peak 400 G MAC/s" in text and "linear 64 -&gt; 64 2x4 50% x6" in svg.decode()
    assert svg == draw([found], ["1x33"], MACHINE, "svg")
    assert draw([found, found], ["a", "b"], MACHINE, "png").startswith(b"\x89PNG\r\n\x1a\n")


# ---- the command ----------------------------------------------------------------------------------------------


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, words)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine need not be measured to test what is made of it."""
    monkeypatch.setattr(measure, "int8_peak", lambda **_: 400e9)
    monkeypatch.setattr(measure, "memory_bandwidth", lambda **_: 20e9)


def test_the_command_measures_and_writes_its_files(plan: Path, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "a.json", "--trace": tmp_path / "b.json"}
    words: list[object] = [word for pair in files.items() for word in pair]
    result = invoke(plan, "--shape", "2x16", "--shape", "1x5", "--runs", 3, "--threads", 1, "--what-if", 0.9, *words)
    assert result.exit_code == 0, result.output
    for word in ("2x16 tokens", "1x5 tokens", "G MAC/s", "linear 64 -> 64 2x4 50%", "between steps", "total",
                 "all linear layers", "2x4 90%"):  # fmt: skip
        assert word in result.stdout
    content = json.loads(files["--json"].read_text())
    assert content["int8_peak_macs_per_second"] > 1e9 and content["memory_bytes_per_second"] > 1e8
    one, other = content["profiles"]
    assert (one["batch"], one["tokens"], one["runs"], other["tokens"]) == (2, 32, 3, 5)
    assert sum(step["ms"] for step in one["steps"]) + one["waiting_ms"] + one["outside_ms"] == pytest.approx(
        one["ms"], abs=1e-3
    )
    assert [item["sparsity"] for item in one["what_if"]] == [0.9] * 4
    assert len(json.loads(files["--trace"].read_text())["traceEvents"]) > 40


@pytest.mark.usefixtures("measured")
def test_steps_and_data_and_json_on_the_terminal(plan: Path, tmp_path: Path) -> None:
    mask = np.array([[1] * 7 + [0] * 2, [1] * 9])
    np.savez(tmp_path / "x.npz", input_ids=np.full((2, 9), 7), attention_mask=mask)
    words = (plan, "--data", tmp_path / "x.npz", "--shape", "2", "--runs", 1, "--no-what-if")
    text = invoke(*words, "--steps").stdout
    assert "2x9 tokens (16 of 18 are real), x.npz" in text and "node_MatMul_" in text and "what if" not in text
    content = json.loads(invoke(*words, "--json", "-").stdout)
    assert content["profiles"][0]["padded_tokens"] == 18 and content["profiles"][0]["what_if"] == []


@pytest.mark.usefixtures("measured")
def test_what_runs_on_onnxruntime_is_a_step_too() -> None:
    for name in ("cnn", "t5-dynamo"):
        content = json.loads(invoke(compiled(name).plan, "--runs", 2, "--json", "-", "--what-if", 0.9).stdout)
        steps = content["profiles"][0]["steps"]
        assert any(step["kind"] == "onnxruntime" and step["ms"] > 0 and step["bound"] == "-" for step in steps)
        assert "onnxruntime" in invoke(compiled(name).plan, "--runs", 2, "--no-what-if").stdout


@pytest.mark.usefixtures("measured")
def test_other_processes_in_the_way_are_told(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([100, 106, 200, 200])  # before and after two profiles of three runs, each traced and untraced
    monkeypatch.setattr("nmcompile.profile.timing._preemptions", lambda: next(counts))
    words = (plan, "--runs", 3, "--no-what-if", "--shape", "1x4")
    assert "took a core 1.0 times per run" in invoke(*words).stdout
    assert "took a core" not in invoke(*words).stdout


@pytest.mark.usefixtures("measured")
def test_a_plot_is_written(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert invoke(plan, "--runs", 1, "--no-what-if", "--plot", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--plot", "x.pdf"], "must end in .svg or .png"),
        (["--trace", "nowhere/t.json"], "there is no folder"),
        (["--trace", "t.json", "--json", "t.json"], "--json and --trace would both write"),
        (["--what-if", "90"], "is not a share of zeros"),
        (["--what-if", "0.5", "--no-what-if"], "contradict"),
        (["--pattern", "2:4"], "choose one of 1x4"),
        (["--shape", "1x4000"], "more tokens than the model's position table"),
        (["--data", "missing.npz"], "missing.npz"),
        (["--threads", "0"], "threads=0"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "int8_peak", unwanted)
    result = invoke(plan, *words)
    assert result.exit_code == 1 and text in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == "" and not list(tmp_path.iterdir())


def unwanted(**_: Any) -> float:
    raise AssertionError("measured too early")


def test_only_cpu_plans_can_be_profiled(tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(b"no plan")
    assert "is not a plan" in invoke(tmp_path / "x.plan").stderr
    assert "cannot read" in invoke(tmp_path / "y.plan").stderr


def test_without_matplotlib_the_remedy_is_told(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(measure, "int8_peak", unwanted)
    result = invoke(plan, "--plot", tmp_path / "p.svg")
    assert result.exit_code == 1 and "pip install 'nmcompile[plot]'" in result.stderr


def test_fixed_sizes_are_kept_and_others_told(tmp_path: Path) -> None:
    import onnx
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    model = onnx.load(str(MODELS / "bert-classifier.onnx"))
    sizes = {item.name: [2, 16] for item in model.graph.input}
    onnx.save(update_inputs_outputs_dims(model, sizes, {"logits": [2, "classes"]}), str(tmp_path / "fixed.onnx"))
    nmcompile.compile(tmp_path / "fixed.onnx", tmp_path / "fixed.plan", preset="fast", measure=False)
    session = load_cpu(tmp_path / "fixed.plan")
    assert inputs(session, None)["input_ids"].shape == inputs(session, (2, 16))["input_ids"].shape == (2, 16)
    for shape in ((1, None), (2, 17)):
        with pytest.raises(InputError, match="that size is fixed"):
            inputs(session, shape)
