"""Weights in the layouts that the CPU kernels read; numpy only, the same bytes for every ISA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 4  # inputs that one dot-product instruction consumes
MAX_INPUTS = GROUP * 65536  # a block's column is a 16-bit index of a group of inputs

# Share of the int8 peak that each kernel reaches (measured by tools/bench_kernels.py on AVX512-VNNI, 128 tokens).
# With it the work of two formats can be compared before a machine has been timed.
EFFICIENCY = {"dense": 0.92, 1: 0.55, 2: 0.85, 4: 0.92, 8: 0.92, 16: 0.92}


@dataclass(frozen=True)
class Packed:
    """A weight as the engine takes it: `format` "dense" or "blocks" of `rows` x 4, with its arrays by name."""

    format: str
    rows: int
    arrays: dict[str, np.ndarray]
    share: float  # of the dense products that are computed


def pack_dense(weight: np.ndarray) -> np.ndarray:
    """int8 [N, K] -> int8 [N/4, K/4, 4 outputs, 4 inputs], padded with zeros."""
    padded = _padded(weight, GROUP, GROUP)
    n, k = padded.shape
    tiles = padded.reshape(n // GROUP, GROUP, k // GROUP, GROUP).swapaxes(1, 2)
    return np.ascontiguousarray(tiles)


def pack_blocks(weight: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """int8 [N, K] -> the blocks of `rows` outputs x 4 inputs that are not all zero, row group by row group.

    values int8 [blocks, rows, 4], columns uint16 [blocks] (index of the group of 4 inputs), starts uint32 [N/rows + 1].
    """
    padded = _padded(weight, rows, GROUP)
    n, k = padded.shape
    blocks = padded.reshape(n // rows, rows, k // GROUP, GROUP).swapaxes(1, 2)  # [N/rows, K/4, rows, 4]
    filled = blocks.any(axis=(2, 3))
    starts = np.concatenate([[0], np.cumsum(filled.sum(axis=1))]).astype(np.uint32)
    return {
        "values": np.ascontiguousarray(blocks[filled]),
        "columns": np.nonzero(filled)[1].astype(np.uint16),
        "starts": starts,
    }


def halved(table: np.ndarray) -> np.ndarray:
    """An embedding table in float16 where that keeps it to 2^-10 of its root mean square, else as it is.

    The rounding lies some 70 dB below the table, far below that of 8-bit activations, and halves most plans' largest
    array.
    """
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    size = float(np.sqrt(np.mean(np.square(table, dtype=np.float64)))) if table.size else 0.0
    error = np.abs(half.astype(np.float32) - table)
    return half if bool(np.isfinite(half).all()) and float(np.sqrt(np.mean(error**2))) <= size / 1024 else table


def pack(weight: np.ndarray) -> Packed:
    """The cheapest format for this weight by the cost model: products to compute over the kernel's efficiency."""
    n, k = weight.shape
    total = -(-n // GROUP) * GROUP * -(-k // GROUP) * GROUP
    best, cost = 0, total / EFFICIENCY["dense"]
    for rows in (16, 8, 4, 2, 1):
        padded = _padded(weight, rows, GROUP)
        blocks = padded.reshape(padded.shape[0] // rows, rows, -1, GROUP).any(axis=(1, 3))
        work = float(np.count_nonzero(blocks)) * rows * GROUP / EFFICIENCY[rows]
        if work < 0.97 * cost:
            best, cost = rows, work
    if best == 0:
        return Packed("dense", GROUP, {"values": pack_dense(weight)}, 1.0)
    arrays = pack_blocks(weight, best)
    return Packed("blocks", best, arrays, arrays["values"].size / total)


def _padded(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    n, k = weight.shape
    return np.pad(weight, ((0, -n % rows), (0, -k % columns)))
