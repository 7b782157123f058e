"""What each step of a plan has to do: multiply-adds and bytes, read off the plan's header and the shapes of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nmcompile.backends.cpu.program import Program
from nmcompile.backends.cpu.session import Span
from nmcompile.backends.cpu.steps import Held, Step
from nmcompile.backends.cpu.steps.linear import Linear, LinearFloat
from nmcompile.backends.cpu.steps.tokens import First, Patches
from nmcompile.backends.cpu.streams import CLASSED, FIRST, Counts, count
from nmcompile.errors import PlanError

Json = Mapping[str, Any]

OPERATORS = 4  # of a segment on onnxruntime, in its label


@dataclass(frozen=True)
class TimedLinear:
    """A linear layer as it is computed. `share`: of the dense products."""

    outputs: int
    inputs: int
    format: str  # "dense", "blocks", "gather" or "float"
    rows: int
    share: float
    activation: str

    @property
    def kernel(self) -> str:
        """As patterns are written, outputs x inputs: 2x4."""
        return {"blocks": f"{self.rows}x4", "gather": f"{self.rows}x1"}.get(self.format, self.format)


@dataclass(frozen=True)
class TimedStep:
    """A step of a plan. Steps of equal `head` and `tail` are equal but for their weights' share of zeros."""

    kind: str
    head: str  # "linear 768 -> 3072 2x4"
    tail: str = ""  # "gelu"
    layer: str = ""  # the model's name of a linear layer
    geometry: str = "tokens"
    linear: TimedLinear | None = None
    segment: int = 0
    in_float: bool = False  # its products are of floats
    declared: Step | None = field(default=None, repr=False, compare=False)  # None on onnxruntime

    @property
    def label(self) -> str:
        """All that tells it from others: "linear 768 -> 3072 2x4 10% gelu"."""
        return named(self.head, [self.linear.share] if self.sparse and self.linear else [], self.tail)

    @property
    def sparse(self) -> bool:
        return self.linear is not None and self.linear.format in ("blocks", "gather")


def named(head: str, shares: Sequence[float], tail: str) -> str:
    """The label of steps that compute these shares of their dense products."""
    low, high = (round(100 * value) for value in (min(shares, default=0), max(shares, default=0)))
    share = "" if not shares else f"{low}%" if low == high else f"{low}-{high}%"
    return " ".join(word for word in (head, share, tail) if word)


def steps_of(header: Json, held: Held, described: Sequence[tuple[str, str]]) -> list[TimedStep]:
    """The steps of a plan in the order of a session's trace; `described` (kind, text) is what the engine calls them.

    held: the plan's arrays. PlanError when the plan and the engine do not agree on the steps.
    """
    layers = iter(header["layers"])
    found: list[TimedStep] = []
    for number, segment in enumerate(header["segments"]):
        if segment["kind"] != "native":
            operators = [*segment["operators"][:OPERATORS], *(["..."] if len(segment["operators"]) > OPERATORS else [])]
            text = f"onnxruntime, {segment['nodes']} nodes: {', '.join(operators)}"
            found.append(TimedStep("onnxruntime", text, segment=number))
            continue
        program = Program.from_json(segment)
        for step, name in zip(program.steps, _layer_names(program, layers), strict=True):
            text = described[len(found)][1] if len(found) < len(described) else ""
            found.append(_step(step, program, held, text, name, number))
    if [step.kind for step in found] != [kind for kind, _ in described]:
        raise PlanError("the engine's steps are not those of the plan; compile it again")
    return found


def _layer_names(program: Program, layers: Iterator[Json]) -> list[str]:
    """The header lists linear layers in order; one may take two steps, in two forms of its result."""
    names: list[str] = []
    last: Linear | LinearFloat | None = None
    before: Step | None = None
    for step in program.steps:
        name = ""
        if isinstance(step, LinearFloat) and isinstance(before, Patches):
            name, last = "patches", None
        elif isinstance(step, (Linear, LinearFloat)):
            if last is not None and (last.weight, last.x) == (step.weight, step.x):
                name = names[-1]
            else:
                layer = next(layers, {})
                shape = tuple(program.buffers[buffer].rows for buffer in (step.y, step.x))
                name = str(layer["name"]) if shape == (layer.get("outputs"), layer.get("inputs")) else ""
            last = step if name else None
        else:
            last = None
        names.append(name)
        before = step
    return names


def _step(step: Step, program: Program, held: Held, text: str, layer: str, number: int) -> TimedStep:
    geometry = step.buffer(program.buffers).geometry
    of_first = ["of first tokens"] if geometry == FIRST and not isinstance(step, First) else []
    linear = _linear(step, program, held)
    if linear is None:
        head, tail = f"{step.name} {text}".strip(), of_first
    else:
        residual = isinstance(step, (Linear, LinearFloat)) and step.residual >= 0
        head = f"linear {linear.inputs} -> {linear.outputs} {linear.kernel}"
        tail = [] if linear.activation == "none" else [linear.activation]
        tail += [*(["+ residual"] if residual else []), *of_first]
    return TimedStep(step.name, head, " ".join(tail), layer, geometry, linear, number, step.multiplies_floats, step)


def _linear(step: Step, program: Program, held: Held) -> TimedLinear | None:
    if not isinstance(step, (Linear, LinearFloat)):
        return None
    inputs, outputs = program.buffers[step.x].rows, program.buffers[step.y].rows
    if isinstance(step, LinearFloat):
        return TimedLinear(outputs, inputs, "float", 0, 1.0, step.activation)
    whole = -(-outputs // 4) * 4 * -(-inputs // 4) * 4
    weight, share = step.weight, step.weight.values.of(held).size / whole
    return TimedLinear(outputs, inputs, weight.format, weight.rows, share, step.activation)


# ---- work -------------------------------------------------------------------------------------------------


def sizes(program: Program, span: Span) -> Counts:
    """How much one run of a native segment was given, by the shapes of its inputs and its mask."""
    batch, *rest = span.shapes[0] if span.shapes else (0,)
    made = [step.length(span.shapes[slot]) for step in program.steps for slot in step.takes()]
    padded = next((length for length in made if length is not None), math.prod(rest[:1]))
    lengths = np.full(batch, padded) if span.real is None else span.real
    return count(lengths, padded, any(buffer.geometry == CLASSED for buffer in program.buffers))


def moved_bytes(step: Step, program: Program, held: Held, at: Counts) -> int:
    """Bytes that a run of the step reads and writes if each is touched once: activations, weights, rows of tables."""
    own = step.buffer(program.buffers)
    total = 0
    for number in (*step.reads(), *step.writes()):
        buffer = program.buffers[number]
        total += buffer.row_bytes * at.tokens(buffer.geometry)
    for _ in step.takes():  # the other side is an array of the caller's
        total += own.rows * 4 * at.tokens(own.geometry)
    for _ in step.gives():  # where padding is written too
        total += own.rows * 4 * (at.tokens(FIRST) if own.geometry == FIRST else at.padded)
    for ref, looked_up in step.arrays():
        array = ref.of(held)
        each = array.nbytes // max(1, len(array)) * at.tokens(own.geometry)
        total += min(each, array.nbytes) if looked_up else array.nbytes
    return total
