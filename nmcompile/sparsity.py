"""Sparsity patterns, scores and masks over arrays [N outputs, K inputs]; knows no graph.

Patterns are named outputs x inputs: `2x4` is a block of two outputs and four inputs. N:M runs along the
inputs, the axis a product sums over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nmcompile.errors import NmcompileError

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class PatternError(NmcompileError):
    """A sparsity pattern, a sparsity or a score is not valid."""


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero: `unstructured`."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """At most `n` non-zeros of every `m` consecutive inputs: `2:4`."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(f"pattern '{self}': N:M needs 0 < N <= M, such as 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` outputs x `cols` inputs are zero as a whole: `2x4`."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(
                f"pattern '{self}': a block needs at least one output and one input, such as 2x4"
            )

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


Pattern = Unstructured | NM | Block


def parse_pattern(text: str) -> Pattern:
    """The pattern written `unstructured`, `N:M` or `RxC` (outputs x inputs), or a PatternError."""
    text = text.strip().lower()
    if text == "unstructured":
        return Unstructured()
    match = re.fullmatch(r"([0-9]{1,6})([:x])([0-9]{1,6})", text)
    if match is None:
        raise PatternError(
            f"unknown sparsity pattern '{text}'; write unstructured, N:M such as 2:4, or RxC such as 2x4"
        )
    first, kind, second = int(match[1]), match[2], int(match[3])
    return NM(first, second) if kind == ":" else Block(first, second)


def magnitude(weight: Array) -> Array:
    """|w|, float32 [N, K]: a block's score is then its L1 norm."""
    score: Array = np.abs(weight.astype(np.float32))
    return score


def wanda(weight: Array, column_squares: Array) -> Array:
    """|w| * ||x_k||_2, float32 [N, K], with `column_squares` [K] the sum of x_k^2 over the tokens (Sun et al.
    2023, Wanda).
    """
    if column_squares.shape != weight.shape[1:]:
        raise PatternError(
            f"{list(column_squares.shape)} input squares do not fit a weight of {list(weight.shape)}; "
            "give one value per input (column)"
        )
    norms = np.sqrt(column_squares.astype(np.float64)).astype(np.float32)
    score: Array = magnitude(weight) * norms
    return score


def unit_scores(score: Array, pattern: Pattern) -> Array:
    """One score for each unit that is pruned as a whole, from a score per weight [N, K].

    Block -> float64 [ceil(N / rows), ceil(K / cols)], sums; a block over the edge is a unit of the weights it
    has.
    Unstructured and N:M -> the score itself, since the unit is a weight.
    """
    if score.ndim != 2:
        raise PatternError(f"a score of shape {list(score.shape)} is not [outputs, inputs]")
    if np.isnan(score).any():
        raise PatternError("the score holds NaN; check the weights and the calibration statistics")
    if not isinstance(pattern, Block):
        return score
    return _summed(_summed(score.astype(np.float64, copy=False), pattern.rows, 0), pattern.cols, 1)


def keep_mask(score: Array, pattern: Pattern, sparsity: float) -> Mask:
    """Which weights stay, bool [N, K]: the best units of this array.

    round(sparsity * units) units go; equal scores keep the unit of least index. N:M ignores `sparsity` and
    keeps the n best of every m inputs (of a ragged last group, n of what it has).
    """
    if not 0 <= sparsity <= 1:
        raise PatternError(f"sparsity {sparsity:g} is not between 0 and 1; 0.8 means that 80 % are zeros")
    units = unit_scores(score, pattern)
    if isinstance(pattern, NM):
        return _keep_nm(units, pattern)
    pruned = int(np.floor(sparsity * units.size + 0.5))
    keep = _keep_largest(units.ravel(), units.size - pruned).reshape(units.shape)
    return _expand(keep, pattern, score.shape)


def keep_above(score: Array, pattern: Pattern, threshold: float) -> Mask:
    """Which weights stay, bool [N, K]: the units whose score is at least `threshold` (see global_threshold).

    N:M ignores the threshold, as its share of zeros is fixed.
    """
    units = unit_scores(score, pattern)
    if isinstance(pattern, NM):
        return _keep_nm(units, pattern)
    return _expand(units >= np.float64(threshold), pattern, score.shape)


def global_threshold(scores: Sequence[Array], sizes: Sequence[int], sparsity: float) -> float:
    """The unit score at which `sparsity` of all weights falls below, over many layers ranked together.

    `scores`: what unit_scores gave for each layer; `sizes`: weights per unit of each layer (rows * cols, or
    1). keep_above with the result never prunes more than asked: a unit that would pass the share stays, and
    so do units equal to it. -inf keeps all, inf none.
    """
    if not 0 <= sparsity <= 1:
        raise PatternError(f"sparsity {sparsity:g} is not between 0 and 1; 0.8 means that 80 % are zeros")
    if len(scores) != len(sizes):
        raise PatternError(
            f"{len(scores)} score arrays but {len(sizes)} unit sizes; give one size for each array"
        )
    if sparsity == 0 or not any(units.size for units in scores):
        return float("-inf")
    flat = np.concatenate([units.ravel().astype(np.float64) for units in scores])
    weights = np.repeat(np.asarray(sizes, np.int64), [units.size for units in scores])
    order = np.argsort(flat, kind="stable")
    pruned = np.cumsum(weights[order])
    # The tolerance keeps 0.8 * 10 units at 8, whatever 0.8 is in binary.
    first_kept = int(np.searchsorted(pruned, sparsity * float(pruned[-1]) * (1 + 1e-12), side="right"))
    return float(flat[order[first_kept]]) if first_kept < flat.size else float("inf")


def density(weight: Array) -> float:
    """Share of non-zeros, 0 to 1 (1 for an empty array)."""
    return float(np.count_nonzero(weight)) / weight.size if weight.size else 1.0


WIDEST_SUM = 8  # neighbours that are added or compared one by one

# Stricter before looser: what fits 1:4 fits 2:8 and 2:4 too.
NM_CANDIDATES = (NM(1, 8), NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))
LARGEST_BLOCK_SIDE = 32
LEAST_ZEROS = 0.05  # below it zeros are rounding, not pruning
# A few weights inside a kept block or group may be zero too, most of all after quantization to 8 bits.
LEAST_FILL = 0.9
LEAST_NM_FILL = 0.8
LEAST_EXPLAINED = 0.8  # of all zeros, the share that lies in blocks of zeros


@dataclass(frozen=True)
class Found:
    """A pattern that is there, its share of zeros, and the axis along which an N:M runs."""

    pattern: Pattern
    sparsity: float
    orientation: Literal["inputs", "outputs"] = "inputs"


def detect(weight: Array) -> Found | None:
    """The sparsity of weight [N outputs, K inputs], or None when fewer than 5 % are zeros.

    N:M is exact (no group breaks it) and its groups are mostly full; a block pattern explains most zeros by
    blocks of zeros and its other blocks are mostly full, so that chance does not pass for structure; the
    largest such block is named, sides in powers of two up to 32. Zeros of no pattern are `unstructured`.
    """
    if weight.ndim != 2 or weight.size == 0:
        return None
    nonzero = weight != 0
    zeros = 1 - density(weight)
    if zeros < LEAST_ZEROS:
        return None
    if not nonzero.any():
        return Found(Unstructured(), 1.0)
    for pattern in NM_CANDIDATES:
        if _fits_nm(nonzero, pattern):
            return Found(pattern, zeros)
    for pattern in NM_CANDIDATES:
        if _fits_nm(nonzero.T, pattern):
            return Found(pattern, zeros, "outputs")
    blocks = [pattern for pattern, live in _pyramid(nonzero) if _fits_block(nonzero, pattern, live)]
    if not blocks:
        return Found(Unstructured(), zeros)
    return Found(max(blocks, key=lambda block: (block.rows * block.cols, block.cols)), zeros)


def _keep_largest(scores: Array, count: int) -> Mask:
    """The `count` largest of scores [U], equal ones by index; linear time."""
    if count <= 0 or count >= scores.size:
        return np.full(scores.shape, count > 0, np.bool_)
    bar = np.partition(scores, scores.size - count)[scores.size - count]
    keep: Mask = scores > bar
    level = np.flatnonzero(scores == bar)
    keep[level[: count - np.count_nonzero(keep)]] = True
    return keep


def _summed(score: Array, size: int, axis: int) -> Array:
    """Sums of `size` neighbours along an axis, the last of what is left; in their order."""
    if score.shape[axis] % size or size > WIDEST_SUM:
        return np.asarray(np.add.reduceat(score, np.arange(0, score.shape[axis], size), axis=axis))
    parts = [score[i::size] if axis == 0 else score[:, i::size] for i in range(size)]  # many times faster than reduceat
    if size == 1:
        return score
    if axis == 0:
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total
    rest = parts[1].copy()  # numpy sums what follows the first, along the last axis
    for part in parts[2:]:
        rest += part
    rest += parts[0]
    return rest


def _keep_nm(score: Array, pattern: NM) -> Mask:
    rows, cols = score.shape
    groups = -(-cols // pattern.m)
    padded = np.full((rows, groups * pattern.m), np.inf)
    padded[:, :cols] = -score.astype(np.float64)  # ascending, so that a stable sort keeps the first of equals
    if pattern.m <= WIDEST_SUM:
        return _ranked(padded.reshape(rows, groups, pattern.m), pattern.n).reshape(padded.shape)[:, :cols]
    order = np.argsort(padded.reshape(rows, groups, pattern.m), axis=-1, kind="stable")
    keep = np.zeros(order.shape, np.bool_)
    np.put_along_axis(keep, order[..., : pattern.n], True, axis=-1)
    return keep.reshape(padded.shape)[:, :cols]


def _ranked(groups: Array, n: int) -> Mask:
    """The n least of each group [N, G, m], equal ones by index, by comparing all pairs: many times faster than sorting
    few."""
    size = groups.shape[-1]
    columns = [np.ascontiguousarray(groups[..., i]) for i in range(size)]
    rank = np.zeros((size, *groups.shape[:-1]), np.uint8)  # how many of its group stand before each
    for i in range(size):
        for j in range(i + 1, size):
            later = columns[j] < columns[i]
            rank[i] += later
            rank[j] += ~later
    return np.ascontiguousarray(np.moveaxis(rank < n, 0, -1))


def _expand(keep: Mask, pattern: Pattern, shape: tuple[int, ...]) -> Mask:
    if not isinstance(pattern, Block):
        return keep
    return keep.repeat(pattern.rows, axis=0)[: shape[0]].repeat(pattern.cols, axis=1)[:, : shape[1]]


def _fits_nm(nonzero: Mask, pattern: NM) -> bool:
    """No group of m has more than n non-zeros, and rows that are not all zero are filled nearly up to n:m."""
    rows, cols = nonzero.shape
    if cols < pattern.m:
        return False
    whole = cols // pattern.m * pattern.m
    sums = nonzero[:, :whole].reshape(rows, -1, pattern.m).sum(axis=-1, dtype=np.uint8)
    if sums.max() > pattern.n or np.count_nonzero(nonzero[:, whole:].sum(axis=1) > pattern.n):
        return False
    live = nonzero.any(axis=1)
    fill = np.count_nonzero(nonzero) / (np.count_nonzero(live) * cols)
    return bool(fill >= LEAST_NM_FILL * pattern.n / pattern.m)


def _fits_block(nonzero: Mask, pattern: Block, live: Mask) -> bool:
    """Most weights of live blocks are non-zero, and most zeros lie in the other blocks."""
    rows, cols = nonzero.shape
    if pattern.rows > rows or pattern.cols > cols:
        return False
    heights = np.minimum(pattern.rows, rows - np.arange(live.shape[0]) * pattern.rows)
    widths = np.minimum(pattern.cols, cols - np.arange(live.shape[1]) * pattern.cols)
    kept = int(heights @ (live @ widths.astype(np.int64)))
    filled = np.count_nonzero(nonzero)
    explained = (nonzero.size - kept) / (nonzero.size - filled)
    return bool(filled >= LEAST_FILL * kept and explained >= LEAST_EXPLAINED)


def _pyramid(nonzero: Mask) -> Iterator[tuple[Block, Mask]]:
    """Every block with sides in powers of two, and which blocks hold a non-zero [ceil(N / rows), ceil(K /
    cols)].

    Each level halves the one before, so all of them together cost a few passes over the weight.
    """
    tall, rows = nonzero, 1
    while rows <= LARGEST_BLOCK_SIDE:
        live, cols = tall, 1
        while cols <= LARGEST_BLOCK_SIDE:
            if rows * cols > 1:
                yield Block(rows, cols), live
            live, cols = _halve(live.T).T, cols * 2
        tall, rows = _halve(tall), rows * 2


def _halve(live: Mask) -> Mask:
    """Pairs of rows or-ed; a last odd row stays alone."""
    merged = live[::2].copy()
    odd = live[1::2]
    merged[: odd.shape[0]] |= odd
    return merged
