"""How good a compressed model is against the dense one, as one number: the metrics of --max-drop."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmcompile.compare import real_tokens
from nmcompile.errors import InputError, NmcompileError

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Limit:
    """A metric and how far it may fall below the dense model's."""

    name: str
    value: float
    score: Callable[[Run, Run], float]  # (dense model, compressed model) -> drop, 0 when nothing is lost


def parse_limit(text: str, samples: Iterable[Arrays]) -> Limit:
    """"cosine=0.01", "kl=0.05", "top1=0.02" or "FILE.py:FUNCTION=0.5"; InputError tells what is wrong.

    cosine: 1 - mean cosine of the outputs' vectors. kl: mean Kullback-Leibler divergence of softmax(outputs), in nats.
    top1: share of vectors whose largest element is another. A function takes run(feeds) -> outputs and gives a number
    that is higher for better models; the drop is the dense model's less the compressed one's.
    """
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not equals or not name or not value >= 0:
        raise InputError(f"--max-drop {text!r} is not METRIC=VALUE; for example cosine=0.01 or score.py:accuracy=0.5")
    if name in METRICS:
        measure = METRICS[name]
        return Limit(name, value, lambda dense, other: measure(dense, other, samples))
    if ":" not in name:
        raise InputError(f"metric {name!r} is not known; choose {', '.join(METRICS)} or FILE.py:FUNCTION")
    score = user_function(name)
    return Limit(name, value, lambda dense, other: _number(name, score(dense)) - _number(name, score(other)))


def user_function(name: str) -> Callable[[Run], float]:
    """The function of a file, from "FILE.py:FUNCTION". InputError when there is none."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"metric {name!r}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"metric {name!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"metric {name!r}: {file} does not run: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"metric {name!r}: {file} has no function {function}")
    typed: Callable[[Run], float] = found
    return typed


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float, np.number)) or not np.isfinite(float(value)):
        raise NmcompileError(f"metric {name!r} gave {value!r}; it must return a finite number")
    return float(value)


def _vectors(dense: Run, other: Run, samples: Iterable[Arrays]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Pairs of float64 vectors [rows, C] of every float output, padding left out."""
    for feeds in samples:
        real = real_tokens(feeds)
        first, second = dense(feeds), other(feeds)
        for name, a in first.items():
            b = second[name]
            if a.dtype.kind != "f" or a.ndim < 2:
                continue
            if real is not None and a.shape[:2] == real.shape:
                a, b = a[real], b[real]
            yield a.reshape(-1, a.shape[-1]).astype(np.float64), b.reshape(-1, b.shape[-1]).astype(np.float64)


def cosine(dense: Run, other: Run, samples: Iterable[Arrays]) -> float:
    """1 - mean cosine."""
    found = [np.sum(a * b, axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-300)
             for a, b in _vectors(dense, other, samples)]  # fmt: skip
    return 1 - float(np.mean(np.concatenate(found))) if found else 0.0


def divergence(dense: Run, other: Run, samples: Iterable[Arrays]) -> float:
    """Mean KL(softmax(dense) | softmax(other)), nats."""
    found = []
    for a, b in _vectors(dense, other, samples):
        p, q = _log_softmax(a), _log_softmax(b)
        found.append(np.sum(np.exp(p) * (p - q), axis=1))
    return float(np.mean(np.concatenate(found))) if found else 0.0


def disagreement(dense: Run, other: Run, samples: Iterable[Arrays]) -> float:
    """Share of vectors whose largest element is another."""
    found = [a.argmax(axis=1) != b.argmax(axis=1) for a, b in _vectors(dense, other, samples)]
    return float(np.mean(np.concatenate(found))) if found else 0.0


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


METRICS = {"cosine": cosine, "kl": divergence, "top1": disagreement}
