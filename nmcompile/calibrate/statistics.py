"""Streaming statistics of tensors in constant memory, and the clipping ranges chosen from them.

A histogram has a fixed number of bins, and its bin width is the power of two at which the largest |x| just
fits. So a wider batch doubles the range by merging pairs of bins exactly, and the result does not depend on
the order of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from nmcompile.errors import CalibrationError
from nmcompile.quantize import QuantType, activation_params, rounded

Array = npt.NDArray[Any]
Method = Literal["min-max", "percentile", "entropy", "mse"]
Value = TypeVar("Value")
KINDS = ("range", "histogram", "squares", "channels", "sample")
SAMPLE = 512  # rows that "sample" keeps at least, where there are as many; less than twice as many

SIDE = 4096  # bins on each side of zero, of which at least half are in use on the larger side
_LEAST_EXPONENT = (
    -148
)  # of two: the least float32; zeros alone take it, as they must not widen the bins of others
_ROWS = 4096  # rows widened to float64 at a time


@dataclass(frozen=True)
class Histogram:
    """How often values fall in [i * width, (i + 1) * width), i from -SIDE to SIDE - 1; `lo` and `hi` are the
    extremes seen.
    """

    counts: npt.NDArray[np.int64]  # [2 * SIDE]
    width: float
    lo: float
    hi: float

    @classmethod
    def of(cls, values: Array) -> Histogram:
        """The histogram of finite values of any shape, at least one."""
        x = values.astype(np.float32, copy=False).ravel()
        lo, hi = float(x.min()), float(x.max())
        # frexp: |x| < 2^exponent, strictly, so that the largest value is inside the last bin.
        exponent = math.frexp(max(-lo, hi))[1] if lo or hi else _LEAST_EXPONENT
        per_bin = math.ldexp(1.0, exponent) / SIDE
        bins = (
            np.floor(x * np.float64(1 / per_bin)).astype(np.intp) + SIDE
        )  # exact: a power of two, in double
        return cls(np.bincount(bins, minlength=2 * SIDE).astype(np.int64), per_bin, lo, hi)

    def __add__(self, other: Histogram) -> Histogram:
        width = max(self.width, other.width)
        counts = self._widened(width) + other._widened(width)
        return Histogram(counts, width, min(self.lo, other.lo), max(self.hi, other.hi))

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Bin edges, float64 [2 * SIDE + 1]."""
        return np.arange(-SIDE, SIDE + 1, dtype=np.float64) * self.width

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value that `share` (0 to 1) of all values do not pass, linear inside a bin, within [lo, hi]."""
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        want = share * float(cumulative[-1])
        last = int(np.searchsorted(cumulative, want, side="left"))
        if last == 0:
            return self.lo
        inside = (want - cumulative[last - 1]) / (cumulative[last] - cumulative[last - 1])
        return min(max(float(self.edges[last - 1] + inside * self.width), self.lo), self.hi)

    def absolute(self) -> Histogram:
        """The histogram of |x|; a bin of negative values goes to its mirror image."""
        counts = np.zeros_like(self.counts)
        counts[SIDE:] = self.counts[SIDE:] + self.counts[:SIDE][::-1]
        least = 0.0 if self.lo <= 0 <= self.hi else min(abs(self.lo), abs(self.hi))
        return Histogram(counts, self.width, least, max(-self.lo, self.hi))

    def _widened(self, width: float) -> npt.NDArray[np.int64]:
        counts, current = self.counts, self.width
        while current < width:
            pairs = counts.reshape(SIDE, 2).sum(axis=1)
            counts = np.zeros_like(counts)
            counts[SIDE // 2 : SIDE // 2 + SIDE] = pairs
            current *= 2
        return counts


@dataclass
class Statistics:
    """What calibration saw of each tensor; `count` is the number of samples that were run."""

    count: int = 0
    _ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    _histograms: dict[str, Histogram] = field(default_factory=dict)
    _squares: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    _rows: dict[str, int] = field(default_factory=dict)
    _channels: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    _samples: dict[str, tuple[int, int, npt.NDArray[np.float32]]] = field(default_factory=dict)  # stride, seen, rows

    def add(self, tensor: str, values: Array, kinds: Collection[str] = KINDS) -> None:
        """Take in one batch of a tensor: [..., K] for squares and sample, any shape else. CalibrationError for NaN, Inf
        or a K that varies.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise CalibrationError(
                f"statistic '{unknown[0]}' of tensor '{tensor}' is not known; use {', '.join(KINDS)}"
            )
        if values.size == 0:
            return
        x = values.astype(np.float32, copy=False)
        lo, hi = float(x.min()), float(x.max())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CalibrationError(
                f"tensor '{tensor}' holds NaN or Inf on the calibration data; check the data and the model"
            )
        if "range" in kinds or "histogram" in kinds:
            seen = self._ranges.get(tensor, (lo, hi))
            self._ranges[tensor] = (min(lo, seen[0]), max(hi, seen[1]))
        if "histogram" in kinds:
            new = Histogram.of(x)
            self._histograms[tensor] = self._histograms[tensor] + new if tensor in self._histograms else new
        if "squares" in kinds:
            self._add_squares(tensor, np.atleast_1d(x))
        if "channels" in kinds:
            peaks = np.abs(x).reshape(-1, x.shape[-1] if x.ndim else 1).max(axis=0)
            self._channels[tensor] = np.maximum(self._channels.get(tensor, peaks), peaks)
        if "sample" in kinds:
            self._add_sample(tensor, x.reshape(-1, x.shape[-1]))

    def range(self, tensor: str) -> tuple[float, float]:
        """The least and the largest value seen."""
        return _get(self._ranges, tensor, "range")

    def histogram(self, tensor: str) -> Histogram:
        return _get(self._histograms, tensor, "histogram")

    def squares(self, tensor: str) -> npt.NDArray[np.float64]:
        """Sum of squares along the last axis's channels over all rows, float64 [K]; divide by rows() for the
        mean.
        """
        return _get(self._squares, tensor, "squares")

    def channels(self, tensor: str) -> npt.NDArray[np.float32]:
        """Largest |x| of each channel of the last axis, float32 [K]."""
        return _get(self._channels, tensor, "channels")

    def sample(self, tensor: str) -> npt.NDArray[np.float32]:
        """Rows (tokens) evenly spread over all that were seen, float32 [T, K]; T is below twice SAMPLE."""
        return _get(self._samples, tensor, "sample")[2]

    def rows(self, tensor: str) -> int:
        """How many vectors of the last axis (tokens) went into squares()."""
        return _get(self._rows, tensor, "squares")

    def clip(
        self, tensor: str, method: Method = "min-max", percentile: float = 99.99, dtype: QuantType = "uint8"
    ) -> tuple[float, float]:
        """The range (lo, hi) to quantize a tensor in, never wider than what was seen and 0.

        min-max: all of it. percentile: that share of the values, the rest cut half on each side (int8: by
        |x|).
        entropy: least Kullback-Leibler divergence of the quantized from the clipped histogram (Migacz, GTC
        2017).
        mse: least mean squared error of quantization to `dtype`. int8 is symmetric: lo = -hi, but for
        min-max.
        """
        if method == "min-max":
            return self.range(tensor)
        search: dict[str, Callable[[Histogram, QuantType], tuple[float, float]]] = {
            "percentile": lambda histogram, kind: _clip_percentile(histogram, kind, percentile),
            "entropy": _clip_entropy,
            "mse": _clip_mse,
        }
        if method not in search:
            raise CalibrationError(
                f"clipping method '{method}' is not known; use min-max, {', '.join(search)}"
            )
        lo, hi = search[method](self.histogram(tensor), dtype)
        return float(lo), float(hi)

    def _add_squares(self, tensor: str, x: Array) -> None:
        rows = x.reshape(-1, x.shape[-1])
        total = self._squares.get(tensor, np.zeros(rows.shape[1]))
        if total.shape != rows.shape[1:]:
            raise CalibrationError(
                f"tensor '{tensor}' has {rows.shape[1]} channels in one batch, {total.shape[0]} in another; "
                "squares need a fixed last dimension"
            )
        for start in range(0, rows.shape[0], _ROWS):
            part = rows[start : start + _ROWS].astype(np.float64)
            total = total + np.einsum("rk,rk->k", part, part)
        self._squares[tensor] = total
        self._rows[tensor] = self._rows.get(tensor, 0) + rows.shape[0]


    def _add_sample(self, tensor: str, rows: Array) -> None:
        """Every stride-th row; the stride doubles when there are too many."""
        stride, seen, kept = self._samples.get(tensor, (1, 0, rows[:0]))
        kept = np.concatenate([kept, rows[-seen % stride :: stride]])
        seen += len(rows)
        while len(kept) >= 2 * SAMPLE:
            kept, stride = kept[::2], stride * 2
        self._samples[tensor] = stride, seen, kept


