"""Steps of the engine made by their declarations alone, and programs that have what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu.steps import Buffer, Held, Ref, Step
from nmcompile.backends.cpu.steps.declare import (
    Gives,
    Holds,
    Layout,
    Reads,
    Takes,
    Writes,
    declared,
)
from nmcompile.backends.cpu.steps.linear import Weight
from nmcompile.backends.cpu.steps.rows import Unary
from nmcompile.backends.cpu.steps.tokens import Source
from nmcompile.backends.cpu.streams import CLASSED, ENTERED, FIRST

ROWS = 8  # of all buffers
OPTIONS: Mapping[str, object] = {
    "heads": 2, "op": "add", "channels": 2, "patch_h": 2, "patch_w": 2, "activation": "relu", "causal": True,
    "rms": True, "x_zero_point": 3, "q_zero_point": 3, "y_zero_point": 5, "zero_point": 5, "offset": 2,
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
        program.stream("behind", "rest", "tokens")
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
    others = {("first", "y"): FIRST, ("prepend", "y"): CLASSED, ("rest", "y"): "behind"}
    return others.get((step.name, field), ENTERED)


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
