"""Declarations of engine steps: they are the engine's, and plan.json, the session and profiles follow from them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
from compiled import compiled
from small_plans import ENTER, LEAVE, header, native, refused

import nmcompile
from nmcompile import _native
from nmcompile.backends.cpu import steps
from nmcompile.backends.cpu.program import Program
from nmcompile.backends.cpu.steps import STEPS, Buffer, Held, Ref, Step
from nmcompile.backends.cpu.steps.declare import (
    NONE,
    Field,
    Floats,
    Gives,
    Holds,
    Layout,
    Made,
    Reads,
    Takes,
    Writes,
    declared,
)
from nmcompile.backends.cpu.steps.linear import Weight
from nmcompile.backends.cpu.steps.rows import LayerNorm, Unary
from nmcompile.backends.cpu.steps.tokens import Source
from nmcompile.backends.cpu.streams import CLASSED, ENTERED, FIRST, Counts, count
from nmcompile.plan import read_plan, write_plan
from nmcompile.profile.work import moved_bytes, steps_of
from nmcompile.session import load_cpu

PACKAGE = Path(nmcompile.__file__).parent
STUB = next(item for item in ast.parse((PACKAGE / "_native.pyi").read_text()).body
            if isinstance(item, ast.ClassDef) and item.name == "Program")  # fmt: skip
METHODS = {item.name: item for item in STUB.body if isinstance(item, ast.FunctionDef)}
ROWS = 8  # of all buffers but for the pixels of patches
LAYOUTS: tuple[Layout, ...] = ("f32", "u8", "keys", "values")

every = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


# ---- they are the engine's ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    default: object = MISSING


def arguments(method: ast.FunctionDef) -> list[Argument]:
    """Of a method, without self; each with the text of its type."""
    given = method.args.args[1:]
    defaults = [ast.literal_eval(default) for default in method.args.defaults]
    defaults = [MISSING] * (len(given) - len(defaults)) + defaults
    return [Argument(item.arg, ast.unparse(item.annotation) if item.annotation else "", default)
            for item, default in zip(given, defaults, strict=True)]  # fmt: skip


def type_of(field: Field) -> str:
    """What the engine's stub calls the type of a declared field."""
    if isinstance(field.role, Reads | Writes | Takes | Gives):
        return "int"
    none = " | None" if NoneType in get_args(field.type) else ""
    if isinstance(field.role, Holds):
        array = "_F32" if field.role.dtypes == ("float32",) else "NDArray[Any]"
        return f"Sequence[{array}]" if field.type == tuple[Ref, ...] else array + none
    special = {Weight: "dict[str, Any]", tuple[Source, ...]: "Sequence[tuple[Any, ...]]"}
    if field.type in special:
        return special[field.type]
    plain = [option for option in get_args(field.type) if option is not NoneType] or [field.type]
    return " | ".join(option.__name__ for option in plain) + none


@every
def test_a_declaration_has_the_arguments_of_its_method(step: type[Step]) -> None:
    own = [Argument(name, type_of(field), field.default) for name, field in declared(step).items()]
    assert own == arguments(METHODS[step.name])


def test_every_method_that_adds_a_step_is_declared() -> None:
    """They return nothing and read or write a buffer, x or y."""
    adding = {name for name, method in METHODS.items()
              if isinstance(method.returns, ast.Constant) and method.returns.value is None
              and {"x", "y"} & {argument.name for argument in arguments(method)}}  # fmt: skip
    assert adding == set(STEPS)


# ---- one made by its declaration alone ------------------------------------------------------------------------------

OPTIONS: Mapping[str, object] = {
    "heads": 2, "op": "add", "channels": 2, "patch_h": 2, "patch_w": 2, "activation": "relu", "causal": True,
    "rms": True, "x_zero_point": 3, "q_zero_point": 3, "y_zero_point": 5, "zero_point": 5,
}  # fmt: skip
PACKED = Weight("dense", Ref("packed"))
ARRAYS: Held = {"packed": np.ones((2, 2, 4, 4), np.int8)}


@dataclass
class Example:
    """A step and all that it needs to be added: no two of its arguments are alike where that can be."""

    step: Step
    buffers: list[Buffer]
    held: dict[str, np.ndarray]

    def build(self) -> _native.Program:
        """A program that fills what the step reads and then has the step."""
        program = _native.Program(threads=1)
        for buffer in self.buffers:
            program.buffer(buffer.rows, buffer.layout, buffer.geometry)
        for number in self.step.reads():
            fill(program, number, self.buffers[number])
        self.step.call(program, self.held)
        return program