def _get(found: dict[str, Value], tensor: str, kind: str) -> Value:
    if tensor not in found:
        raise CalibrationError(
            f"no {kind} of tensor '{tensor}' was collected; name it in the pass's needs() and check the data"
        )
    return found[tensor]


def _clip_percentile(histogram: Histogram, dtype: QuantType, percentile: float) -> tuple[float, float]:
    if not 0 < percentile <= 100:
        raise CalibrationError(f"percentile {percentile:g} is not within 0 to 100; 99.99 is usual")
    share = percentile / 100
    if dtype == "int8":
        edge = histogram.absolute().quantile(share)
        return -edge, edge
    cut = (1 - share) / 2
    return histogram.quantile(cut), histogram.quantile(1 - cut)


def _clip_entropy(histogram: Histogram, dtype: QuantType) -> tuple[float, float]:
    """Tries 128 thresholds t on |x| and keeps the widest of the best."""
    source, levels = (histogram.absolute(), 128) if dtype == "int8" else (histogram, 256)
    used = np.flatnonzero(source.counts)
    first, last = min(int(used[0]), SIDE), max(int(used[-1]) + 1, SIDE)
    reach = max(SIDE - first, last - SIDE)
    best, threshold = math.inf, reach
    for bins in np.unique(np.linspace(min(128, reach), reach, 128).astype(int))[::-1]:
        begin, end = max(first, SIDE - bins), min(last, SIDE + bins)
        if end - begin < levels and bins < reach:
            continue  # each bin would be a level by itself, and nothing lost
        divergence = _divergence(source.counts, begin, end, levels)
        if divergence < best:
            best, threshold = divergence, int(bins)
    edge = threshold * histogram.width
    lo, hi = max(histogram.lo, -edge), min(histogram.hi, edge)
    return (-max(-lo, hi), max(-lo, hi)) if dtype == "int8" else (lo, hi)


