"""Matched operations: what a part of a graph computes over token tensors, and which engine steps do that.

The matcher finds them, partition and fusion read them by type, and each writes itself as steps (`emit`). Linear layers
are written by what they take in (`emit_linear.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.backends.cpu.pack import halved
from nmcompile.backends.cpu.steps import Buffer, Layout, attention, linear, rows, tokens
from nmcompile.backends.cpu.streams import Space

if TYPE_CHECKING:
    from nmcompile.backends.cpu.emit import Emitter


@dataclass(frozen=True)
class Form:
    """How a value lies in memory: "f32", or "u8"/"keys"/"values" with its scale and zero point."""

    layout: Layout = "f32"
    scale: float = 1.0
    zero_point: int = 0


FLOAT = Form()


@dataclass(frozen=True)
class Read:
    tensor: str
    form: Form = FLOAT


@dataclass(frozen=True, eq=False, kw_only=True)
class Op(ABC):
    """One operation of the engine: what it reads, the tensor it makes with its rows (features), whose tokens it has,
    and the graph nodes it stands for."""

    pays: ClassVar[bool] = False  # a segment of several such is worth the way in and out

    reads: tuple[Read, ...]
    y: str
    rows: int
    space: Space
    nodes: tuple[gs.Node, ...]
    name: str = ""

    @property
    def takes(self) -> tuple[str, ...]:
        """Inputs of the graph that it reads beside token tensors: ids, images, masks."""
        return ()

    @property
    def rows_in(self) -> int:
        """Features of the tensors that it reads."""
        return self.rows

    @abstractmethod
    def emit(self, to: Emitter) -> None:
        """Write it as steps."""


# ---- layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class AnyLinear(Op):
    """x w^T + bias with w [N, K]; bias float32 [N]. key: what of the source file the weight is (ir.layer_keys)."""

    pays: ClassVar[bool] = True

    weight: np.ndarray
    bias: np.ndarray | None
    key: str = ""

    @property
    def rows_in(self) -> int:
        return int(self.weight.shape[1])

    def emit(self, to: Emitter) -> None:
        raise AssertionError("linear layers are written as chains")


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(AnyLinear):
    """Of u8 inputs and an int8 weight, scale float32 [N]."""

    scale: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearFloat(AnyLinear):
    """In float32 throughout."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AnyAttention(Op):
    """Reads queries, keys and values. mask: the padding [batch, tokens]; assumes: what guards demand of it."""

    pays: ClassVar[bool] = True

    heads: int
    scale: float
    causal: bool
    mask: str | None
    assumes: tuple[str, ...]

    @property
    def takes(self) -> tuple[str, ...]:
        return () if self.mask is None else (self.mask,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(AnyAttention):
    """Of 8-bit queries, keys and values."""

    def emit(self, to: Emitter) -> None:
        q, k, v = (read.form for read in self.reads)
        y, form, rest = to.store(self, self.y, attention.Attention)
        to.step(attention.Attention(
            q=to.x(self, 0), k=to.x(self, 1), v=to.x(self, 2), y=y, heads=self.heads, scale=self.scale,
            q_scale=q.scale, q_zero_point=q.zero_point, k_scale=k.scale, v_scale=v.scale, causal=self.causal,
            y_scale=form.scale, y_zero_point=form.zero_point,
        ))  # fmt: skip
        to.finish(self, rest)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionFloat(AnyAttention):
    """In float32 throughout."""

    def emit(self, to: Emitter) -> None:
        y, form, rest = to.store(self, self.y, attention.AttentionFloat)
        to.step(attention.AttentionFloat(
            q=to.x(self, 0), k=to.x(self, 1), v=to.x(self, 2), y=y, heads=self.heads, scale=self.scale,
            causal=self.causal, y_scale=form.scale, y_zero_point=form.zero_point,
        ))  # fmt: skip
        to.finish(self, rest)


# ---- each token by itself -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Op):
    """gamma, beta float32 [rows]; rms: the mean is left alone."""

    gamma: np.ndarray
    beta: np.ndarray | None
    eps: float
    rms: bool

    def emit(self, to: Emitter) -> None:
        """As floats where they are wanted, and in one quantized form; a factor behind it goes into that one."""
        fusion = to.fusion
        factor = next((item for item in fusion.smoothed.values() if item.reads[0].tensor == self.y), None)
        forms = {form for user, form in fusion.users[self.y] if user is not factor}
        forms |= {FLOAT} if self.y in fusion.leaving else set()
        small = sorted((f for f in forms if f.layout == "u8"), key=lambda f: (f.scale, f.zero_point))
        name, fused = self.y, small[0] if small else None
        if factor is not None:
            name, fused = factor.y, fusion.users[factor.y][0][1]
        rest = sorted(forms - {FLOAT, fused}, key=lambda f: (f.layout, f.scale, f.zero_point))
        y = to.buffer(self.y, FLOAT, self.rows, self.space) if FLOAT in forms or rest else -1
        q = -1 if fused is None else to.buffer(name, fused, self.rows, self.space)
        mul, add = (None, None) if factor is None else (to.array(factor.mul, "mul"), to.array(factor.add, "add"))
        to.step(rows.LayerNorm(
            x=to.x(self), gamma=to.held(self.gamma, "gamma"), beta=to.array(self.beta, "beta"), eps=self.eps,
            rms=self.rms, y=y, q=q, scale=fused.scale if fused else 1.0, zero_point=fused.zero_point if fused else 0,
            q_mul=mul, q_add=add,
        ))  # fmt: skip
        to.finish(self, rest)


@dataclass(frozen=True, eq=False, kw_only=True)
class Unary(Op):
    """op: an activation of the engine's."""

    op: str

    def emit(self, to: Emitter) -> None:
        to.as_floats(self, lambda y: rows.Unary(x=to.x(self), y=y, op=self.op))


@dataclass(frozen=True, eq=False, kw_only=True)
class Binary(Op):
    """op: "add", "sub" or "mul", of two token tensors."""

    op: str

    def emit(self, to: Emitter) -> None:
        to.as_floats(self, lambda y: rows.Binary(a=to.x(self, 0), b=to.x(self, 1), y=y, op=self.op))


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Op):
    """x * mul + add, float32 [rows] each."""

    mul: np.ndarray | None
    add: np.ndarray | None

    def emit(self, to: Emitter) -> None:
        mul, add = to.array(self.mul, "mul"), to.array(self.add, "add")
        to.as_floats(self, lambda y: rows.Affine(x=to.x(self), y=y, mul=mul, add=add))


