"""Matched operations: each writes itself as declared steps; one more needs its class and what finds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.cpu.emit import Emitter, emit
from nmcompile.backends.cpu.lower import lower
from nmcompile.backends.cpu.match import MATCHES, Matcher
from nmcompile.backends.cpu.ops import Form, Linear, LinearFloat, Op, Read
from nmcompile.backends.cpu.partition import Segment, partition
from nmcompile.backends.cpu.steps.rows import Affine, Quantize
from nmcompile.backends.cpu.streams import CLASSED, ENTERED, FIRST, Places, Space, Stream, count
from nmcompile.backends.cpu.tuning import by_cost_model
from nmcompile.plan import write_plan

SPACE = Space(Stream("batch", "tokens"))
GRAPH = """(float[batch,tokens,8] x) => (float[batch,tokens,8] y)
    <float[8,16] w1, float[16,8] w2, float[8] s, float[8] b> {
    h = MatMul(x, w1)  n = Neg(h)  o = MatMul(n, w2)  y = LayerNormalization <axis = -1> (o, s, b) }"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Negate(Op):
    """-x: what one who adds an operation writes."""

    def emit(self, to: Emitter) -> None:
        factor = to.held(np.full(self.rows, -1, np.float32), "mul")
        to.as_floats(self, lambda y: Affine(x=to.x(self), y=y, mul=factor, add=None))


def negate(matcher: Matcher, node: gs.Node) -> Op | str | None:
    space = matcher.space(node.inputs[0])
    if space is None:
        return "it is not over tokens"
    return Negate(reads=(Read(node.inputs[0].name),), y=node.outputs[0].name, rows=node.inputs[0].shape[-1],
                  space=space, nodes=(node,), name=node.name)  # fmt: skip


def test_an_operation_that_is_new_needs_its_class_and_what_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = parse(GRAPH)
    assert [segment.native for segment in partition(graph).segments] == [False]
    monkeypatch.setitem(MATCHES, "Neg", negate)
    lowered = lower(graph)
    assert lowered.native and not lowered.notes
    write_plan(tmp_path / "a.plan", {"target": "cpu", **lowered.header}, lowered.arrays, lowered.blobs)
    values = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    got, want = nmcompile.load(tmp_path / "a.plan").run(values)["y"], g.run(graph, values)["y"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_finds_an_operation_may_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATCHES, "Neg", lambda matcher, node: "it is Tuesday")
    assert any("runs on onnxruntime, it is Tuesday" in reason for reason in partition(parse(GRAPH)).reasons)


def test_a_result_that_is_wanted_as_bytes_is_quantized_behind_a_step_that_writes_floats() -> None:
    rng = np.random.default_rng(0)
    small = Form("u8", 0.25, 128)
    first = LinearFloat(reads=(Read("x"),), y="h", rows=8, space=SPACE, nodes=(), name="first",
                        weight=rng.standard_normal((8, 4)).astype(np.float32), bias=None)  # fmt: skip
    negated = Negate(reads=(Read("h"),), y="n", rows=8, space=SPACE, nodes=())
    last = Linear(reads=(Read("n", small),), y="y", rows=8, space=SPACE, nodes=(), name="last", bias=None,
                  weight=rng.integers(-127, 128, (8, 8)).astype(np.int8), scale=np.ones(8, np.float32))  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    segment = Segment(True, [first, negated, last], [], ["x"], ["y"])
    program, layers = emit(segment, "segment0", arrays, by_cost_model)
    assert [step.name for step in program.steps] == ["enter", "linear_float", "affine", "quantize", "linear", "leave"]
    quantized = program.steps[3]
    assert isinstance(quantized, Quantize) and (quantized.scale, quantized.zero_point) == (0.25, 128)
    assert [buffer.layout for buffer in program.buffers] == ["f32", "f32", "f32", "u8", "f32"]
    assert [layer.name for layer in layers] == ["first", "last"]
    assert {ref.name for step in program.steps for ref, _ in step.arrays()} == set(arrays)


def test_streams_have_words_for_their_tokens() -> None:
    plain, classed = Places(), Places(class_token=True)
    assert (plain.geometry(SPACE), plain.geometry(SPACE.firsts())) == (ENTERED, FIRST)
    assert (classed.entering, classed.geometry(SPACE), classed.geometry(SPACE.firsts())) == (ENTERED, CLASSED, FIRST)
    assert SPACE.firsts().whole() == SPACE and SPACE.stream.key == "batchxtokens"
    at = count(np.array([3, 1]), 4, class_token=True)
    assert [at.tokens(word) for word in (ENTERED, CLASSED, FIRST)] == [4, 6, 2] and at.padded == 2 * 5
    assert at.pairs(CLASSED, CLASSED, causal=False) == 16 + 4 and at.pairs(CLASSED, CLASSED, causal=True) == 10 + 3
    assert at.pairs(FIRST, ENTERED, causal=False) == 3 + 1
