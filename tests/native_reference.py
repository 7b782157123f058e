"""Plain numpy formulas for the native steps, and programs that run a step on float inputs [B, S, R]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nmcompile import _native

ISAS = _native.available_isas()
erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
}


def quantize(x: np.ndarray, scale: float, zero: int, low: int = 0, high: int = 255) -> np.ndarray:
    """Integers as int64; the engine multiplies by the float32 reciprocal, so this does too."""
    inverse = np.float32(1) / np.float32(scale)
    scaled = (x.astype(np.float32) * inverse).astype(np.float64)
    return np.asarray(np.clip(np.rint(scaled) + zero, low, high), np.int64)


def dense_weight(w: np.ndarray) -> dict[str, Any]:
    """int8 [N, K] as the dense format: tiles of 4 outputs x 4 inputs."""
    n, k = w.shape
    padded = np.zeros((-(-n // 4) * 4, -(-k // 4) * 4), np.int8)
    padded[:n, :k] = w
    tiles = padded.reshape(padded.shape[0] // 4, 4, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return {"format": "dense", "values": np.ascontiguousarray(tiles)}


def block_weight(w: np.ndarray, rows: int) -> dict[str, Any]:
    """int8 [N, K] as the blocks format: the blocks of `rows` outputs x 4 inputs that are not all zero."""
    n, k = w.shape
    padded = np.zeros((-(-n // rows) * rows, -(-k // 4) * 4), np.int8)
    padded[:n, :k] = w
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    keep = tiles.any(axis=(2, 3))
    starts = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.uint32)
    return {
        "format": "blocks",
        "rows": rows,
        "values": np.ascontiguousarray(tiles[keep]),
        "columns": np.nonzero(keep)[1].astype(np.uint16),
        "starts": starts,
    }


def gather_weight(w: np.ndarray, rows: int) -> dict[str, Any]:
    """int8 [N, K] as the gather format: for every `rows` outputs the inputs that any of them uses, four at a time."""
    values, columns, starts = [], [], [0]
    for first in range(0, w.shape[0], rows):
        group = np.zeros((rows, w.shape[1]), np.int8)
        group[: min(rows, w.shape[0] - first)] = w[first : first + rows]
        used = np.nonzero(group.any(axis=0))[0]
        filled = np.zeros((rows, -(-len(used) // 4) * 4), np.int8)
        filled[:, : len(used)] = group[:, used]
        values.append(filled.reshape(rows, -1, 4).transpose(1, 0, 2))
        columns.append(np.pad(used, (0, -len(used) % 4)).reshape(-1, 4))
        starts.append(starts[-1] + len(values[-1]))
    return {
        "format": "gather",
        "rows": rows,
        "values": np.ascontiguousarray(np.concatenate(values)),
        "columns": np.concatenate(columns).astype(np.uint16),
        "starts": np.array(starts, np.uint32),
    }


def sparse(rng: np.random.Generator, n: int, k: int, rows: int, density: float) -> np.ndarray:
    """A random int8 [N, K] of blocks rows x 4, of which a share `density` is not zero."""
    w = rng.integers(-127, 128, (n, k))
    keep = rng.random((-(-n // rows), -(-k // 4))) < density
    w = w * np.repeat(np.repeat(keep, rows, 0), 4, 1)[:n, :k]
    return np.asarray(w, np.int8)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    heads: int,
    scale: float,
    causal: bool,
    mask: np.ndarray | None,
) -> np.ndarray:
    """[B, S, R] each; padded rows are zero in the result."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        real = np.arange(q.shape[1]) if mask is None else np.nonzero(mask[b])[0]
        if not len(real):
            continue
        for h in np.split(np.arange(q.shape[2]), heads):
            scores = q[b][np.ix_(real, h)] @ k[b][np.ix_(real, h)].T * scale
            if causal:
                scores = np.where(np.tri(len(real), dtype=bool), scores, -np.inf)
            out[b][np.ix_(real, h)] = softmax(scores) @ v[b][np.ix_(real, h)]
    return out


def masked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, scale: float, seen: np.ndarray, in_bytes: bool = False
) -> np.ndarray:
    """q [B, S, R], k and v [B, T, R], seen bool [B, S, T]: which keys each query sees; zeros where it sees none.

    in_bytes: probabilities are rounded to bytes, 255 for the greatest, as the int8 kernel has them.
    """
    parts = []
    for at in np.split(np.arange(q.shape[2]), heads):
        scores = np.where(seen, q[..., at] @ k[..., at].swapaxes(1, 2) * scale, -np.inf)
        top = np.where(seen.any(-1), scores.max(axis=-1, initial=-np.inf), 0)
        p = np.exp(scores - top[..., None])
        if in_bytes:
            p = np.rint(255 * p)
        parts.append(p @ v[..., at] / np.maximum(p.sum(axis=-1, keepdims=True), 1e-30))
    return np.concatenate(parts, axis=2)


def ragged_mask(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """int64 [B, S]: prefixes of ones of random length, one of them empty, one with a hole."""
    mask = np.asarray(np.arange(length) < rng.integers(1, length + 1, (batch, 1)), np.int64)
    if batch > 1:
        mask[0] = 0
    mask[-1, length // 2] = 0
    return mask


class Net:
    """A program under construction, with the buffers that tests need."""

    def __init__(self, isa: str = "", threads: int = 1, costs: dict[str, float] | None = None) -> None:
        self.program = _native.Program(isa=isa, threads=threads, costs=costs)
        self.slots = 0

    def f32(self, rows: int, geometry: str = "tokens") -> int:
        return self.program.buffer(rows, "f32", geometry)

    def enter(self, rows: int, stream: str = "tokens") -> int:
        y = self.f32(rows, stream)
        self.program.enter(y=y, slot=self.slots)
        self.slots += 1
        return y

    def u8(self, x: int, rows: int, scale: float, zero: int, stream: str = "tokens") -> int:
        y = self.program.buffer(rows, "u8", stream)
        self.program.quantize(x=x, y=y, scale=scale, zero_point=zero)
        return y

    def float_of(self, x: int, rows: int, scale: float = 1.0, zero: int = 0, stream: str = "tokens") -> int:
        """What a u8 buffer holds, by a linear step with the identity."""
        y = self.f32(rows, stream)
        self.program.linear(
            x=x, y=y, weight=dense_weight(np.eye(rows, dtype=np.int8)), w_scale=np.ones(rows, np.float32),
            bias=None, x_scale=scale, x_zero_point=zero,
        )  # fmt: skip
        return y

    def run(self, x: list[np.ndarray], out: int, mask: np.ndarray | None = None) -> np.ndarray:
        self.program.leave(x=out, slot=0)
        self.program.prepare()
        return self.program.run(x, mask)[0]