def _divergence(counts: npt.NDArray[np.int64], begin: int, end: int, levels: int) -> float:
    """KL divergence of counts[begin:end] at `levels` levels from the same with all other counts saturated to
    its ends.
    """
    inside = counts[begin:end].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:begin].sum()
    clipped[-1] += counts[end:].sum()
    level = np.arange(end - begin) * levels // (end - begin)
    occupied = inside > 0
    shared = np.bincount(level[occupied], minlength=levels)
    mean = np.bincount(level, weights=inside, minlength=levels) / np.maximum(shared, 1)
    # A bin that holds outliers only has no quantized mass; a small floor keeps its penalty finite.
    quantized = np.where(occupied, mean[level], 0.0) + 1e-4
    seen = clipped > 0
    p = clipped[seen] / clipped.sum()
    q = quantized[seen] / quantized.sum()
    return float((p * np.log(p / q)).sum())


def _clip_mse(histogram: Histogram, dtype: QuantType) -> tuple[float, float]:
    """Shrinks both ends together over 64 steps, then each end by itself twice (both at once for int8)."""
    used = histogram.counts > 0
    counts = histogram.counts[used].astype(np.float64)
    centres = np.clip((histogram.edges[:-1] + histogram.width / 2)[used], histogram.lo, histogram.hi)

    narrow = centres.astype(np.float32)

    @cache  # ends are tried again, those of both rounds most of all
    def error(lo: float, hi: float) -> float:
        lost = rounded(narrow, activation_params(lo, hi, dtype)) - centres
        return float((counts * lost**2).sum())

    lo, hi = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    if dtype == "int8":
        lo, hi = -max(-lo, hi), max(-lo, hi)
    shrink = np.geomspace(1.0, 2.0**-8, 64).tolist()
    best = min(shrink, key=lambda part: error(lo * part, hi * part))
    fine = [best * part for part in np.geomspace(2.0**0.125, 2.0**-0.125, 17) if best * part <= 1]
    if dtype == "int8":
        best = min(fine, key=lambda part: error(lo * part, hi * part))
        return lo * best, hi * best
    low, high = lo * best, hi * best
    for _ in range(2):
        low = min([low, *(lo * part for part in shrink + fine)], key=lambda end: error(end, high))
        high = min([high, *(hi * part for part in shrink + fine)], key=lambda end: error(low, end))
    return low, high
