"""plan.json, the session and profiles follow from the declarations of steps; one more step needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from compiled import compiled
from small_plans import ENTER, LEAVE, header, native, refused
from step_examples import example

import nmcompile
from nmcompile import _native
from nmcompile.backends.cpu import steps
from nmcompile.backends.cpu.program import Program
from nmcompile.backends.cpu.steps import STEPS, Buffer, Held, Ref, Step
from nmcompile.backends.cpu.steps.declare import (
    Floats,
    Made,
)
from nmcompile.backends.cpu.steps.rows import LayerNorm
from nmcompile.backends.cpu.streams import Counts, count
from nmcompile.plan import read_plan, write_plan
from nmcompile.profile.work import moved_bytes, steps_of
from nmcompile.session import load_cpu

PACKAGE = Path(nmcompile.__file__).parent
every = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


@every
def test_a_step_is_read_as_it_is_written(step: type[Step]) -> None:
    made = example(step).step
    text = json.dumps(made.to_json())
    assert steps.read(json.loads(text)) == made
    assert json.dumps(steps.read(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("name", ["bert-torchscript", "gpt2-torchscript", "roberta-torchscript", "vit-torchscript"])
def test_segments_of_plans_are_read_as_they_are_written(name: str) -> None:
    with read_plan(compiled(name).plan) as plan:
        segments = [segment for segment in plan.header["segments"] if segment["kind"] == "native"]
    assert segments and [Program.from_json(segment).to_json() for segment in segments] == segments


def test_fields_at_their_defaults_are_left_out_together() -> None:
    made = example(LayerNorm).step
    assert isinstance(made, LayerNorm)
    assert {"q_mul", "q_add"} <= set(made.to_json())
    assert replace(made, q_add=None).to_json()["q_add"] is None  # one is given, so both are written
    plain = replace(made, q_mul=None, q_add=None)
    assert not {"q_mul", "q_add"} & set(plain.to_json()) and steps.read(plain.to_json()) == plain


RELU = {"step": "unary", "x": 0, "y": 0, "op": "relu"}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({**RELU, "step": "shell"}, "has an unknown step 'shell'; it is damaged or from a newer nmcompile"),
        ({**RELU, "step": "prepare"}, "has an unknown step 'prepare'"),
        ({**RELU, "step": ["unary"]}, "has an unknown step"),
        ({**RELU, "more": 1}, r"does not fit together \(unary: there is no 'more'\); compile it again"),
        ({**RELU, "self": 1}, r"\(unary: there is no 'self'\)"),
        ({"step": "unary", "x": 0, "y": 0}, r"\(unary: lacks 'op'\)"),
        ({**RELU, "x": 0.0}, r"\(unary: x is no integer\)"),
        ({**RELU, "x": True}, r"\(unary: x is no integer\)"),
        ({**RELU, "op": 5}, r"\(unary: op is no text\)"),
        ({**RELU, "x": {"array": "t"}}, r"\(unary: x is no integer\)"),
        ({**RELU, "x": 2**40}, "does not fit together"),
        ({"step": "affine", "x": 0, "y": 0, "mul": {"array": "none"}, "add": None}, "an array 'none' that it does not"),
        ({"step": "affine", "x": 0, "y": 0, "mul": {"array": 5}, "add": None}, r"\(affine: mul is no array of the pl"),
        ({"step": "affine", "x": 0, "y": 0, "mul": 1.5, "add": None}, r"\(affine: mul is no array of the plan\)"),
        ({"step": "embed", "y": 0, "tables": {}, "sources": []}, r"\(embed: tables is no list\)"),
        ({"step": "embed", "y": 0, "tables": [], "sources": [["input"]]}, r"\(embed: sources are no lists such as"),
        ({"step": "quantize", "x": 0, "y": 0, "scale": "1", "zero_point": 0}, r"\(quantize: scale is no number\)"),
        ({"step": "quantize", "x": 0, "y": 0, "scale": 10**400, "zero_point": 0}, r"\(quantize: scale "),
        ("unary", "does not fit together"),
        (None, "does not fit together"),
        ({}, "description is damaged"),
    ],
)  # fmt: skip
def test_a_plan_holds_declared_steps_and_nothing_else(tmp_path: Path, step: Any, said: str) -> None:
    refused(tmp_path / "a.plan", header(native([[4, "f32", "tokens"]], [ENTER, step, LEAVE])), said)


@pytest.mark.parametrize("buffer", [None, 4, [], [4, "f32"], [4, "f32", "tokens", 1], ["4", "f32", "tokens"],
                                    [4, None, "tokens"], [True, "f32", "tokens"], "abc"])  # fmt: skip
def test_buffers_that_are_none(tmp_path: Path, buffer: Any) -> None:
    refused(tmp_path / "a.plan", header(native([buffer], [ENTER, LEAVE])), r"\(a buffer is no \[rows, layout, geom")


@pytest.mark.parametrize("weight", [None, {}, {"format": "dense"}, {"format": 1, "values": {"array": "t"}}, "dense",
                                    {"format": "dense", "values": {"array": "t"}, "more": 1}, {"array": "t"},
                                    {"format": "blocks", "rows": "2", "values": {"array": "t"}}])  # fmt: skip
def test_weights_that_are_none(tmp_path: Path, weight: Any) -> None:
    layer = {"step": "linear", "x": 0, "y": 0, "weight": weight, "w_scale": {"array": "t"}, "bias": None,
             "x_scale": 1.0, "x_zero_point": 0}  # fmt: skip
    content = header(native([[4, "f32", "tokens"]], [ENTER, layer, LEAVE]))
    refused(tmp_path / "a.plan", content, r"\(linear: weight ", {"t": np.ones(4, np.float32)})


# ---- one more step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Double(Step):
    """y = scale * (x + x), in float: what one who adds a step writes, in one place."""

    name: ClassVar[str] = "double"

    x: Floats
    y: Made
    factor: Ref

    def call(self, program: _native.Program, held: Held) -> None:
        program.binary(a=self.x, b=self.x, y=self.y, op="add")
        program.affine(x=self.y, y=self.y, mul=self.factor.of(held), add=None)

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        return 2 * buffers[self.x].rows * counts.tokens(self.buffer(buffers).geometry)


DOUBLE = Double(0, 1, Ref("factor"))


def test_a_step_that_is_new_needs_nothing_but_its_declaration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plan.json, the session, its errors and profiles take it up."""
    assert DOUBLE.to_json() == {"step": "double", "x": 0, "y": 1, "factor": {"array": "factor"}}
    segment = native([[4, "f32", "tokens"]] * 2, [ENTER, DOUBLE.to_json(), {**LEAVE, "x": 1}])
    factor = {"factor": np.array([1, 2, 3, 4], np.float32)}
    refused(tmp_path / "a.plan", header(segment, layers=[]), "unknown step 'double'", factor)
    monkeypatch.setitem(STEPS, Double.name, Double)
    refused(tmp_path / "b.plan", header(segment, layers=[]), "an array 'factor' that it does not hold")
    wrong = native([[4, "f32", "tokens"]] * 2, [ENTER, {**DOUBLE.to_json(), "y": None}, {**LEAVE, "x": 1}])
    refused(tmp_path / "b.plan", header(wrong, layers=[]), r"\(double: y is no integer\)", factor)

    write_plan(tmp_path / "c.plan", header(segment, layers=[]), factor, {})
    session = load_cpu(tmp_path / "c.plan")
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(session.run({"x": values})["y"], 2 * values * factor["factor"])

    told = [("enter", "4"), ("double", "4"), ("leave", "4")]
    double = steps_of(session.header, session.plan.arrays, told)[1]
    assert (double.kind, double.label, double.declared) == ("double", "double 4", DOUBLE)
    (program,) = session.programs
    assert program is not None
    at = count(np.array([3, 3]), 3, class_token=False)
    assert DOUBLE.multiply_adds(program.buffers, session.plan.arrays, at) == 2 * 4 * 6
    assert moved_bytes(DOUBLE, program, session.plan.arrays, at) == 2 * 4 * 4 * 6 + 4 * 4


def test_a_step_is_named_in_three_files() -> None:
    """Its declaration, the operation that writes it, and where a graph is matched: to add one, these are edited."""
    known = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    cpu = "backends/cpu"
    for words, files in (
        ("AddPositions|add_positions", {f"{cpu}/steps/tokens.py", f"{cpu}/ops.py", f"{cpu}/match.py"}),
        ("AttentionFloat|attention_float", {f"{cpu}/steps/attention.py", f"{cpu}/ops.py", f"{cpu}/match.py"}),
    ):
        assert {path for path, text in known.items() if re.search(rf"\b({words})\b", text)} == files
