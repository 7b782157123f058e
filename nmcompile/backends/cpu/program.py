"""What plan.json says of a native segment: names in and out, buffers, steps; and what is known of it from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu import steps
from nmcompile.backends.cpu.steps import Buffer, Held, Json, Step, tokens
from nmcompile.errors import PlanError

Arrays = dict[str, np.ndarray]

# What becomes of an output on its way out: the model gives it another name, shape or type than the engine.
VIEWS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda values: values,
    "squeeze": lambda values: np.asarray(values[..., 0]),
    "float16": lambda values: values.astype(np.float16),
}


@dataclass(frozen=True)
class Program:
    """A list of steps over buffers. mask: the input by which tokens are dropped; views: of VIEWS, by output."""

    inputs: tuple[str, ...]
    mask: str | None
    outputs: tuple[str, ...]
    views: Mapping[str, str]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]

    def to_json(self) -> Json:
        return {
            "kind": "native", "inputs": list(self.inputs), "mask": self.mask, "outputs": list(self.outputs),
            "views": dict(self.views), "buffers": [buffer.to_json() for buffer in self.buffers],
            "steps": [step.to_json() for step in self.steps],
        }  # fmt: skip

    @classmethod
    def from_json(cls, segment: Mapping[str, Any]) -> Self:
        """PlanError, one line, for a program that does not fit together; KeyError, TypeError and their like for a
        segment that is none."""
        inputs, outputs = (tuple(str(name) for name in segment[key]) for key in ("inputs", "outputs"))
        views = {str(name): str(view) for name, view in segment["views"].items()}
        mask = segment["mask"]
        buffers, listed = segment["buffers"], segment["steps"]
        try:
            found = tuple(steps.read(step) for step in listed)
            made = tuple(Buffer.from_json(buffer) for buffer in buffers)
        except (ValueError, TypeError, OverflowError) as error:
            raise unfit(error) from None
        program = cls(inputs, None if mask is None else str(mask), outputs, views, made, found)
        leaves = sorted(slot for step in found for slot in step.gives())
        if leaves != list(range(len(outputs))) or not set(views) <= set(outputs) or (
            not set(views.values()) <= set(VIEWS)
        ):
            raise PlanError("the plan's outputs do not fit its steps; compile it again")
        return program

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that a run of it is given."""
        return (*self.inputs, *(() if self.mask is None else (self.mask,)))

    def build(self, engine: _native.Program, held: Held) -> None:
        """Add everything to an empty program of the engine. PlanError where it refuses something."""
        try:
            for buffer in self.buffers:
                engine.buffer(rows=buffer.rows, layout=buffer.layout, geometry=buffer.geometry)
            for step in self.steps:
                step.call(engine, held)
            engine.prepare()
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise unfit(error) from None

    def viewed(self, results: Sequence[np.ndarray]) -> Arrays:
        """Results of the engine by name, in the shape and type that the model gives them."""
        made = dict(zip(self.outputs, results, strict=True))
        return made | {name: VIEWS[view](made[name]) for name, view in self.views.items()}


def limits(programs: Iterable[Program], held: Held) -> tuple[dict[str, int], int | None]:
    """(rows of the table that each input looks up, most tokens that positions allow)."""
    vocabulary: dict[str, int] = {}
    longest: int | None = None
    for program in programs:
        looked_up = (step for step in program.steps if isinstance(step, tokens.Embed))
        for source, table in (pair for step in looked_up for pair in zip(step.sources, step.tables, strict=True)):
            rows = int(table.of(held).shape[0])
            if source.kind == "input":
                name = program.inputs[source.number]
                vocabulary[name] = min(rows, vocabulary.get(name, rows))
            room = source.room(rows)
            if room is not None:
                longest = room if longest is None else min(room, longest)
    return vocabulary, longest


def unfit(error: Exception) -> PlanError:
    return PlanError(f"the plan's program does not fit together ({line(error)}); compile it again")


def line(error: Exception) -> str:
    """The first line of what an error says, its class where it says nothing."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
