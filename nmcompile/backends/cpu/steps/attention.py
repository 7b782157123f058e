"""Attention over all tokens of a sequence (native/engine/steps_attention.cc)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from nmcompile import _native
from nmcompile.backends.cpu.steps.declare import Buffer, Floats, Held, Reads, Step, Writes
from nmcompile.backends.cpu.streams import Counts


@dataclass(frozen=True)
class Attention(Step):
    """Queries u8, keys and values in the tiles that its products read."""

    name: ClassVar[str] = "attention"
    together: ClassVar[tuple[str, ...]] = ("offset",)

    q: Annotated[int, Reads(("u8",))]
    k: Annotated[int, Reads(("keys",))]
    v: Annotated[int, Reads(("values",))]
    y: Annotated[int, Writes(("u8", "f32"))]
    heads: int
    scale: float
    q_scale: float
    q_zero_point: int
    k_scale: float
    v_scale: float
    causal: bool = False
    y_scale: float = 1.0
    y_zero_point: int = 0
    offset: int | None = None  # positions of queries behind those of keys, where they are not the same tokens

    def call(self, program: _native.Program, held: Held) -> None:
        program.attention(
            q=self.q, k=self.k, v=self.v, y=self.y, heads=self.heads, scale=self.scale, q_scale=self.q_scale,
            q_zero_point=self.q_zero_point, k_scale=self.k_scale, v_scale=self.v_scale, causal=self.causal,
            y_scale=self.y_scale, y_zero_point=self.y_zero_point, offset=self.offset,
        )  # fmt: skip

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        return _products(buffers[self.q], buffers[self.k], self.causal, counts)


@dataclass(frozen=True)
class AttentionFloat(Step):
    """Queries, keys and values in float32."""

    name: ClassVar[str] = "attention_float"
    together: ClassVar[tuple[str, ...]] = ("offset",)
    multiplies_floats: ClassVar[bool] = True

    q: Floats
    k: Floats
    v: Floats
    y: Annotated[int, Writes(("u8", "f32"))]
    heads: int
    scale: float
    causal: bool = False
    y_scale: float = 1.0
    y_zero_point: int = 0
    offset: int | None = None  # positions of queries behind those of keys, where they are not the same tokens

    def call(self, program: _native.Program, held: Held) -> None:
        program.attention_float(
            q=self.q, k=self.k, v=self.v, y=self.y, heads=self.heads, scale=self.scale, causal=self.causal,
            y_scale=self.y_scale, y_zero_point=self.y_zero_point, offset=self.offset,
        )  # fmt: skip

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        return _products(buffers[self.q], buffers[self.k], self.causal, counts)


def _products(queries: Buffer, keys: Buffer, causal: bool, counts: Counts) -> int:
    """Queries with keys, and probabilities with values, of all heads."""
    return 2 * queries.rows * counts.pairs(queries.geometry, keys.geometry, causal)


STEPS: tuple[type[Step], ...] = (Attention, AttentionFloat)
