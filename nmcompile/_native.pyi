"""The C++ engine: programs of steps over packed tokens.

Buffers hold `rows` features of the real tokens of one stream, as "f32", "u8" (packed by four features), or "keys" and
"values" (the tiles that attention reads). All streams of a program are of one batch. Three exist in every program:
"tokens" is read from inputs, "first" has one token for each sequence, "tokens1" is "tokens" behind a class token.
Every argument is checked when its step is added: ValueError names it. Arrays are kept, not copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]

def cpu_features() -> list[str]:
    """The features of this CPU that the engine knows."""

def available_isas() -> list[str]:
    """What this CPU can run, best first, of "avx512vnni", "avxvnni", "avx2", "scalar"."""

def time_products(
    weight: Mapping[str, Any], inputs: int, outputs: int, tokens: int, repeats: int = 20, isa: str = ""
) -> float:
    """Seconds of a linear layer's products alone, on one thread, nothing stored: the least of `repeats`."""

def default_threads() -> int:
    """The number of CPUs this process may run on (its affinity mask)."""

class LinearKernel:
    """A kernel of linear steps: weight format, outputs of a block, most inputs, and the share of the int8 peak that it
    reaches beside its epilogue up to `ChoiceCosts.near` inputs and beyond."""

    @property
    def format(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def most_inputs(self) -> int: ...
    @property
    def near(self) -> float: ...
    @property
    def far(self) -> float: ...

class ChoiceCosts:
    """Costs beside the products, in products per token at the int8 peak. Of one core of a Zen 4 (AVX512-VNNI)."""

    @property
    def near(self) -> float:
        """Inputs up to which a panel of tokens fits the first cache."""

    @property
    def epilogue(self) -> float:
        """Of an output: scaling and storing."""

    @property
    def spreading(self) -> float:
        """Of an input of "gather", which lays each out by itself."""

    @property
    def last_quad(self) -> float:
        """Of an output of "gather": what is empty in the last quad of its group."""

    @property
    def quantizing(self) -> float:
        """Of an input: the quantize step."""

class Capabilities:
    """What this engine knows, in names that Program takes, with its limits and default costs."""

    @property
    def kernels(self) -> tuple[LinearKernel, ...]: ...
    @property
    def choice(self) -> ChoiceCosts: ...
    @property
    def costs(self) -> Mapping[str, float]:
        """What the schedule counts with where a program is not given other figures: nanoseconds of one core, most per
        token and row. Of one core of a Zen 4 (AVX512-VNNI), 128 tokens; native/kernels/costs.h says of what."""

    @property
    def steps(self) -> tuple[str, ...]: ...
    @property
    def layouts(self) -> tuple[str, ...]: ...
    @property
    def activations(self) -> tuple[str, ...]: ...
    @property
    def stream_kinds(self) -> tuple[str, ...]: ...
    @property
    def streams(self) -> tuple[str, ...]:
        """Those that every program has."""

    @property
    def group(self) -> int:
        """Inputs that one dot-product instruction consumes."""

    @property
    def panel(self) -> int:
        """Tokens that are computed together."""

def capabilities() -> Capabilities: ...

class Program:
    limit: int  # bytes that a run may take beside its inputs, 0: any number; beyond it, run raises ValueError
    def __init__(
        self, isa: str = "", threads: int = 0, most_copied: int = 0, costs: dict[str, float] | None = None
    ) -> None:
        """isa "": NMCOMPILE_ISA, or the best; threads 0: one per CPU; most_copied: bytes of weights that steps may
        copy, 0: any number; costs: figures of `Capabilities.costs` to count with instead. ValueError for an ISA it
        cannot run."""

    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def stream(self, name: str, kind: str = "input", of: str = "") -> None:
        """Declare a stream: "input", read from inputs [B, S, ...] of a length and a mask of its own; "first", the first
        token of each sequence of `of` (all such are one stream); "rest", `of` without its first token; "prepended",
        `of` with a token before each sequence."""

    def buffer(self, rows: int, layout: str, geometry: str = "tokens") -> int:
        """A buffer of a stream, by its name, and its number."""

    def embed(self, y: int, tables: Sequence[NDArray[Any]], sources: Sequence[tuple[Any, ...]]) -> None:
        """y[token] = sum of one row of each table (float32 or float16 [V, R]), chosen by its source:
        ("input", slot) ids of an input [B, S]; ("position", offset); ("cumulative", slot, pad) as in RoBERTa;
        ("constant", row)."""

    def enter(self, y: int, slot: int) -> None:
        """y = a float32 input [B, S, R], whose tokens are those of y's stream."""

    def leave(self, x: int, slot: int) -> None:
        """Output [B, S, R], S of x's stream, zero where padded; [B, R] for first tokens."""

    def first(self, x: int, y: int) -> None:
        """y[sequence] = x at position 0, zero when that was padding; y of stream "first", x of any other."""

    def rest(self, x: int, y: int) -> None:
        """y = x without the token at position 0 of each sequence; y's stream is the "rest" of x's, or x's the
        "prepended" of y's."""

    def layer_norm(
        self,
        x: int,
        gamma: _F32,
        beta: _F32 | None,
        eps: float,
        rms: bool = False,
        y: int = -1,
        q: int = -1,
        scale: float = 1.0,
        zero_point: int = 0,
        q_mul: _F32 | None = None,
        q_add: _F32 | None = None,
    ) -> None:
        """y (f32, may be x) and/or q (u8, by scale and zero_point) = LayerNormalization or RMS norm of x.

        q holds y * q_mul + q_add, one factor and summand per row, where these are given.
        """

    def quantize(self, x: int, y: int, scale: float, zero_point: int) -> None: ...
    def linear(
        self,
        x: int,
        y: int,
        weight: dict[str, Any],
        w_scale: _F32,
        bias: _F32 | None,
        x_scale: float,
        x_zero_point: int,
        activation: str = "none",
        residual: int = -1,
        y_scale: float = 1.0,
        y_zero_point: int = 0,
    ) -> None:
        """y = activation(x w^T + bias) + residual with x u8 and int8 weights, stored in y's layout. weight:
        {"format": "dense", "values": int8 [ceil(N/4), ceil(K/4), 4, 4]} or {"format": "blocks", "rows": 1, 2,
        4, 8 or 16, "values": int8 [blocks, rows, 4], "columns": uint16 [blocks], "starts": uint32
        [ceil(N/rows) + 1]}."""

    def linear_float(
        self, x: int, y: int, weight: _F32, bias: _F32 | None, activation: str = "none", residual: int = -1
    ) -> None: ...
    def attention(
        self,
        q: int,
        k: int,
        v: int,
        y: int,
        heads: int,
        scale: float,
        q_scale: float,
        q_zero_point: int,
        k_scale: float,
        v_scale: float,
        causal: bool = False,
        y_scale: float = 1.0,
        y_zero_point: int = 0,
        offset: int | None = None,
    ) -> None:
        """q u8, k keys, v values, y u8 or f32; rows = heads * depth, depth a multiple of 4.

        k and v may be of another stream than q and y: each sequence looks at its own keys, all of them, or where it is
        causal those at positions up to the query's plus `offset`, which streams that differ need (past tokens before
        the queries' in a cache, say). A query that sees no key gives zeros.
        """

    def attention_float(
        self,
        q: int,
        k: int,
        v: int,
        y: int,
        heads: int,
        scale: float,
        causal: bool = False,
        y_scale: float = 1.0,
        y_zero_point: int = 0,
        offset: int | None = None,
    ) -> None: ...
    def unary(self, x: int, y: int, op: str) -> None: ...
    def binary(self, a: int, b: int, y: int, op: str) -> None: ...
    def affine(self, x: int, y: int, mul: _F32 | None, add: _F32 | None) -> None: ...
    def add_positions(self, x: int, y: int, table: _F32) -> None: ...
    def patches(self, y: int, slot: int, channels: int, patch_h: int, patch_w: int) -> None: ...
    def prepend(self, x: int, y: int, row: _F32) -> None:
        """y = x with `row` before each sequence; y's stream is x's "prepended", or x's the "rest" of y's."""

    def prepare(self) -> None: ...
    def measured(self, nanoseconds: dict[int, float]) -> None:
        """Times of steps, of one core per token: the schedules of later runs count with them instead of the cost
        model. The bits of outputs do not depend on them."""

    def steps(self) -> list[tuple[str, str]]:
        """(kind, description) of each step."""

    def memory(self) -> int:
        """Bytes of the arenas in use and kept."""

    def need(self) -> tuple[int, int, int]:
        """Bytes of copies of weights, of each thread that works on a run, and at most of each token; a run has 16."""

    def run(
        self,
        inputs: Sequence[NDArray[Any]],
        mask: NDArray[Any] | None = None,
        masks: dict[str, NDArray[Any]] | None = None,
    ) -> list[_F32]:
        """Inputs by slot. mask [B, S] drops tokens of stream "tokens" where it is 0, masks those of streams by their
        names. Outputs by slot. Safe from many threads; ValueError for shapes that do not fit and for ids outside their
        table."""

    def run_costs(
        self,
        inputs: Sequence[NDArray[Any]],
        mask: NDArray[Any] | None = None,
        masks: dict[str, NDArray[Any]] | None = None,
    ) -> dict[int, float]:
        """What each step of one run took, as `measured` takes it; steps that no token came to are left out."""

    def run_traced(
        self,
        inputs: Sequence[NDArray[Any]],
        mask: NDArray[Any] | None = None,
        masks: dict[str, NDArray[Any]] | None = None,
    ) -> tuple[list[_F32], NDArray[np.int64]]:
        """run, and events [n, 5]: step, thread, panel, begin and end in nanoseconds since the run began."""

    def forecast(self, tokens: int, threads: int) -> tuple[int, float, float]:
        """What the schedule expects of one sequence of `tokens` in each stream of inputs with up to `threads` threads.

        (threads worth using, nanoseconds of one thread, nanoseconds of that many).
        """

    def run_profiled(
        self,
        inputs: Sequence[NDArray[Any]],
        mask: NDArray[Any] | None = None,
        masks: dict[str, NDArray[Any]] | None = None,
    ) -> tuple[list[_F32], list[int]]:
        """run, and the nanoseconds of each step."""
