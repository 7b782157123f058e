"""Writes one native segment: buffers by number, steps in order, arrays by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nmcompile.backends.cpu.emit_linear import LayerFacts, emit_chain
from nmcompile.backends.cpu.fuse import Fusion
from nmcompile.backends.cpu.kernels import choose_kernels
from nmcompile.backends.cpu.ops import FLOAT, Form, Op, PatchEmbed
from nmcompile.backends.cpu.partition import Segment
from nmcompile.backends.cpu.program import Program
from nmcompile.backends.cpu.steps import Buffer, Ref, Step, layouts
from nmcompile.backends.cpu.steps.rows import Quantize
from nmcompile.backends.cpu.steps.tokens import Enter, Leave
from nmcompile.backends.cpu.streams import Places, Space
from nmcompile.backends.cpu.tuning import Choice, Choose


@dataclass
class Emitter:
    """What operations write themselves to. `arrays` are the plan's, which all of its segments add to."""

    segment: Segment
    stem: str  # of the names of its arrays
    arrays: dict[str, np.ndarray]
    fusion: Fusion
    choices: Mapping[str, Choice]  # of kernels, by the result of a layer's product
    places: Places
    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    values: dict[tuple[str, Form], int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    stored: dict[int, tuple[np.ndarray, Ref]] = field(default_factory=dict)  # by id, and kept so that it stays theirs
    views: dict[str, str] = field(default_factory=dict)

    # ---- values ----

    def buffer(self, name: str, form: Form, rows: int, space: Space) -> int:
        """A new buffer, which holds a tensor in a form from now on."""
        number = self.unnamed(Buffer(rows, form.layout, self.places.geometry(space)))
        self.values[(name, form)] = number
        return number

    def unnamed(self, buffer: Buffer) -> int:
        """A new buffer for what is no tensor of the graph."""
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def x(self, op: Op, index: int = 0) -> int:
        """The buffer that an operation reads."""
        read = op.reads[index]
        return self.values[(read.tensor, read.form)]

    def floats(self, name: str, rows: int, space: Space) -> int:
        """The buffer of a tensor as floats, which enters the segment if nothing in it makes it."""
        if (name, FLOAT) not in self.values:
            self.enter(name, rows, space)
        return self.values[(name, FLOAT)]

    def enter(self, name: str, rows: int, space: Space) -> None:
        """Take in a tensor in all forms that are wanted; what enters has all its tokens."""
        whole = space.whole()
        self.step(Enter(y=self.buffer(name, FLOAT, rows, whole), slot=self.slot(name)))
        for form in self.fusion.forms(name) - {FLOAT}:
            self.quantize(name, rows, form, whole)

    def quantize(self, name: str, rows: int, form: Form, space: Space) -> None:
        x = self.values[(name, FLOAT)]
        y = self.buffer(name, form, rows, space)
        self.step(Quantize(x=x, y=y, scale=form.scale, zero_point=form.zero_point))

    def store(self, op: Op, name: str, by: type[Step]) -> tuple[int, Form, list[Form]]:
        """The buffer an operation writes, in the only form wanted if the step can write that, and the forms to add
        after."""
        forms = self.fusion.forms(name)
        form, rest = next(iter(forms)), list[Form]()
        if len(forms) > 1 or form.layout not in layouts(by, "y"):
            form, rest = FLOAT, _sorted(forms - {FLOAT})
        return self.buffer(name, form, op.rows, op.space), form, rest

    def finish(self, op: Op, rest: list[Form]) -> None:
        """The forms that a step could not write."""
        for form in rest:
            self.quantize(op.y, op.rows, form, op.space)

    # ---- what operations write ----

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def as_floats(self, op: Op, step: Callable[[int], Step]) -> None:
        """A step that writes floats alone, made for the number of the buffer that it writes."""
        y = self.buffer(op.y, FLOAT, op.rows, op.space)
        self.step(step(y))
        self.finish(op, _sorted(self.fusion.forms(op.y) - {FLOAT}))

    def view(self, name: str, number: int, view: str) -> None:
        """The output `name` is a buffer that is there, seen in another way."""
        self.values[(name, FLOAT)] = number
        self.views[name] = view

    def held(self, values: np.ndarray, stem: str) -> Ref:
        """A reference to an array of the plan; the same array is stored once."""
        if id(values) not in self.stored:
            ref = Ref(f"{self.stem}/{len(self.arrays):04d}.{stem}")
            self.arrays[ref.name] = np.ascontiguousarray(values)
            self.stored[id(values)] = values, ref
        return self.stored[id(values)][1]

    def array(self, values: np.ndarray | None, stem: str) -> Ref | None:
        """The same of one that may be left out."""
        return None if values is None else self.held(values, stem)

    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def program(self) -> Program:
        outputs = self.segment.outputs
        return Program(tuple(self.slots), self.segment.mask, tuple(outputs), self.views, tuple(self.buffers),
                       tuple(self.steps))  # fmt: skip


def emit(
    segment: Segment, stem: str, arrays: dict[str, np.ndarray], choose: Choose
) -> tuple[Program, list[LayerFacts]]:
    """A native segment as a program, its arrays added to `arrays`; and what there is to tell of its layers."""
    ops, choices = choose_kernels(segment, choose)
    fusion = Fusion(ops, segment.outputs)
    places = Places(class_token=any(isinstance(op, PatchEmbed) for op in ops))
    to = Emitter(segment, stem, arrays, fusion, choices, places)
    for op in fusion.ops:
        for read in op.reads:
            if read.tensor not in fusion.makers:
                to.floats(read.tensor, op.rows_in, op.space)
        chain = fusion.chains.get(id(op))
        if chain is not None:
            emit_chain(chain, to)
        elif id(op) not in fusion.absorbed:
            op.emit(to)
    for slot, name in enumerate(segment.outputs):
        to.step(Leave(x=to.values[(name, FLOAT)], slot=slot))
    return to.program(), to.layers


def _sorted(forms: Iterable[Form]) -> list[Form]:
    return sorted(forms, key=lambda form: (form.layout, form.scale, form.zero_point))
