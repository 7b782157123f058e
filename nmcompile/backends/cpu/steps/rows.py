"""Steps on the features of each token by itself (native/engine/steps_rows.cc)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from nmcompile import _native
from nmcompile.backends.cpu.steps.declare import NONE, Floats, Held, Holds, Made, Ref, Step, Writes, maybe

Row = Annotated[Ref | None, Holds(("x",))]  # one number per feature, or none


@dataclass(frozen=True)
class LayerNorm(Step):
    """y and q: the normalised values as floats and, by scale and zero point, as bytes; one of them may be left out.

    q holds y * q_mul + q_add where these are given.
    """

    name: ClassVar[str] = "layer_norm"
    order: ClassVar[tuple[str, ...]] = (
        "x", "y", "q", "gamma", "beta", "eps", "rms", "scale", "zero_point", "q_mul", "q_add",
    )  # fmt: skip
    together: ClassVar[tuple[str, ...]] = ("q_mul", "q_add")

    x: Floats
    gamma: Annotated[Ref, Holds(("x",))]
    beta: Row
    eps: float
    rms: bool = False
    y: Made = NONE
    q: Annotated[int, Writes(("u8",))] = NONE
    scale: float = 1.0
    zero_point: int = 0
    q_mul: Row = None
    q_add: Row = None

    def call(self, program: _native.Program, held: Held) -> None:
        program.layer_norm(
            x=self.x, gamma=self.gamma.of(held), beta=maybe(self.beta, held), eps=self.eps, rms=self.rms, y=self.y,
            q=self.q, scale=self.scale, zero_point=self.zero_point, q_mul=maybe(self.q_mul, held),
            q_add=maybe(self.q_add, held),
        )  # fmt: skip


@dataclass(frozen=True)
class Quantize(Step):
    name: ClassVar[str] = "quantize"

    x: Floats
    y: Annotated[int, Writes(("u8",))]
    scale: float
    zero_point: int

    def call(self, program: _native.Program, held: Held) -> None:
        program.quantize(x=self.x, y=self.y, scale=self.scale, zero_point=self.zero_point)


@dataclass(frozen=True)
class Unary(Step):
    """op: an activation."""

    name: ClassVar[str] = "unary"
    order: ClassVar[tuple[str, ...]] = ("x", "op", "y")

    x: Floats
    y: Made
    op: str

    def call(self, program: _native.Program, held: Held) -> None:
        program.unary(x=self.x, y=self.y, op=self.op)


@dataclass(frozen=True)
class Binary(Step):
    """op: "add", "sub" or "mul"."""

    name: ClassVar[str] = "binary"
    order: ClassVar[tuple[str, ...]] = ("a", "b", "op", "y")

    a: Floats
    b: Floats
    y: Made
    op: str

    def call(self, program: _native.Program, held: Held) -> None:
        program.binary(a=self.a, b=self.b, y=self.y, op=self.op)


@dataclass(frozen=True)
class Affine(Step):
    """y = x * mul + add, per feature."""

    name: ClassVar[str] = "affine"
    order: ClassVar[tuple[str, ...]] = ("x", "mul", "add", "y")

    x: Floats
    y: Made
    mul: Row
    add: Row

    def call(self, program: _native.Program, held: Held) -> None:
        program.affine(x=self.x, y=self.y, mul=maybe(self.mul, held), add=maybe(self.add, held))


STEPS: tuple[type[Step], ...] = (LayerNorm, Quantize, Unary, Binary, Affine)
