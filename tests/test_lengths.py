"""Inputs of other lengths, the look at the end of a compile, and what --verify runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compiled import MODELS
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.compare import Comparison, Difference
from nmcompile.errors import InputError, PassError
from nmcompile.lengths import ends_padded, left_padded, lengths_of, look, out_of_line, resized, scaled, with_holes
from nmcompile.pipeline import Context, Pass, Pipeline, Report
from nmcompile.tensorinfo import TensorInfo

INT, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = TensorInfo("input_ids", INT, ("batch", "sequence"))
MASK = TensorInfo("attention_mask", INT, ("batch", "sequence"))
POSITIONS = TensorInfo("position_ids", INT, ("batch", "sequence"))
FEATURES = TensorInfo("x", FLOAT, ("batch", "sequence", 4))
Arrays = Mapping[str, np.ndarray]


# ---- inputs of other lengths


def test_samples_are_cut_and_repeated_and_positions_go_on() -> None:
    row = {"input_ids": np.array([7, 8, 9]), "attention_mask": np.array([0, 1, 1]), "position_ids": np.array([2, 3, 4]),
           "x": np.arange(12, dtype=np.float32).reshape(3, 4)}  # fmt: skip
    longer = resized(row, (IDS, MASK, POSITIONS, FEATURES), {"sequence": 5})
    assert longer["input_ids"].tolist() == [7, 8, 9, 7, 8] and longer["attention_mask"].tolist() == [0, 1, 1, 0, 1]
    assert longer["position_ids"].tolist() == [2, 3, 4, 5, 6]
    np.testing.assert_array_equal(longer["x"], row["x"][[0, 1, 2, 0, 1]])
    assert resized(row, (IDS,), {"sequence": 2})["input_ids"].tolist() == [7, 8]


def test_lengths_keep_their_proportions_and_sums() -> None:
    assert scaled({"source": 20, "target": 10}, 40) == {"source": 40, "target": 20}
    assert scaled({"past": 6, "seq": 2, "past + seq": 8}, 4) == {"past": 3, "seq": 1, "past + seq": 4}
    assert scaled({"past": 4, "seq": 1, "past + seq": 5, "seq + 1": 2}, 1)["past + seq"] == 2


def test_masks_of_other_shapes() -> None:
    feeds = {"attention_mask": np.ones((2, 6), np.int64)}
    left, holes = left_padded(feeds), with_holes(feeds)
    assert left is not None and left["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert holes is not None and holes["attention_mask"].min(axis=1).tolist() == [0, 0]
    assert ends_padded(feeds) and not ends_padded(left) and not ends_padded(holes)
    assert left_padded({"x": np.ones((2, 6))}) is None


# ---- the look


def samples(lengths: list[int]) -> Data:
    rng = np.random.default_rng(0)
    return open_data([{"x": rng.standard_normal((length, 4)).astype(np.float32)} for length in lengths], (FEATURES,))


def exact(feeds: Arrays) -> Arrays:
    return {"y": feeds["x"] + feeds["x"].mean(axis=1, keepdims=True)}


def loss_of(run: object, data: Data) -> dict[str, Difference]:
    comparison = Comparison()
    for feeds in data:
        comparison.add(exact(feeds), run(feeds))  # type: ignore[operator]
    return comparison.differences()


def test_a_loss_beyond_the_samples_is_told_with_both_figures() -> None:
    """A plan that lost a window of 16 tokens, calibrated on 6."""

    def windowed(feeds: Arrays) -> Arrays:
        return {"y": feeds["x"] + feeds["x"][:, :16].mean(axis=1, keepdims=True) * (feeds["x"].shape[1] <= 16)}

    data = samples([6, 5, 6])
    found = look(exact, windowed, data, lengths_of(data), (), loss_of(windowed, data))
    assert found.calibrated == (5, 6) and [item.length for item in found.seen] == [1, 2, 12, 512]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("at 512 tokens output 'y' has cosine 0.9")
    assert "1.0000 on samples as they are; calibration had 5 to 6 tokens" in found.notes[0]
    assert look(exact, exact, data, lengths_of(data), (), loss_of(exact, data)).notes == ()


def test_a_loss_below_the_samples_is_told_too() -> None:
    def padded(feeds: Arrays) -> Arrays:
        x = feeds["x"]
        return exact(feeds) if x.shape[1] >= 4 else {"y": -x}

    data = samples([8, 9])
    found = look(exact, padded, data, lengths_of(data), (), loss_of(padded, data))
    assert [note[:12] for note in found.notes] == ["at 1 tokens "]


def test_no_further_than_the_model_goes_and_what_the_plan_refuses() -> None:
    def table(feeds: Arrays) -> Arrays:
        if feeds["x"].shape[1] > 64:
            raise InputError("position 64: the table ends")
        return exact(feeds)

    def refuses(feeds: Arrays) -> Arrays:
        if feeds["x"].shape[1] > 20:
            raise InputError("too long for a guard")
        return exact(feeds)

    data = samples([10])
    found = look(table, exact, data, lengths_of(data), (), loss_of(exact, data))
    assert [item.length for item in found.seen] == [1, 5, 20, 64] and not found.notes
    found = look(table, refuses, data, lengths_of(data), (), loss_of(exact, data))
    assert [item.length for item in found.seen] == [1, 5, 20]
    assert found.notes == ("at 64 tokens (calibration had 10) the model runs and the plan does not: "
                           "too long for a guard",)  # fmt: skip


def test_models_of_one_length_are_not_looked_at() -> None:
    fixed = (TensorInfo("x", FLOAT, ("batch", 3, 4)),)
    data = open_data([{"x": np.zeros((3, 4), np.float32)}], fixed)
    assert look(exact, exact, data, lengths_of(data), (), {}).skipped == "the model's inputs have one length"


@pytest.mark.parametrize(
    ("usual", "found", "told"),
    [
        ((0.9999, 40, 1.0), (0.995, 20, 1.0), False),
        ((0.9999, 40, 1.0), (0.98, 20, 1.0), True),
        ((0.9, 7, 1.0), (0.8, 4, 1.0), False),
        ((0.9, 7, 1.0), (0.6, 2, 1.0), True),
        ((np.nan, 40, np.nan), (np.nan, 30, np.nan), False),
        ((np.nan, 40, np.nan), (np.nan, 20, np.nan), True),
        ((np.nan, 40, 1.0), (np.nan, 20, 0.8), True),
        ((0.9999, 40, 1.0), (np.nan, np.nan, np.nan), True),
    ],
)
def test_what_is_out_of_line(usual: tuple[float, ...], found: tuple[float, ...], told: bool) -> None:
    one, other = (Difference(0, 0, cosine, sqnr, top1, 9) for cosine, sqnr, top1 in (usual, found))
    assert bool(list(out_of_line({"y": other}, {"y": one}))) is told


def test_a_compile_looks_at_other_lengths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(5, 200, length)} for length in (6, 7, 8) * 4]
    result = nmcompile.compile(MODELS / "bert-torchscript.onnx", tmp_path / "m.plan", calibration=data, preset="fast")
    assert result.lengths is not None and not result.lengths.skipped and not result.lengths.notes
    assert [item.length for item in result.lengths.seen] == [1, 3, 16, 64]  # its table has 64 rows
    assert result.to_json()["lengths"]["calibrated"] == [6, 8]


# ---- --verify


@dataclass(frozen=True)
class Window(Pass):
    """Wrong beyond `size` tokens: what follows is cut off and put back as zeros."""

    preserves: ClassVar[bool] = True
    size: int = 16

    def run(self, graph: gs.Graph, context: Context) -> Report:
        node = graph.nodes[0]
        x, y = node.inputs[0], gs.Variable("kept", np.dtype(np.float32))
        mask = gs.Constant("window", (np.arange(1024) < self.size).astype(np.float32)[:, None])
        sizes = [gs.Variable(name, np.dtype(np.int64)) for name in ("shape", "tokens")]
        part = gs.Variable("part", np.dtype(np.float32))
        one = gs.Constant("one", np.array([1], np.int64))
        zero, two = gs.Constant("zero", np.array([0], np.int64)), gs.Constant("two", np.array([2], np.int64))
        made = [gs.Node("Shape", "window/shape", {}, [x], [sizes[0]]),
                gs.Node("Slice", "window/tokens", {}, [sizes[0], one, two], [sizes[1]]),
                gs.Node("Slice", "window/part", {}, [mask, zero, sizes[1], zero], [part]),
                gs.Node("Mul", "window/mul", {}, [x, part], [y])]  # fmt: skip
        node.inputs[0] = y
        graph.nodes[:0] = made
        return Report(changed=1)


@dataclass(frozen=True)
class Prefix(Pass):
    """Wrong unless the mask is a prefix: what it keeps is counted."""

    preserves: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: Context) -> Report:
        node = graph.nodes[0]
        mask, kept = node.inputs[0], gs.Variable("prefix", np.dtype(np.int64))
        axis = gs.Constant("axis", np.array([1], np.int64))
        total, places, before = (gs.Variable(name, np.dtype(np.int64)) for name in ("total", "places", "before"))
        ones = gs.Variable("ones", np.dtype(np.int64))
        less = gs.Variable("less", np.dtype(bool))
        made = [gs.Node("ReduceSum", "p/total", {"keepdims": 1}, [mask, axis], [total]),
                gs.Node("Sub", "p/zero", {}, [mask, mask], [before]),
                gs.Node("Add", "p/ones", {}, [before, gs.Constant("i", np.array(1, np.int64))], [ones]),
                gs.Node("CumSum", "p/places", {}, [ones, gs.Constant("j", np.array(1, np.int64))], [places]),
                gs.Node("LessOrEqual", "p/less", {}, [places, total], [less]),
                gs.Node("Cast", "p/cast", {"to": 7}, [less], [kept])]  # fmt: skip
        node.inputs[0] = kept
        graph.nodes[:0] = made
        return Report(changed=1)


FEATURE_MODEL = "(float[B,S,4] x) => (float[B,S,3] y) <float[4,3] w> { h = Relu(x)  y = MatMul(h, w) }"
MASKED_MODEL = """(int64[B,S] attention_mask, float[B,S,4] x) => (float[B,S,4] y) {
    m = Cast <to = 1> (attention_mask)  axes = Constant <value_ints = [2]> ()  k = Unsqueeze(m, axes)
    a = Mul(x, k)  tokens = Constant <value_ints = [1]> ()  s = ReduceSum(a, tokens)  y = Add(x, s) }"""


@pytest.mark.parametrize("size", [16, 40, 300])
def test_verifying_objects_to_a_pass_that_is_right_at_short_lengths_only(size: int) -> None:
    with pytest.raises(PassError, match=r"does not preserve what the graph computes: .* with inputs x") as raised:
        Pipeline([Window(size=size)], verify=True).run(parse(FEATURE_MODEL))
    assert "\n" not in str(raised.value)
    Pipeline([Window(size=1000)], verify=True).run(parse(FEATURE_MODEL))


def test_verifying_objects_to_a_pass_that_takes_every_mask_for_a_prefix() -> None:
    with pytest.raises(PassError, match="does not preserve what the graph computes"):
        Pipeline([Prefix()], verify=True).run(parse(MASKED_MODEL))


def test_verifying_runs_at_the_lengths_of_the_samples() -> None:
    """Made-up inputs do not run: only a sample's length goes through the graph."""
    text = """(float[B,S,4] x) => (float[B,T,3] y) <float[4,3] w> { h = Relu(x)
        s = Constant <value_ints = [0, 44, 4]> ()  r = Reshape(h, s)  y = MatMul(r, w) }"""
    graph = parse(text)
    rows = [{"x": np.random.default_rng(0).standard_normal((44, 4)).astype(np.float32)}]
    calibration = Calibration(open_data(rows, g.inputs(graph)))
    with pytest.raises(PassError, match=r"runs on no made-up inputs: .*; give samples with --calibration"):
        Pipeline([Window(size=16)], verify=True).run(graph)
    with pytest.raises(PassError, match="does not preserve"):
        Pipeline([Window(size=40)], verify=True, calibration=calibration).run(graph)
    Pipeline([Window(size=44)], verify=True, calibration=calibration).run(graph)


