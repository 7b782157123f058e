"""Weights in the layouts that the CPU kernels read; numpy only, the same bytes for every ISA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nmcompile import _native

ENGINE = _native.capabilities()  # what kernels there are, their limits and costs: native/kernels/costs.h
GROUP = ENGINE.group  # inputs that one dot-product instruction consumes


@dataclass(frozen=True, order=True)
class Kind:
    """A kernel: "dense", "blocks" of `rows` x 4, "gather" of `rows` outputs, "float", or the "quantize" step."""

    format: str
    rows: int = 0

    def __str__(self) -> str:
        return {"blocks": f"blocks {self.rows}x4", "gather": f"gather {self.rows}x1"}.get(self.format, self.format)


DENSE, FLOAT, QUANTIZE = Kind("dense"), Kind("float"), Kind("quantize")
KERNELS: Mapping[Kind, _native.LinearKernel] = {Kind(kernel.format, kernel.rows): kernel for kernel in ENGINE.kernels}
BLOCKS = tuple(kind for kind in KERNELS if kind.format == "blocks")  # by their rows
GATHERS = tuple(kind for kind in KERNELS if kind.format == "gather")
MAX_INPUTS = KERNELS[DENSE].most_inputs  # of a layer in int8, whatever its format


@dataclass(frozen=True)
class Packed:
    """A weight as the engine takes it: its kernel, with its arrays by name."""

    kind: Kind
    arrays: dict[str, np.ndarray]
    share: float  # of the dense products that are computed

    @property
    def format(self) -> str:
        return self.kind.format

    @property
    def rows(self) -> int:
        return self.kind.rows


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


def pack_gather(weight: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """int8 [N, K] -> groups of `rows` outputs with the single inputs that any of them reads, four at a time.

    values int8 [quads, rows, 4], columns uint16 [quads, 4] (indices of inputs, ascending in a group; the rest of its
    last quad has column 0 and weight 0), starts uint32 [N/rows + 1].
    """
    padded = _padded(weight, rows, 1)
    n, k = padded.shape
    grouped = padded.reshape(n // rows, rows, k)
    used = np.any(grouped, axis=1)
    slots, columns, starts = quads(used)
    values = np.zeros((columns.size, rows), np.int8)
    values[slots] = grouped.swapaxes(1, 2)[used]
    return {
        "values": np.ascontiguousarray(values.reshape(-1, GROUP, rows).swapaxes(1, 2)),
        "columns": columns,
        "starts": starts,
    }


def quads(used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the inputs that groups of outputs read, bool [groups, K], stand in quads of one group each.

    (slots [used.sum()] of the true entries in order, columns uint16 [quads, 4], starts uint32 [groups + 1])
    """
    counts = used.sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(-(-counts // GROUP))])
    group, column = np.nonzero(used)
    before = np.concatenate([[0], np.cumsum(counts)])
    slots = starts[group] * GROUP + np.arange(len(group)) - before[group]
    columns = np.zeros(starts[-1] * GROUP, np.uint16)
    columns[slots] = column
    return slots, columns.reshape(-1, GROUP), starts.astype(np.uint32)


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


# ---- choosing ----------------------------------------------------------------------------------------------------


def fills(weight: np.ndarray, gather: bool = False) -> dict[Kind, float]:
    """The kernels that could run an int8 weight [N, K], with the share of their units that it fills.

    A unit is a block of R x 4 weights, or one input of a group of R outputs; dense products are always full. Without
    `gather` the engine is not asked for that kernel.
    """
    found = {DENSE: 1.0}
    quads_filled = np.ascontiguousarray(_padded(weight, 1, GROUP)).view(np.uint32) != 0  # [N, K/4]
    for kinds, used in ((BLOCKS, quads_filled), (GATHERS if gather else (), weight != 0)):
        units, rows = used, 1
        for kind in kinds:
            if weight.shape[1] > KERNELS[kind].most_inputs:
                continue
            if kind.rows > rows:  # the units of twice as many rows are filled where either half is
                units = _padded(units, 2, 1)
                units = units[::2] | units[1::2]
                rows = kind.rows
            found[kind] = float(np.count_nonzero(units) / max(units.size, 1))
    return found


def predicted(outputs: int, inputs: int, kind: Kind, density: float) -> float:
    """What a layer costs by the shipped model: products per token at the int8 peak.

    Its figures are the engine's defaults, of one core of a Zen 4 with AVX512-VNNI; a table of times measured on the
    machine at hand (`tuning.py`) goes before it.
    """
    model = ENGINE.choice
    if kind == QUANTIZE:
        return model.quantizing * inputs
    rows, columns = {"dense": (GROUP, GROUP), "blocks": (kind.rows, GROUP), "gather": (kind.rows, 1)}.get(
        kind.format, (GROUP, 1))  # fmt: skip
    padded = float(-(-outputs // rows) * rows * -(-inputs // columns) * columns)
    kernel = KERNELS[kind]
    rest = model.last_quad * outputs / kernel.near + model.spreading * inputs if kind.format == "gather" else 0.0
    return padded * density / (kernel.far if inputs > model.near else kernel.near) + model.epilogue * outputs + rest


def pack_as(weight: np.ndarray, kind: Kind) -> Packed:
    """An int8 weight [N, K] for a kernel, whatever that costs."""
    n, k = weight.shape
    total = -(-n // GROUP) * GROUP * -(-k // GROUP) * GROUP
    if kind == DENSE:
        return Packed(kind, {"values": pack_dense(weight)}, 1.0)
    arrays = pack_blocks(weight, kind.rows) if kind.format == "blocks" else pack_gather(weight, kind.rows)
    return Packed(kind, arrays, arrays["values"].size / total)


def least(costs: Mapping[Kind, float]) -> Kind:
    """The kernel of least cost; another than dense must win by 3 %, which is more than times and models are off."""
    best = min(costs, key=lambda kind: (costs[kind], -kind.rows, kind.format))
    return best if costs[best] < 0.97 * costs[DENSE] else DENSE


def cheapest(weight: np.ndarray, gather: bool = False) -> Kind:
    """The kernel for this weight by the shipped cost model."""
    n, k = weight.shape
    return least({kind: predicted(n, k, kind, density) for kind, density in fills(weight, gather).items()})


def pack(weight: np.ndarray, gather: bool = False) -> Packed:
    """An int8 weight [N, K] for the kernel that is cheapest by the cost model."""
    return pack_as(weight, cheapest(weight, gather))


def _padded(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    n, k = weight.shape
    return np.pad(weight, ((0, -n % rows), (0, -k % columns))) if n % rows or k % columns else weight