def example(step: type[Step], **layouts: Layout) -> Example:
    """With the first layout declared for each buffer, or that of `layouts`."""
    given: dict[str, Any] = {}
    buffers: list[Buffer] = []
    held = dict(ARRAYS)
    for name, field in declared(step).items():
        role = field.role
        if isinstance(role, Reads | Writes):
            given[name] = len(buffers)
            buffers.append(Buffer(ROWS, layouts.get(name, role.layouts[0]), geometry(step, name)))
        elif isinstance(role, Holds):
            held[name] = np.full([3 if size is None else ROWS for size in role.shape], len(held), role.dtypes[0])
            given[name] = (Ref(name),) if field.type == tuple[Ref, ...] else Ref(name)
        elif isinstance(role, Takes | Gives):
            given[name] = 0
        elif field.type is Weight:
            given[name] = PACKED
        elif field.type == tuple[Source, ...]:
            given[name] = (Source("constant", 1),)
        elif NoneType in get_args(field.type):
            given[name] = None
        elif name in OPTIONS:
            given[name] = OPTIONS[name]
        else:
            given[name] = 0.25 + len(given) / 16  # a number that float32 holds
    if step is Unary:
        given["op"] = "relu"
    return Example(step(**given), buffers, held)


def geometry(step: type[Step], field: str) -> str:
    """Of the buffers that must be of other tokens than those that enter."""
    return {("first", "y"): FIRST, ("prepend", "y"): CLASSED}.get((step.name, field), ENTERED)


def fill(program: _native.Program, number: int, buffer: Buffer) -> None:
    """Let a buffer of any layout, of what enters or has a class token, hold something."""
    wanted = [(ENTERED, "f32")]
    wanted += [(CLASSED, "f32")] if buffer.geometry == CLASSED else []
    wanted += [(buffer.geometry, "u8")] if buffer.layout != "f32" else []
    wanted += [(buffer.geometry, buffer.layout)] if buffer.layout not in ("f32", "u8") else []
    x = -1
    for at, (words, layout) in enumerate(wanted, 1):
        y = number if at == len(wanted) else program.buffer(buffer.rows, layout, words)
        if x < 0:
            program.enter(y=y, slot=9)
        elif layout == "f32":
            program.prepend(x=x, y=y, row=np.ones(ROWS, np.float32))
        elif layout == "u8":
            program.quantize(x=x, y=y, scale=0.5, zero_point=0)
        else:
            program.linear(x=x, y=y, weight=PACKED.of(ARRAYS), w_scale=np.ones(ROWS, np.float32), bias=None,
                           x_scale=0.5, x_zero_point=0)  # fmt: skip
        x = y


def buffer_fields(step: type[Step]) -> Iterator[tuple[str, Reads | Writes]]:
    yield from ((name, field.role) for name, field in declared(step).items() if isinstance(field.role, Reads | Writes))


@every
def test_the_engine_takes_a_buffer_in_the_declared_layouts_and_no_other(step: type[Step]) -> None:
    for name, role in buffer_fields(step):
        for layout in LAYOUTS:
            made = example(step, **{name: layout})
            if layout in role.layouts:
                made.build()
            else:
                with pytest.raises(ValueError, match=f"{step.name}: {name} "):
                    made.build()


@every
def test_a_buffer_that_may_be_left_out_is_one_with_a_default(step: type[Step]) -> None:
    for name, _ in buffer_fields(step):
        made = example(step)
        without = replace(made, step=replace(made.step, **{name: NONE}))
        if declared(step)[name].default == NONE:
            without.build()
        else:
            with pytest.raises(ValueError, match=f"{step.name}: {name} "):
                without.build()


@every
def test_the_engine_takes_arrays_of_the_declared_types_and_shapes_and_no_other(step: type[Step]) -> None:
    for name, field in declared(step).items():
        role = field.role
        if not isinstance(role, Holds):
            continue
        right = example(step).held[name]
        wrong = [np.concatenate([right, right], axis) for axis, size in enumerate(role.shape) if size is not None]
        wrong += [right.astype(kind) for kind in ("float64", "int8", "float16") if kind not in role.dtypes]
        for values in (*wrong, right[None], *(right.astype(kind) for kind in role.dtypes)):
            made = example(step)
            made.held[name] = values
            if values.dtype.name in role.dtypes and values.shape == right.shape:
                made.build()
            else:
                with pytest.raises(ValueError, match=f"{step.name}: {name.rstrip('s')}"):
                    made.build()


class Recorder:
    """In place of an engine: what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda **given: self.calls.append((name, given))


@every
def test_a_step_hands_over_every_field(step: type[Step]) -> None:
    made = example(step)
    engine: Any = Recorder()
    made.step.call(engine, made.held)
    ((name, given),) = engine.calls
    assert name == step.name and list(given) == list(declared(step))
    for key, value in given.items():
        field = getattr(made.step, key)
        if isinstance(field, Ref):
            assert value is made.held[field.name]
        elif isinstance(field, Weight):
            assert value == {"format": "dense", "values": made.held["packed"]}
        elif key == "tables":
            assert len(value) == 1 and value[0] is made.held["tables"]
        else:
            assert value == ([("constant", 1)] if key == "sources" else field)


# ---- plan.json ------------------------------------------------------------------------------------------------------


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
