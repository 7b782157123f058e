"""Declarations of engine steps are the engine's: arguments, layouts of buffers, types and shapes of arrays."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np
import pytest
from step_examples import example

import nmcompile
from nmcompile.backends.cpu.steps import STEPS, Ref, Step
from nmcompile.backends.cpu.steps.declare import (
    NONE,
    Field,
    Gives,
    Holds,
    Layout,
    Reads,
    Takes,
    Writes,
    declared,
)
from nmcompile.backends.cpu.steps.linear import Weight
from nmcompile.backends.cpu.steps.tokens import Source

PACKAGE = Path(nmcompile.__file__).parent
STUB = next(item for item in ast.parse((PACKAGE / "_native.pyi").read_text()).body
            if isinstance(item, ast.ClassDef) and item.name == "Program")  # fmt: skip
METHODS = {item.name: item for item in STUB.body if isinstance(item, ast.FunctionDef)}
LAYOUTS: tuple[Layout, ...] = ("f32", "u8", "keys", "values")

every = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


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
