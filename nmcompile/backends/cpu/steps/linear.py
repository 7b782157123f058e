"""Linear layers: y = activation(x w^T + bias) + residual (native/engine/steps_linear.cc)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from nmcompile import _native
from nmcompile.backends.cpu.steps.declare import (
    NONE,
    Buffer,
    Floats,
    Held,
    Holds,
    Json,
    Made,
    Part,
    Reads,
    Ref,
    Step,
    Writes,
    integer,
    maybe,
    word,
)
from nmcompile.backends.cpu.streams import Counts


@dataclass(frozen=True)
class Weight(Part):
    """An int8 weight as `pack.py` packs it. rows, columns, starts: of "blocks" and "gather"; 0 and None of "dense"."""

    format: str
    values: Ref
    rows: int = 0
    columns: Ref | None = None
    starts: Ref | None = None

    def to_json(self) -> Json:
        rows: Json = {"rows": self.rows} if self.rows else {}
        given = {"values": self.values, "columns": self.columns, "starts": self.starts}
        return {"format": self.format, **rows, **{key: ref.to_json() for key, ref in given.items() if ref is not None}}

    @classmethod
    def from_json(cls, value: object) -> Self:
        known = {"format", "values", "rows", "columns", "starts"}
        if not isinstance(value, dict) or not {"format", "values"} <= set(value) <= known:
            raise TypeError("is no packed weight")
        columns, starts = (Ref.from_json(value[key]) if key in value else None for key in ("columns", "starts"))
        rows = integer(value.get("rows", 0))
        return cls(word(value["format"]), Ref.from_json(value["values"]), rows, columns, starts)

    def arrays(self) -> Iterator[Ref]:
        yield from (ref for ref in (self.values, self.columns, self.starts) if ref is not None)

    def of(self, held: Held) -> dict[str, object]:
        """As the engine takes it."""
        given: dict[str, object] = {"format": self.format, "values": self.values.of(held)}
        given |= {"rows": self.rows} if self.rows else {}
        for key, ref in (("columns", self.columns), ("starts", self.starts)):
            if ref is not None:
                given[key] = ref.of(held)
        return given


@dataclass(frozen=True)
class Linear(Step):
    """x is u8, the weight int8; what leaves has the layout of y."""

    name: ClassVar[str] = "linear"
    order: ClassVar[tuple[str, ...]] = (
        "x", "y", "activation", "residual", "bias", "weight", "w_scale", "x_scale", "x_zero_point", "y_scale",
        "y_zero_point",
    )  # fmt: skip

    x: Annotated[int, Reads(("u8",))]
    y: Annotated[int, Writes(("f32", "u8", "keys", "values"))]
    weight: Weight
    w_scale: Annotated[Ref, Holds(("y",))]
    bias: Annotated[Ref | None, Holds(("y",))]
    x_scale: float
    x_zero_point: int
    activation: str = "none"
    residual: Floats = NONE
    y_scale: float = 1.0
    y_zero_point: int = 0

    def call(self, program: _native.Program, held: Held) -> None:
        program.linear(
            x=self.x, y=self.y, weight=self.weight.of(held), w_scale=self.w_scale.of(held),
            bias=maybe(self.bias, held), x_scale=self.x_scale, x_zero_point=self.x_zero_point,
            activation=self.activation, residual=self.residual, y_scale=self.y_scale, y_zero_point=self.y_zero_point,
        )  # fmt: skip

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        return int(self.weight.values.of(held).size) * counts.tokens(self.buffer(buffers).geometry)


@dataclass(frozen=True)
class LinearFloat(Step):
    """In float32 throughout."""

    name: ClassVar[str] = "linear_float"
    order: ClassVar[tuple[str, ...]] = ("x", "y", "activation", "residual", "bias", "weight")
    multiplies_floats: ClassVar[bool] = True

    x: Floats
    y: Made
    weight: Annotated[Ref, Holds(("y", "x"))]
    bias: Annotated[Ref | None, Holds(("y",))]
    activation: str = "none"
    residual: Floats = NONE

    def call(self, program: _native.Program, held: Held) -> None:
        program.linear_float(
            x=self.x, y=self.y, weight=self.weight.of(held), bias=maybe(self.bias, held), activation=self.activation,
            residual=self.residual,
        )  # fmt: skip

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        return int(self.weight.of(held).size) * counts.tokens(self.buffer(buffers).geometry)


@dataclass(frozen=True)
class ProjectPatches(LinearFloat):
    """The layer that makes tokens of patches; it has stood in plans in this order since there are any."""

    order: ClassVar[tuple[str, ...]] = ("x", "y", "weight", "activation", "residual", "bias")


STEPS: tuple[type[Step], ...] = (Linear, LinearFloat)
