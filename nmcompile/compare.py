"""How far two runs of a model are apart, output by output; numpy only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from nmcompile.errors import CalibrationError, InputError
from nmcompile.tensorinfo import TensorInfo

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """Of one output over all samples: `cosine` is the mean over its vectors (last axis), `sqnr` the signal's power over
    the error's in dB, `top1` the share of vectors whose largest element is the same, NaN for single values."""

    max_error: float
    mean_error: float
    cosine: float
    sqnr: float
    top1: float
    values: int

    def to_json(self) -> dict[str, float | int | None]:
        """NaN and infinity as None, so that any JSON reader takes it."""
        return {k: v if isinstance(v, int) or np.isfinite(v) else None for k, v in asdict(self).items()}


class Comparison:
    """Takes in pairs of outputs batch by batch; `differences()` gives the figures so far.

    `outputs` describes the outputs where it is known, to tell tokens from features.
    """

    def __init__(self, outputs: Iterable[TensorInfo] = ()) -> None:
        # [batch, 64] is one vector per sequence even where a batch happens to have 64 tokens
        self._whole = {info.name for info in outputs if len(info.shape) == 2 and isinstance(info.shape[1], int)}
        self._sums: dict[str, np.ndarray] = {}
        self._max: dict[str, float] = {}

    def add(self, reference: Arrays, other: Arrays, real: np.ndarray | None = None) -> None:
        """Compare the outputs both have. `real` [batch, tokens] leaves padding out of outputs [batch, tokens, ...]."""
        for name in reference:
            if name not in other or reference[name].dtype.kind not in "fiub":
                continue
            a, b = (np.asarray(values[name]).astype(np.float64) for values in (reference, other))
            if a.shape != b.shape:
                raise InputError(f"output {name!r} has shape {list(a.shape)} in one and {list(b.shape)} in the other")
            if real is not None and a.shape[:2] == real.shape and name not in self._whole:
                a, b = a[real], b[real]
            elif real is not None and a.ndim == 4 and (a.shape[0], *a.shape[2:]) == (*real.shape, real.shape[1]):
                a, b = (values.swapaxes(1, 2)[real] for values in (a, b))  # attention: the queries that are padding
            if not a.size:
                continue
            error = np.abs(a - b)
            rows = (a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])) if a.ndim > 1 and a.shape[-1] > 1 else None
            sums = np.array([error.sum(), a.size, (a * a).sum(), ((a - b) ** 2).sum(), 0.0, 0.0, 0.0])
            if rows is not None:
                norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
                dots = (rows[0] * rows[1]).sum(axis=1)
                cosines = np.where(norms > 0, dots / np.maximum(norms, 1e-300), (rows[0] == rows[1]).all(axis=1))
                sums[4:] = cosines.sum(), _same_top(*rows), len(rows[0])
            self._sums[name] = self._sums.get(name, 0) + sums
            self._max[name] = float(np.maximum(self._max.get(name, 0.0), error.max()))  # NaN stays NaN

    def differences(self) -> dict[str, Difference]:
        found = {}
        for name, (error, count, signal, noise, cosine, top1, rows) in self._sums.items():
            power = float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-300) / noise)
            found[name] = Difference(
                max_error=self._max[name],
                mean_error=float(error / count),
                cosine=float(cosine / rows) if rows else float("nan"),
                sqnr=float(power),
                top1=float(top1 / rows) if rows else float("nan"),
                values=int(count),
            )
        return found


def _same_top(a: np.ndarray, b: np.ndarray) -> int:
    """Rows whose largest element is the same; one that holds NaN has none."""
    known = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    return int(((a.argmax(1) == b.argmax(1)) & known).sum())


def is_mask(name: str) -> bool:
    """Named like a mask of padding: attention_mask, input_mask:0, but not masked_positions."""
    return re.search(r"mask([:._]\d+)?$", name.lower()) is not None


def real_tokens(feeds: Arrays) -> np.ndarray | None:
    """bool [batch, tokens] of the tokens that an attention mask among the inputs keeps, None when nothing is padded.

    CalibrationError for a mask that keeps nothing.
    """
    for name, values in feeds.items():
        array = np.asarray(values)
        if is_mask(name) and array.ndim == 2 and array.size and array.min() >= 0:  # additive masks have negative values
            real = array != 0
            if not real.any():
                raise CalibrationError(f"input '{name}' masks every token of a batch; mend the data")
            return None if real.all() else real
    return None


def worst(differences: Iterable[Difference]) -> Difference | None:
    """The one of least signal-to-noise ratio."""
    return min(differences, key=lambda item: item.sqnr, default=None)


def powers(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Power of a tensor, and of its difference to another; where these are finite (a unit may be switched off by a bias
    of -inf), and in double precision where single does not hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        power, error = float(np.sum(x**2, dtype=np.float64)), float(np.sum((x - y) ** 2, dtype=np.float64))
    if np.isfinite(power) and np.isfinite(error):
        return power, error
    both = np.isfinite(x) & np.isfinite(y)
    wide, other = x[both].astype(np.float64), y[both].astype(np.float64)
    return float(np.vdot(wide, wide)), float(np.sum((wide - other) ** 2))
