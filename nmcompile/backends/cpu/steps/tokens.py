"""Steps that move tokens in, out and between (native/engine/steps_io.cc)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self, TypeAlias

from nmcompile import _native
from nmcompile.backends.cpu.steps.declare import (
    Floats,
    Gives,
    Held,
    Holds,
    Made,
    Part,
    Ref,
    Step,
    Takes,
    integer,
    word,
)

Taken: TypeAlias = Annotated[int, Takes()]
Given: TypeAlias = Annotated[int, Gives()]


@dataclass(frozen=True)
class Source(Part):
    """Which row of a table each token reads: ["input", slot] its id in an input; ["cumulative", slot, pad] RoBERTa's
    count of ids that are not `pad`; ["position", offset]; ["constant", row]."""

    kind: str
    number: int
    pad: int | None = None

    def to_json(self) -> list[object]:
        return [self.kind, self.number, *([] if self.pad is None else [self.pad])]

    @classmethod
    def from_json(cls, value: object) -> Self:
        if not isinstance(value, list) or len(value) not in (2, 3):
            raise TypeError("are no lists such as [\"input\", 0]")
        return cls(word(value[0]), *(integer(number) for number in value[1:]))

    @property
    def slot(self) -> int | None:
        """The input that it reads."""
        return self.number if self.kind in ("input", "cumulative") else None

    def room(self, rows: int) -> int | None:
        """The most tokens for which a table of so many rows suffices, where that depends on their number."""
        if self.kind == "position":
            return rows - self.number
        return rows - (self.pad or 0) - 1 if self.kind == "cumulative" else None


@dataclass(frozen=True)
class Embed(Step):
    """y = the sum of one row of each table."""

    name: ClassVar[str] = "embed"
    order: ClassVar[tuple[str, ...]] = ("sources", "tables", "y")

    y: Made
    tables: Annotated[tuple[Ref, ...], Holds((None, "y"), ("float32", "float16"), looked_up=True)]
    sources: tuple[Source, ...]

    def call(self, program: _native.Program, held: Held) -> None:
        sources = [tuple(source.to_json()) for source in self.sources]
        program.embed(y=self.y, tables=[table.of(held) for table in self.tables], sources=sources)


@dataclass(frozen=True)
class Enter(Step):
    """y = an input [batch, tokens, rows]."""

    name: ClassVar[str] = "enter"

    y: Made
    slot: Taken

    def call(self, program: _native.Program, held: Held) -> None:
        program.enter(y=self.y, slot=self.slot)


@dataclass(frozen=True)
class Leave(Step):
    """An output [batch, tokens, rows], or [batch, rows] of first tokens, zero where padded."""

    name: ClassVar[str] = "leave"

    x: Floats
    slot: Given

    def call(self, program: _native.Program, held: Held) -> None:
        program.leave(x=self.x, slot=self.slot)


@dataclass(frozen=True)
class First(Step):
    """The first token of each sequence."""

    name: ClassVar[str] = "first"

    x: Floats
    y: Made

    def call(self, program: _native.Program, held: Held) -> None:
        program.first(x=self.x, y=self.y)


@dataclass(frozen=True)
class Rest(Step):
    """All tokens of each sequence but the first."""

    name: ClassVar[str] = "rest"

    x: Floats
    y: Made

    def call(self, program: _native.Program, held: Held) -> None:
        program.rest(x=self.x, y=self.y)


@dataclass(frozen=True)
class AddPositions(Step):
    """y = x + the row of the table for each token's position."""

    name: ClassVar[str] = "add_positions"
    order: ClassVar[tuple[str, ...]] = ("x", "table", "y")

    x: Floats
    y: Made
    table: Annotated[Ref, Holds((None, "x"), looked_up=True)]

    def call(self, program: _native.Program, held: Held) -> None:
        program.add_positions(x=self.x, y=self.y, table=self.table.of(held))


@dataclass(frozen=True)
class Patches(Step):
    """y = the pixels of each patch of an image [batch, channels, height, width], a token each."""

    name: ClassVar[str] = "patches"

    y: Made
    slot: Taken
    channels: int
    patch_h: int
    patch_w: int

    def call(self, program: _native.Program, held: Held) -> None:
        program.patches(
            y=self.y, slot=self.slot, channels=self.channels, patch_h=self.patch_h, patch_w=self.patch_w
        )

    def length(self, shape: Sequence[int]) -> int:
        _, height, width = shape[1:]
        return (height // self.patch_h) * (width // self.patch_w)


@dataclass(frozen=True)
class Prepend(Step):
    """One row before the tokens of each sequence: a class token."""

    name: ClassVar[str] = "prepend"
    order: ClassVar[tuple[str, ...]] = ("x", "row", "y")

    x: Floats
    y: Made
    row: Annotated[Ref, Holds(("x",))]

    def call(self, program: _native.Program, held: Held) -> None:
        program.prepend(x=self.x, y=self.y, row=self.row.of(held))


STEPS: tuple[type[Step], ...] = (Embed, Enter, Leave, First, Rest, AddPositions, Patches, Prepend)
