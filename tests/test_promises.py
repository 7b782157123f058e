"""What a compile promises: options without effect are said, limits are measured on something, shares of zeros hold."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from compiled import MODELS, held_of
from onnx_text import parse, parse_model

import nmcompile
from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate import Calibration, open_data
from nmcompile.cli import cli
from nmcompile.cli.check import taken
from nmcompile.compiler import Result
from nmcompile.contract import Context
from nmcompile.coverage import coverage
from nmcompile.errors import InputError, PassError
from nmcompile.holdout import hold_out
from nmcompile.metrics import cosine, disagreement, divergence
from nmcompile.passes import BlockPrune
from nmcompile.pipeline import Pipeline
from nmcompile.plan import read_plan
from nmcompile.prune import Goal
from nmcompile.prune.sensitivity import Unit, ladder, sparsities
from nmcompile.sizes import size_note
from nmcompile.tensorinfo import TensorInfo

BERT = MODELS / "bert-torchscript.onnx"
BLOCK = "h = MatMul(x, w)  a = Add(h, b)  r = Relu(a)  z = MatMul(r, v)  m = Relu(z)"
WEIGHTS = "<float[16,32] w, float[32] b, float[32,16] v, float[16,1] c>"
SCORES = f"(float[B,S,16] x) => (float[B] y) {WEIGHTS} {{ {BLOCK}  p = ReduceMean <axes = [1], keepdims = 0> (m)" \
         "  s = MatMul(p, c)  one = Constant <value_ints = [1]> ()  y = Squeeze(s, one) }"  # fmt: skip
LOGITS = f"(float[B,S,16] x) => (float[B,1] y) {WEIGHTS} {{ {BLOCK}  p = ReduceMean <axes = [1], keepdims = 0> (m)" \
         "  y = MatMul(p, c) }"  # fmt: skip
LABELS = f"(float[B,S,16] x) => (int64[B,S] y) {WEIGHTS} {{ {BLOCK}  y = ArgMax <axis = 2, keepdims = 0> (m) }}"
FIXED = f"(float[8,S,16] x) => (float[8,S,16] m) {WEIGHTS} {{ {BLOCK} }}"


def texts(count: int = 16) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"input_ids": rng.integers(5, 200, rng.integers(4, 20))}


def rows(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((9, 16)).astype(np.float32)} for _ in range(count)]


def compile_(text: str, plan: Path, **options: Any) -> Result:
    return nmcompile.compile(parse_model(text, opset=17), plan, preset="fast", **options)


# ---- limits


@pytest.mark.parametrize(
    ("text", "metric", "other"),
    [
        (SCORES, "kl", "y holds single scores; take cosine or FILE.py:FUNCTION"),
        (SCORES, "top1", "y holds single scores; take cosine or FILE.py:FUNCTION"),
        (LOGITS, "kl", "y holds single scores"),
        (LOGITS, "top1", "y holds single scores"),
        (LABELS, "cosine", r"y holds labels \(whole numbers\); take top1"),
        (LABELS, "kl", r"y holds labels \(whole numbers\); take top1"),
    ],
)
def test_a_limit_on_nothing_is_an_error_before_the_work(text: str, metric: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--max-drop {metric} has nothing to measure: {other}"):
        compile_(text, tmp_path / "m.plan", calibration=rows(16), max_drop=f"{metric}=0.1",
                 observers=[lambda *_: pytest.fail("a pass has run")])  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [SCORES, LOGITS])
def test_scores_are_one_vector_over_the_samples(text: str, tmp_path: Path) -> None:
    free = compile_(text, tmp_path / "a.plan", calibration=rows(64), sparsity=0.9, max_drop="cosine=2")
    lost = held_of(free).drop
    assert lost > 0 and not held_of(free).dense
    held = compile_(text, tmp_path / "b.plan", calibration=rows(64), sparsity=0.9, max_drop=f"cosine={lost / 4}")
    assert held_of(held).dense and held_of(held).drop <= lost / 4


def test_labels_are_counted(tmp_path: Path) -> None:
    free = compile_(LABELS, tmp_path / "a.plan", calibration=rows(64), sparsity=0.9, max_drop="top1=1")
    held = compile_(LABELS, tmp_path / "b.plan", calibration=rows(64), sparsity=0.9, max_drop="top1=0.1")
    assert held_of(free).drop > 0.2 and held_of(held).dense and held_of(held).drop <= 0.1


def test_metrics_of_scores_and_labels_by_hand() -> None:
    a, b = np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 2.0])
    given = [{"n": np.array(index)} for index in range(3)]
    one, other = (lambda feeds, values=values: {"y": values[int(feeds["n"])].reshape(1, 1)} for values in (a, b))
    assert cosine(one, other, given) == pytest.approx(1 - 8 / 9)
    with pytest.raises(InputError, match="give more samples"):
        cosine(one, other, given[:1])  # a vector of one has no direction
    first, second = (lambda _: {"y": np.array([[1, 2, 3, 4]])}), (lambda _: {"y": np.array([[1, 2, 3, 5]])})
    assert disagreement(first, second, [{}]) == 0.25
    with pytest.raises(InputError, match="no sample fills a batch"):
        divergence(first, second, [])
    mixed = (lambda _: {"v": np.array([[1.0, 0.0]]), "s": np.array([1.0, 1.0])},
             lambda _: {"v": np.array([[1.0, 0.0]]), "s": np.array([1.0, -1.0])})  # fmt: skip
    assert cosine(*mixed, [{}]) == pytest.approx(1)  # the worse of the two


def test_a_vector_over_the_real_tokens_of_each_sequence() -> None:
    feeds = {"attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    one = {"y": np.array([[3.0, 4.0, 9.0], [1.0, 0.0, 0.0]])}
    other = {"y": np.array([[4.0, 3.0, -9.0], [1.0, 0.0, 0.0]])}
    assert cosine(lambda _: one, lambda _: other, [feeds]) == pytest.approx(1 - (24 / 25 + 1) / 2)


@pytest.mark.parametrize(("count", "on"), [
    (8, "the calibration samples, too few to hold any out"),
    (16, "the calibration samples, too few to hold any out"),
    (32, "held-out samples, those that the limit was held by"),
])  # fmt: skip
def test_fixed_batches_that_few_samples_fill(count: int, on: str, tmp_path: Path) -> None:
    result = compile_(FIXED, tmp_path / "m.plan", calibration=rows(count), sparsity=0.9, max_drop="cosine=0.001")
    assert result.loss["m"].values and result.measured_on.removesuffix(", those that the limit was held by") in on
    assert held_of(result).dense and held_of(result).drop <= 0.001
    assert 1 - result.loss["m"].cosine <= 0.001


def test_which_samples_calibrate_hold_and_measure() -> None:
    free, fixed = (TensorInfo("x", np.dtype(np.float32), (batch, "S", 16)) for batch in ("B", 4))

    def parts(count: int, info: TensorInfo, limited: bool) -> tuple[int, int, int, bool, bool]:
        found = hold_out(open_data(rows(count), (info,)), limited)
        names = [{id(row) for row in part.rows} for part in (found.seen, found.chosen, found.measured)]
        assert not found.held_out or not names[0] & names[2]
        assert not (limited and found.apart) or not names[1] & names[2]
        return (*map(len, names), found.held_out, found.apart)  # type: ignore[return-value]

    assert parts(40, free, False) == (35, 5, 5, True, True)
    assert parts(40, free, True) == (35, 3, 2, True, True)
    assert parts(16, free, True) == (14, 2, 2, True, False)
    assert parts(7, free, True) == (7, 7, 7, False, False)
    assert parts(15, fixed, True) == (15, 15, 15, False, False)
    assert parts(19, fixed, False) == (12, 4, 4, True, True)  # four batches, three rows that fill none
    assert parts(128, fixed, True) == (112, 8, 8, True, True)


def test_the_loss_is_measured_on_samples_that_the_search_did_not_choose_by(tmp_path: Path) -> None:
    given = {"calibration": list(texts(40)), "sparsity": 0.8, "preset": "fast"}
    held = nmcompile.compile(BERT, tmp_path / "a.plan", max_drop="cosine=0.01", report=tmp_path / "r.json", **given)  # type: ignore[arg-type]
    assert held.measured_on == "held-out samples" and held_of(held).drop != held_of(held).drop_apart
    losses = [1 - item.cosine for item in held.loss.values()]
    assert min(losses) <= (held_of(held).drop_apart or 0.0) <= max(losses)
    few = nmcompile.compile(BERT, tmp_path / "b.plan", max_drop="cosine=0.01",
                            **{**given, "calibration": list(texts(16))})  # type: ignore[arg-type]  # fmt: skip
    assert few.measured_on == "held-out samples, those that the limit was held by"
    (tmp_path / "a.plan").unlink()
    assert "drop_apart" in json.loads((tmp_path / "r.json").read_text())["held"]


def test_a_limit_that_fails_on_samples_kept_apart_is_held_by_all(tmp_path: Path) -> None:
    data = rows(64)
    for row in data[7::16]:  # of every eighth, those that the search sees: the biases alone choose a label
        row["x"] *= 1e-3
    result = compile_(LABELS, tmp_path / "m.plan", calibration=data, sparsity=0.9, max_drop="top1=0.1")
    assert held_of(result).drop <= 0.1 and held_of(result).dense and held_of(result).drop_apart is None
    assert result.loss["y"].top1 == pytest.approx(1 - held_of(result).drop)  # measured on the same samples
    assert result.measured_on == "held-out samples, those that the limit was held by"
    assert any("on samples that the search had not chosen by" in note for note in result.notes)


# ---- shares of zeros


@pytest.mark.parametrize("share", [0.5, 0.8, 0.89, 0.9, 0.93, 0.95, 0.99, 0.999])
def test_every_share_can_be_reached_with_some_layers_above_it(share: float) -> None:
    levels, goal = ladder(share), Goal(sp.Block(2, 4), share)
    assert list(levels) == sorted(set(levels)) and levels[-1] > share and levels[-1] < 1
    units = [Unit((f"l{index}",), goal, 1000 * (index + 1), {level: level**2 for level in levels}, 1.0 + index)
             for index in range(6)]  # fmt: skip
    found = sparsities(units, share)
    zeros = sum(found[f"l{index}"] * 1000 * (index + 1) for index in range(6))
    assert share <= zeros / 21000 < share + 0.05 * (1 - share) + 0.02
    assert len(set(found.values())) > 1  # where it harms least


def test_shares_below_a_tenth_left_are_what_they_were() -> None:
    assert ladder(0.89) == (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize("pattern", ["2x4", "4x1", "unstructured"])
@pytest.mark.parametrize("share", [0.9, 0.99])
def test_the_default_recipe_reaches_high_shares(share: float, pattern: str) -> None:
    rng = np.random.default_rng(0)
    graph = parse("""(float[B,S,32] x) => (float[B,S,32] y) <float[32,64] w, float[64,64] v, float[64,32] u> {
        h = MatMul(x, w)  a = Relu(h)  i = MatMul(a, v)  c = Relu(i)  j = MatMul(c, u)  y = Neg(j) }""")
    data = open_data([{"x": rng.standard_normal((9, 32)).astype(np.float32)} for _ in range(16)], g.inputs(graph))
    passes = nmcompile.recipes.pruning_passes(pattern, share, "admm")
    after, _ = Pipeline(passes, calibration=Calibration(data)).run(graph)
    layers = g.linear_layers(after)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.size for layer in layers)
    assert zeros == pytest.approx(share, abs=0.012)


def test_a_share_of_nothing_does_nothing_at_once() -> None:
    class Untouched:
        data: Any = property(lambda self: pytest.fail("the data are read"))
        progress = checkpoints = None

    graph = parse("(float[B,S,8] x) => (float[B,S,8] y) <float[8,8] w> { h = MatMul(x, w)  y = Neg(h) }")
    pass_ = BlockPrune(sparsity=0.0, solver="admm", ranking="sensitivity")
    report = pass_.run(g.copy(graph), Context(Untouched()))  # type: ignore[arg-type]
    assert report.changed == 0 and report.notes[0] == "nothing was pruned: the share of zeros that was asked for is 0"
    start = time.perf_counter()
    result = nmcompile.compile(BERT, None, calibration=list(texts()), sparsity=0)
    assert not any("prune" in name or "permute" in name for name, _, _ in result.passes)
    assert "nothing is pruned: the share of zeros that was asked for is 0" in result.notes
    assert time.perf_counter() - start < 60


def test_to_name_the_solver_of_fast_is_to_be_fast(tmp_path: Path) -> None:
    data = list(texts())
    for name, solver in (("a", None), ("b", "obs"), ("c", "admm")):
        nmcompile.compile(BERT, tmp_path / name, calibration=data, sparsity=0.5, solver=solver, preset="fast",
                          measure=False)  # fmt: skip
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


# ---- what has no effect


def said(**options: Any) -> list[str]:
    return list(nmcompile.compile(BERT, None, preset="fast", **options).notes)


def test_a_pattern_without_zeros_takes_no_share() -> None:
    with pytest.raises(PassError, match=r"pattern dense has no zeros, sparsity 0\.8 is asked for; leave --sparsity"):
        said(pattern="dense", sparsity=0.8)
    with pytest.raises(PassError, match="pattern dense always has the same size"):
        said(pattern="dense", size="0.3x")
    assert not any("effect" in note for note in said(pattern="dense"))


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"solver": "obs"}, "solver obs has no effect: nothing is pruned"),
        ({"solver": "obs", "pattern": "dense"}, "solver obs has no effect: nothing is pruned"),
        ({"solver": "obs", "passes": "block-prune"}, "solver obs has no effect: the passes that were given"),
        ({"checkpoints": "c"}, "checkpoints c has no effect: only pruning by obs or admm"),
        ({"checkpoints": "c", "sparsity": 0.5}, "checkpoints c has no effect"),
        ({"tokenizer": "t.json"}, "tokenizer t.json has no effect: the calibration data hold no texts"),
        ({"max_length": 32, "calibration": "DATA"}, "max-length 32 has no effect: it cuts texts and lists"),
        ({"passes": "block-prune(exclude=*)"}, "nothing was pruned: every linear layer is kept dense"),
    ],
)
def test_options_without_effect_are_said(
    options: dict[str, Any], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(5, 200, (8, 12))
    np.savez("c.npz", input_ids=ids)
    given = {key: "c.npz" if value == "DATA" else value for key, value in options.items()}
    assert [line for line in said(**given) if line.startswith(note)]


def test_options_with_an_effect_are_not(tmp_path: Path) -> None:
    data = list(texts(8))
    lines = said(calibration=data, sparsity=0.5, solver="obs", checkpoints=tmp_path / "c", attention="float")
    assert not any("no effect" in line or line.startswith("nothing") for line in lines)


def test_attention_where_there_is_none_is_said() -> None:
    result = nmcompile.compile(parse_model(FIXED, opset=17), None, preset="fast", attention="float")
    assert any(note.startswith("attention float has no effect") for note in result.notes)


def test_pruning_that_finds_nothing_says_what_is_there() -> None:
    text = """(float[B,S,16] x) => (float[B,S,16] y) <int8[16,16] w> { q, s, z = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, w, z)  f = Cast <to = 1> (i)  y = Mul(f, s) }"""
    result = nmcompile.compile(parse_model(text, opset=17), None, sparsity=0.5, calibration=rows(8))
    assert any(note.startswith("nothing was pruned") and "MatMulInteger, quantized already" in note
               for note in result.notes)  # fmt: skip


def test_a_size_that_is_not_met_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert size_note("0.5x", 50, 100) == [] and size_note("0.5x", 505, 1000) == []
    assert "is not met: the plan has 0.6x" in size_note("0.5x", 60, 100)[0]
    assert "the plan is smaller, 0.3x" in size_note("0.5x", 30, 100)[0]
    result = nmcompile.compile(BERT, tmp_path / "m.plan", size="0.9x", preset="fast")
    assert "nothing is pruned for size 0.9x: the plan is as small without zeros" in result.notes
    monkeypatch.setattr("nmcompile.work.sparsity_for", lambda *_: 0.1)
    result = nmcompile.compile(BERT, tmp_path / "m.plan", size="0.3x", preset="fast")
    assert any(note.startswith("size 0.3x is not met") for note in result.notes)


# ---- what the summary and the report say


def test_each_reason_is_told_once(tmp_path: Path) -> None:
    for name in ("t5-torchscript", "bert-torchscript", "cnn"):
        notes = nmcompile.compile(MODELS / f"{name}.onnx", None, preset="fast").notes
        assert len(notes) == len(set(notes))


def test_the_share_that_runs_native_and_the_times_of_segments(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    words = [MODELS / "t5-dynamo.onnx", "-o", tmp_path / "m.plan", "--preset", "fast", "--report", report]
    text = CliRunner().invoke(cli, [str(word) for word in words]).stdout
    written = json.loads(report.read_text())
    native = written["native"]
    assert native["linear_layers"] == native["native_linear_layers"] == 33
    assert 0 < native["native_share_of_multiply_adds"] < 1  # its attention runs in onnxruntime
    share = f"{native['native_share_of_multiply_adds']:.1%}".replace(".0%", "%")
    assert f"native    33 of 33 linear layers, {share} of the multiply-adds of a sample" in text
    others = [segment for segment in written["segments"] if segment["kind"] == "onnxruntime"]
    assert others and all(segment["milliseconds"] > 0 for segment in others)
    assert text.count(" ms for a batch of samples, ") == len(others)
    assert "lengths   at 1, " in text
    assert not any("milliseconds" in segment for segment in read_plan(tmp_path / "m.plan").header["segments"])


def test_multiply_adds_are_counted_by_hand() -> None:
    graph = parse("""(float[B,S,8] x, float[1,2,6,6] i) => (float[B,S,4] y, float[1,3,4,4] c)
        <float[8,16] w, float[4,16] g, float[3,2,3,3] k> {
        h = MatMul(x, w)  f = Flatten <axis = 2> (h)  m = Gemm <transB = 1> (f, g)
        n = Constant <value_ints = [1, -1, 4]> ()  y = Reshape(m, n)  c = Conv(i, k) }""")
    feeds = {"x": np.ones((3, 5, 8), np.float32), "i": np.ones((1, 2, 6, 6), np.float32)}
    found = coverage(graph, {}, feeds)  # of one sample
    assert found.multiply_adds == 5 * 8 * 16 + 5 * 16 * 4 + 3 * 16 * 2 * 9 == found.native_multiply_adds
    product = next(node for node in graph.nodes if node.op == "MatMul")
    part = g.to_model(g.extract(graph, [product.outputs[0].name])).SerializeToString()
    found = coverage(graph, {"part": part}, feeds)
    assert found.multiply_adds - found.native_multiply_adds == 5 * 8 * 16 and found.native_layers == found.layers - 1


# ---- compare and check


def test_compare_measures_something_or_fails(tmp_path: Path) -> None:
    data = tmp_path / "x.npz"
    np.savez(data, x=np.stack([row["x"] for row in rows(8)]))
    for name, text in (("scores", SCORES), ("labels", LABELS)):
        (tmp_path / f"{name}.onnx").write_bytes(parse_model(text, opset=17).SerializeToString())
        compile_(text, tmp_path / f"{name}.plan", calibration=data, sparsity=0.9)

    def compare(name: str, *words: object) -> tuple[int, str]:
        given = ["compare", tmp_path / f"{name}.onnx", tmp_path / f"{name}.plan", "--data", data, *words]
        found = CliRunner().invoke(cli, [str(word) for word in given])
        return found.exit_code, found.output

    for name, words, why in (
        ("scores", ("--min-cosine", 0.1), "there is no cosine of y; they are single values: give --min-sqnr"),
        ("scores", ("--min-top1", 0.1), "there is no top1 of y; they are single values: give --min-sqnr"),
        ("labels", ("--min-cosine", 0.1), "they are labels: give --min-top1"),
        ("labels", ("--min-top1", 1), "y: top-1 "),
        ("scores", ("--min-sqnr", 80), "y: SQNR "),
    ):
        status, said = compare(name, *words)
        assert status == 1 and why in said, said
    assert compare("scores", "--min-sqnr", 1)[0] == 0 and compare("labels", "--min-top1", 0.1)[0] == 0


def test_check_takes_what_changes_the_plan_and_names_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"fast": True, "no_tune": True, "size": "0.3x", "max_drop": "cosine=0.1", "verify": True, "measure": False,
             "output": Path("m.plan"), "report": Path("r.json"), "workspace": "4G", "no_build": False}  # fmt: skip
    assert taken(given) == {"preset": "fast", "tuning": "off", "size": "0.3x", "max_drop": "cosine=0.1", "verify": True}
    assert capsys.readouterr().err == "without effect on a baseline: --no-measure, --output, --report, --workspace\n"


def test_check_holds_the_limit_of_a_recipe(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", input_ids=np.random.default_rng(0).integers(5, 200, (16, 12)))
    (tmp_path / "r.toml").write_text('fast = true\nsparsity = 0.8\nmax-drop = "cosine=0.01"\ncalibration = "c.npz"\n')
    words = ["check", BERT, "--baseline", tmp_path / "base", "--recipe", tmp_path / "r.toml"]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "base" / BERT.stem / "facts.json").read_text())
    assert any(layer["density"] > 0.9 for layer in facts["layers"].values())  # some went back
    assert any("solver=obs" in name and "norms=false" in name and "0.05" in name for name in facts["passes"])


def test_check_records_nothing_that_agrees_with_anything(tmp_path: Path) -> None:
    text = "(float[B,S,16] x) => (float[B,S,16] y) <float[16,16] w> { h = MatMul(x, w)  l = Log(h)  y = Add(l, h) }"
    (tmp_path / "m.onnx").write_bytes(parse_model(text, opset=17).SerializeToString())
    np.savez(tmp_path / "c.npz", x=np.stack([row["x"] for row in rows(8)]))
    words = ["check", tmp_path / "m.onnx", "--baseline", tmp_path / "base", "--calibration", tmp_path / "c.npz"]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 1 and "nothing can be measured of output 'y'" in result.output, result.output
    assert not (tmp_path / "base").exists()
