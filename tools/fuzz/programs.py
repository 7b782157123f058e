"""Programs of the engine: steps drawn at random, most of them sensible, and run on every instruction set.

A step or a run may raise ValueError; a run that ends gives arrays of the right shapes, the same bits on every
instruction set and with any number of threads.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile import _native
from tools.fuzz.target import Attempt, Target

ROWS = (1, 2, 3, 4, 7, 8, 12, 16, 17, 32, 64, 100)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid")
SCALES = (0.01, 0.05, 0.3, 1.0, 17.0, 40.0, 64.5, 100.0, 1e4, 1e20, 3e38, 1e-8, 1e-37, 1e-45, 0.0, -1.0, float("nan"),
          float("inf"))  # fmt: skip
ODD = (-1, 0, 1, 2, 5, 255, 256, 1000, 2**31 - 1, -(2**31))
Call = tuple[str, dict[str, Any]]


class Writer:
    """Draws the calls that build one program; buffers are known by rows, layout and stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.buffers: list[tuple[int, str, str]] = []
        self.written: list[int] = []
        self.calls: list[Call] = []
        self.slots: list[tuple[str, int, str]] = []  # kind, rows and stream
        self.streams = {"tokens": ("input", ""), "first": ("first", "tokens"), "tokens1": ("prepended", "tokens")}
        for _ in range(self.rng.choice((0, 0, 1, 2, 4))):
            self.declare()

    def declare(self) -> None:
        """One more stream, now and then one that cannot be."""
        name = self.rng.choice(("source", "image", "rest", "behind", "again"))
        kind = self.rng.choice(("input", "input", "rest", "prepended", "first"))
        of = "" if kind == "input" else self.rng.choice([*self.streams])
        self.calls.append(("stream", {"name": name, "kind": kind, "of": of}))
        if name not in self.streams and self.streams.get(of, ("", ""))[0] != "first":
            self.streams[name] = (kind, of)

    def some_stream(self) -> str:
        return self.rng.choice(("tokens", "tokens", "tokens", *self.streams))

    def masks(self, batch: int, lengths: dict[str, int]) -> dict[str, np.ndarray]:
        """Masks of some of the streams that are read from inputs, of all kinds of types."""
        used = {stream for *_, stream in self.buffers}
        whole = {of for name, (kind, of) in self.streams.items() if kind == "prepended" and name in used}
        read = {stream for *_, stream in self.slots} - (whole if self.rng.random() < 0.9 else set())
        kinds = (np.int64, np.int32, np.float32, np.bool_)
        return {name: self.numbers.integers(0, 2, (batch, lengths[name])).astype(self.rng.choice(kinds))
                for name in sorted(read) if self.rng.random() < 0.6}  # fmt: skip

    def buffer(self, rows: int, layout: str, geometry: str = "tokens") -> int:
        self.buffers.append((rows, layout, geometry))
        self.calls.append(("buffer", {"rows": rows, "layout": layout, "geometry": geometry}))
        return len(self.buffers) - 1

    def step(self, kind: str, *written: int, **arguments: Any) -> None:
        """Now and then with an argument that is wrong."""
        if self.rng.random() < 0.01:
            key = self.rng.choice([*arguments])
            arguments[key] = self.rng.choice((*ODD, *SCALES)) if isinstance(arguments[key], int | float) else None
        self.calls.append((kind, arguments))
        self.written += [index for index in written if 0 <= index < len(self.buffers)]

    def some(self, layout: str, rows: int | None = None, geometry: str | None = None) -> int:
        """A written buffer of that kind; one is made where there is none."""
        found = [b for b in self.written if self.buffers[b][1] == layout and rows in (None, self.buffers[b][0])
                 and geometry in (None, self.buffers[b][2])]  # fmt: skip
        if self.rng.random() < 0.01:
            return self.rng.randrange(-2, len(self.buffers) + 2)
        if found:
            return self.rng.choice(found)
        rows = rows or self.rng.choice(ROWS)
        if layout == "f32":
            return self.enter(rows, geometry or "tokens")
        x = self.some("u8", None, geometry) if layout != "u8" else self.some("f32", rows, geometry)
        y = self.buffer(rows, layout, self.at(x, "tokens"))
        if layout == "u8":
            self.step("quantize", y, x=x, y=y, scale=self.scale(), zero_point=self.rng.choice((0, 1, 128, 255)))
        else:
            self.linear(x, y)
        return y

    def at(self, index: int, geometry: str) -> str:
        return self.buffers[index][2] if 0 <= index < len(self.buffers) else geometry

    def rows_of(self, index: int) -> int:
        return self.buffers[index][0] if 0 <= index < len(self.buffers) else 4

    def scale(self) -> float:
        return self.rng.choice(SCALES[:3] if self.rng.random() < 0.8 else SCALES)

    def floats(self, *shape: int) -> np.ndarray:
        values = self.numbers.standard_normal(shape).astype(np.float32)
        if self.rng.random() < 0.05 and values.size:
            odd = (np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0)
            values.reshape(-1)[self.rng.randrange(values.size)] = self.rng.choice(odd)
        return values

    def enter(self, rows: int, geometry: str) -> int:
        """A buffer of a stream that holds what an input gives, or what follows from that."""
        kind, of = self.streams.get(geometry, ("input", ""))
        if kind == "input":
            return self.read_input(rows, geometry)
        x, y = self.some("f32", rows, of), self.buffer(rows, "f32", geometry)
        if kind == "prepended":
            self.step("prepend", y, x=x, y=y, row=self.floats(rows))
        else:
            self.step(kind, y, x=x, y=y)
        return y

    def read_input(self, rows: int, stream: str) -> int:
        x = self.buffer(rows, "f32", stream)
        if self.rng.random() < 0.5:
            self.slots.append(("features", rows, stream))
            self.step("enter", x, y=x, slot=len(self.slots) - 1)
        else:
            self.slots.append(("ids", 0, stream))
            slot = len(self.slots) - 1
            sources = [("input", slot), ("position", 0), ("cumulative", slot, 1), ("constant", 2)]
            self.rng.shuffle(sources)
            sources = sources[: self.rng.randrange(1, 5)]
            if not any(source[0] in ("input", "cumulative") for source in sources):
                sources.append(("input", slot))
            kinds = [self.rng.choice((np.float32, np.float16)) for _ in sources]
            tables = [self.floats(300, rows).astype(kind) for kind in kinds]
            self.step("embed", x, y=x, tables=tables, sources=sources)
        return x

    def weight(self, n: int, k: int) -> dict[str, Any]:
        form, groups = self.rng.choice(("dense", "blocks", "gather")), -(-k // 4)
        if form == "dense":
            return {"format": form, "values": self.bytes(-(-n // 4), groups, 4, 4)}
        rows = self.rng.choice((1, 2, 4) if form == "gather" else (1, 2, 4, 8, 16))
        counts = self.numbers.integers(0, groups + 1, -(-n // rows))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
        if self.rng.random() < 0.03:
            starts[self.rng.randrange(len(starts))] = self.rng.choice((0, 1, 2**31, 2**32 - 1))
        blocks = int(counts.sum())
        limit = groups * 4 if form == "gather" else groups
        columns = self.numbers.integers(0, limit, (blocks, 4) if form == "gather" else blocks).astype(np.uint16)
        if self.rng.random() < 0.03 and columns.size:
            columns.reshape(-1)[self.rng.randrange(columns.size)] = self.rng.choice((limit, 65535))
        values = self.bytes(blocks, rows, 4)
        return {"format": form, "rows": rows, "values": values, "columns": columns, "starts": starts}

    def bytes(self, *shape: int) -> np.ndarray:
        return self.numbers.integers(-128, 128, shape).astype(np.int8)

    def linear(self, x: int, y: int) -> None:
        n, k = self.rows_of(y), self.rows_of(x)
        layout = self.buffers[y][1]
        residual = self.some("f32", n, self.at(x, "tokens")) if self.rng.random() < 0.3 and self.slots else -1
        self.step(
            "linear", y, x=x, y=y, weight=self.weight(n, k), w_scale=self.floats(n) * np.float32(0.02),
            bias=self.floats(n) * np.float32(self.rng.choice((1, 1, 1e4, 1e38))) if self.rng.random() < 0.7 else None,
            x_scale=self.scale(), x_zero_point=self.rng.choice((0, 7, 128, 255)),
            activation=self.rng.choice(ACTIVATIONS), residual=residual, y_scale=self.scale(),
            y_zero_point=self.rng.choice((0, 9, 128, 255)) if layout == "u8" else self.rng.choice((0, -128, 5)),
        )  # fmt: skip

    def draw(self) -> None:
        """One more step, with what it needs before it."""
        rng, kind = self.rng, self.rng.randrange(12)
        geometry = self.some_stream()
        if kind < 4:
            x = self.some("u8", None, geometry)
            layout = rng.choice(("f32", "u8", "u8", "keys", "values"))
            self.linear(x, self.buffer(rng.choice(ROWS), layout, self.at(x, geometry)))
            return
        x = self.some("f32", None, geometry)
        rows, where = self.rows_of(x), self.at(x, geometry)
        y = x if rng.random() < 0.3 else self.buffer(rows, "f32", where)
        if kind == 4:
            q = self.buffer(rows, "u8", where) if rng.random() < 0.6 else -1
            more = {"q_mul": self.floats(rows), "q_add": self.floats(rows)} if rng.random() < 0.3 else {}
            made = [y] if q < 0 else [y, q]
            self.step("layer_norm", *made, x=x, gamma=self.floats(rows), y=y, q=q, rms=rng.random() < 0.3,
                      beta=self.floats(rows) if rng.random() < 0.5 else None, eps=rng.choice((0.0, 1e-5, 1e-12, 1e30)),
                      scale=self.scale(), zero_point=rng.choice((0, 128)), **more)  # fmt: skip
        elif kind == 5:
            self.step("unary", y, x=x, y=y, op=rng.choice(ACTIVATIONS))
        elif kind == 6:
            self.step("binary", y, a=x, b=self.some("f32", rows, where), y=y, op=rng.choice(("add", "sub", "mul")))
        elif kind == 7:
            added: dict[str, Any] = {"add": self.floats(rows) if rng.random() < 0.5 else None}
            self.step("affine", y, x=x, y=y, mul=self.floats(rows), **added)
        elif kind == 8:
            self.step("add_positions", y, x=x, y=y, table=self.floats(rng.choice((2, 300)), rows))
        elif kind == 9:
            self.float_attention(x, where)
        elif kind == 10:
            self.attention(geometry)
        else:
            n = rng.choice(ROWS)
            z = self.buffer(n, "f32", where)
            self.step("linear_float", z, x=x, y=z, weight=self.floats(n, rows), activation=rng.choice(ACTIVATIONS),
                      bias=self.floats(n) if rng.random() < 0.5 else None,
                      residual=self.some("f32", n, where) if rng.random() < 0.3 else -1)  # fmt: skip

    def heads(self, rows: int) -> int:
        fit = [h for h in range(1, rows + 1) if rows % h == 0 and rows // h % 4 == 0]
        return self.rng.choice(fit) if fit and self.rng.random() < 0.95 else self.rng.choice((1, 3, rows))

    def sight(self, where: str) -> tuple[str, dict[str, Any]]:
        """The stream of the keys, and which of them queries see."""
        keys = self.some_stream() if self.rng.random() < 0.5 else where
        causal = self.rng.random() < 0.4
        if causal and self.rng.random() < (0.3 if keys == where else 0.95):
            return keys, {"causal": causal, "offset": self.rng.choice((0, 0, 1, -1, 30, -30, 2**28, 2**40))}
        return keys, {"causal": causal}

    def float_attention(self, x: int, where: str) -> None:
        rows = self.rows_of(x)
        y = self.buffer(rows, self.rng.choice(("f32", "u8")), where)
        keys, sight = self.sight(where)
        self.step("attention_float", y, q=x, k=self.some("f32", rows, keys), v=self.some("f32", rows, keys), y=y,
                  heads=self.heads(rows), scale=self.scale(), y_scale=self.scale(),
                  y_zero_point=self.rng.choice((0, 128)), **sight)  # fmt: skip

    def attention(self, geometry: str) -> None:
        q = self.some("u8", self.rng.choice((4, 8, 16, 32, 64)), geometry)
        rows, where = self.rows_of(q), self.at(q, geometry)
        y = self.buffer(rows, self.rng.choice(("f32", "u8")), where)
        keys, sight = self.sight(where)
        self.step("attention", y, q=q, k=self.some("keys", rows, keys), v=self.some("values", rows, keys), y=y,
                  heads=self.heads(rows), scale=self.scale(), q_scale=self.scale(), q_zero_point=128,
                  k_scale=self.scale(), v_scale=self.scale(), y_scale=self.scale(), y_zero_point=128,
                  **sight)  # fmt: skip

    def leave(self) -> None:
        for x in self.rng.sample(self.written, min(len(self.written), 4)):
            if 0 <= x < len(self.buffers) and self.buffers[x][1] == "f32":
                self.calls.append(("leave", {"x": x}))

    def inputs(self, batch: int, lengths: dict[str, int]) -> list[np.ndarray]:
        high = self.rng.choice((300, 300, 300, 301))
        return [self.numbers.integers(0, high, (batch, lengths[stream])) if kind == "ids" else
                self.floats(batch, lengths[stream], rows) for kind, rows, stream in self.slots]  # fmt: skip


def build(calls: list[Call], isa: str, threads: int) -> _native.Program:
    """The program of the calls that are not refused. ValueError: it cannot run."""
    program = _native.Program(isa=isa, threads=threads, most_copied=1 << 28)
    leaves = 0
    for kind, arguments in calls:
        try:
            getattr(program, kind)(**arguments, **({"slot": leaves} if kind == "leave" else {}))
        except (ValueError, TypeError, OverflowError):
            continue
        leaves += kind == "leave"
    program.prepare()
    return program


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.shape == y.shape and np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def attempt(seed: int, now: Path) -> str:
    writer = Writer(seed)
    for _ in range(writer.rng.randrange(1, 14)):
        writer.draw()
    writer.leave()
    isas = _native.available_isas()
    try:
        programs = [build(writer.calls, isa, threads) for isa in isas for threads in (1, 3)]
    except ValueError:
        return "program refused"
    ran = 0
    for _ in range(2):
        batch, length = writer.rng.choice(((0, 3), (1, 1), (1, 5), (2, 17), (3, 40), (1, 130), (5, 0)))
        lengths = {name: writer.rng.choice((length, 0, 1, 70)) for name in writer.streams} | {"tokens": length}
        inputs, masks = writer.inputs(batch, lengths), writer.masks(batch, lengths)
        results = []
        for program in programs:
            try:
                results.append(program.run(inputs, masks=masks))
            except ValueError as error:
                results.append([np.array([hash(str(error)) % 1000])])
        for result in results[1:]:
            assert same(results[0], result), "not the same bits everywhere"
        ran += all(result.ndim > 1 for result in results[0])
        assert all(program.memory() >= 0 and min(program.need()) >= 0 for program in programs)
    return "runs" if ran else "run refused"


def prepare(folder: Path) -> Attempt:
    return attempt


TARGET = Target("programs", "programs of the engine", prepare)