def test_verifying_gives_inputs_of_other_names_other_lengths() -> None:
    text = """(float[B,S,4] a, float[B,T,4] b) => (float[B,1,4] y) { one = Constant <value_ints = [1]> ()
        s = ReduceSum(a, one)  t = ReduceSum(b, one)  y = Add(s, t) }"""

    @dataclass(frozen=True)
    class Alike(Pass):
        """Takes one length for the other."""

        preserves: ClassVar[bool] = True

        def run(self, graph: gs.Graph, context: Context) -> Report:
            summed, added = gs.Variable("both", np.dtype(np.float32)), next(n for n in graph.nodes if n.op == "Add")
            graph.nodes.insert(0, gs.Node("Add", "alike", {}, list(graph.inputs), [summed]))
            first = next(n for n in graph.nodes if n.op == "ReduceSum")
            first.inputs[0] = summed
            graph.outputs[0].inputs.clear()
            first.outputs[0] = graph.outputs[0]
            added.inputs.clear()
            graph.cleanup()
            return Report(changed=1)

    with pytest.raises(PassError, match="does not run"):
        Pipeline([Alike()], verify=True).run(parse(text))


@pytest.mark.parametrize("name", ["bert-torchscript", "gpt2-dynamo", "roberta-torchscript", "t5-dynamo", "vit-dynamo"])
def test_passes_hold_at_the_extremes(name: str) -> None:
    from nmcompile.recipes import canonical_passes

    Pipeline(canonical_passes(), verify=True).run(g.load(MODELS / f"{name}.onnx"))