# ---- tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class AddPositions(Op):
    """table: float32 [tokens, rows]."""

    table: np.ndarray

    def emit(self, to: Emitter) -> None:
        to.as_floats(self, lambda y: tokens.AddPositions(x=to.x(self), y=y, table=to.held(self.table, "positions")))


@dataclass(frozen=True)
class Lookup:
    """Rows of a table float32 [V, rows] by ids, of a kind of `lookups.Ids`: `source` the graph's input that they are
    or are counted in, `first` its pad, the first position or the row."""

    kind: str
    table: np.ndarray
    source: str | None = None
    first: int = 0

    def written(self, slots: Mapping[str, int]) -> tokens.Source:
        if self.source is None:
            return tokens.Source("constant" if self.kind == "row" else self.kind, self.first)
        return tokens.Source(self.kind, slots[self.source], self.first if self.kind == "cumulative" else None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Embed(Op):
    """A sum of look-ups."""

    lookups: tuple[Lookup, ...]

    @property
    def takes(self) -> tuple[str, ...]:
        return tuple(lookup.source for lookup in self.lookups if lookup.source is not None)

    def emit(self, to: Emitter) -> None:
        slots = {name: to.slot(name) for name in self.takes}
        tables = tuple(to.held(halved(lookup.table), "table") for lookup in self.lookups)
        sources = tuple(lookup.written(slots) for lookup in self.lookups)
        to.as_floats(self, lambda y: tokens.Embed(y=y, tables=tables, sources=sources))


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchEmbed(Op):
    """Patches of an image, each a token of weight float32 [rows, pixels], behind a class token `row`."""

    image: str
    channels: int
    patch: tuple[int, int]
    weight: np.ndarray
    bias: np.ndarray | None
    row: np.ndarray

    @property
    def takes(self) -> tuple[str, ...]:
        return (self.image,)

    def emit(self, to: Emitter) -> None:
        entering = to.places.entering
        pixels, patches = (to.unnamed(Buffer(size, "f32", entering)) for size in (self.weight.shape[1], self.rows))
        height, width = self.patch
        to.step(tokens.Patches(y=pixels, slot=to.slot(self.image), channels=self.channels, patch_h=height,
                              patch_w=width))  # fmt: skip
        weight = to.held(self.weight, "weight")
        to.step(linear.ProjectPatches(x=pixels, y=patches, weight=weight, bias=to.array(self.bias, "bias")))
        row = to.held(self.row, "row")
        to.as_floats(self, lambda y: tokens.Prepend(x=patches, y=y, row=row))


@dataclass(frozen=True, eq=False, kw_only=True)
class First(Op):
    """The first token of each sequence."""

    def emit(self, to: Emitter) -> None:
        to.as_floats(self, lambda y: tokens.First(x=to.x(self), y=y))


@dataclass(frozen=True, eq=False, kw_only=True)
class View(Op):
    """The same values under an output's name; the session changes shape or type on the way out (`program.VIEWS`)."""

    view: str

    def emit(self, to: Emitter) -> None:
        to.view(self.y, to.x(self), self.view)
