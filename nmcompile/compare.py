"""How far two runs of a model are apart, output by output; numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from nmcompile.errors import InputError
from nmcompile.roles import real_tokens as real_tokens  # which tokens `Comparison.add` takes
from nmcompile.tensorinfo import TensorInfo

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """Of one output over all samples: `cosine` is the mean over its vectors (last axis), NaN for single values and for
    labels (whole numbers), `sqnr` the signal's power over the error's in dB, `top1` the share of vectors whose largest
    element is the same, or of labels that are, NaN for single values."""

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
        self._labels: set[str] = set()

    def add(self, reference: Arrays, other: Arrays, real: np.ndarray | None = None) -> None:
        """Compare the outputs both have. `real` [batch, tokens] leaves padding out of outputs [batch, tokens, ...]."""
        for name in reference:
            first, second = (np.asarray(values.get(name)) for values in (reference, other))
            if name not in other or not (is_float(first) or first.dtype.kind in "iub"):
                continue
            if first.shape != second.shape:
                shapes = f"{list(first.shape)} in one and {list(second.shape)} in the other"
                raise InputError(f"output {name!r} has shape {shapes}")
            for part in parts(first, second, real, whole=name in self._whole):
                self._add(name, part)

    def _add(self, name: str, part: Part) -> None:
        a, b = part.one, part.two
        error = np.abs(a - b)
        sums = np.array([error.sum(), a.size, (a * a).sum(), ((a - b) ** 2).sum(), 0.0, 0.0, 0.0])
        if part.kind == "vectors":
            sums[4:] = cosines(a, b).sum(), _same_top(a, b), len(a)
        elif part.kind == "labels":
            sums[5:] = (a == b).sum(), a.size
            self._labels.add(name)
        self._sums[name] = self._sums.get(name, 0) + sums
        self._max[name] = float(np.maximum(self._max.get(name, 0.0), error.max()))  # NaN stays NaN

    def differences(self) -> dict[str, Difference]:
        found = {}
        for name, (error, count, signal, noise, cosine, top1, rows) in self._sums.items():
            power = float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-300) / noise)
            found[name] = Difference(
                max_error=self._max[name],
                mean_error=float(error / count),
                cosine=float(cosine / rows) if rows and name not in self._labels else float("nan"),
                sqnr=float(power),
                top1=float(top1 / rows) if rows else float("nan"),
                values=int(count),
            )
        return found


@dataclass(frozen=True)
class Part:
    """Values of an output in two runs, float64. kind: vectors [rows, C], scores (single values) or labels (whole
    numbers)."""

    kind: str
    one: np.ndarray
    two: np.ndarray


def parts(a: np.ndarray, b: np.ndarray, real: np.ndarray | None, whole: bool = False) -> Iterator[Part]:
    """What can be compared of an output of a batch, padding left out. whole: [batch, C] that is not about tokens."""
    labels = not is_float(a)
    padded = real is not None and not whole and a.shape[:2] == real.shape
    if padded and a.ndim == 2 and not labels:  # a logit for each token: a vector over the tokens of each sequence
        assert real is not None
        for one, two, keep in zip(a, b, real, strict=True):
            if keep.any():
                yield _part("vectors" if keep.sum() > 1 else "scores", one[keep][None], two[keep][None])
        return
    if padded:
        a, b = a[real], b[real]
    elif real is not None and a.ndim == 4 and (a.shape[0], *a.shape[2:]) == (*real.shape, real.shape[1]):
        a, b = (values.swapaxes(1, 2)[real] for values in (a, b))  # attention: the queries that are padding
    if not a.size:
        return
    if labels:
        yield _part("labels", a.ravel(), b.ravel())
    elif a.ndim > 1 and a.shape[-1] > 1:
        yield _part("vectors", a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
    else:  # [batch] or [batch, 1]: a vector of width 1 has no direction
        yield _part("scores", a.ravel(), b.ravel())


def _part(kind: str, one: np.ndarray, two: np.ndarray) -> Part:
    return Part(kind, one.astype(np.float64), two.astype(np.float64))


def is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row; 1 for two rows of zeros."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = (a * b).sum(axis=1)
    return np.asarray(np.where(norms > 0, dots / np.maximum(norms, 1e-300), (a == b).all(axis=1)))


def _same_top(a: np.ndarray, b: np.ndarray) -> int:
    """Rows whose largest element is the same; one that holds NaN has none."""
    known = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    return int(((a.argmax(1) == b.argmax(1)) & known).sum())


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
