"""How good a compressed model is against the dense one, as one number: the metrics of --max-drop."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nmcompile.compare import cosines, is_float, parts
from nmcompile.errors import InputError, NmcompileError
from nmcompile.roles import real_tokens
from nmcompile.tensorinfo import TensorInfo

Arrays = Mapping[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Limit:
    """A metric and how far it may fall below the dense model's."""

    name: str
    value: float
    score: Callable[[Run, Run], float]  # (dense model, compressed model) -> drop, 0 when nothing is lost


def parse_limit(text: str, samples: Iterable[Arrays], inputs: Sequence[TensorInfo] = ()) -> Limit:
    """"cosine=0.01", "kl=0.05", "top1=0.02" or "FILE.py:FUNCTION=0.5"; InputError tells what is wrong.

    cosine: 1 - mean cosine of the outputs' vectors; single scores, one for each sample, are one vector. kl: mean
    Kullback-Leibler divergence of softmax(outputs), in nats. top1: share of vectors whose largest element is another,
    and of labels that are others. A function takes run(feeds) -> outputs and gives a number that is higher for better
    models; the drop is the dense model's less the compressed one's. Measuring raises InputError where outputs hold
    nothing of the kind. inputs: the model's, whose roles tell padding from tokens.
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
        return Limit(name, value, lambda dense, other: measure(dense, other, samples, inputs))
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


# ---- what an output holds ----------------------------------------------------------------------------------------


@dataclass
class Held:
    """Of one output over all samples, in pairs: vectors [rows, C] of its last axis, and values of none (one score for
    each sample, labels)."""

    vectors: list[Pair] = field(default_factory=list)
    scores: list[Pair] = field(default_factory=list)
    labels: list[Pair] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "vectors" if self.vectors else "scores" if self.scores else "labels" if self.labels else "nothing"


def gather(
    dense: Run, other: Run, samples: Iterable[Arrays], inputs: Sequence[TensorInfo] = ()
) -> dict[str, Held]:
    """What the outputs hold in all samples, float64, padding left out. InputError for outputs of other shapes."""
    found: dict[str, Held] = {}
    for feeds in samples:
        real = real_tokens(feeds, inputs)
        first, second = dense(feeds), other(feeds)
        for name, a in first.items():
            held, b = found.setdefault(name, Held()), second[name]
            if a.shape != b.shape:
                raise InputError(f"output {name!r} has shape {list(a.shape)} in one and {list(b.shape)} in the other")
            for part in parts(a, b, real) if is_float(a) or a.dtype.kind in "iub" else ():
                getattr(held, part.kind).append((part.one, part.two))
    return found


def _all(pairs: Sequence[Pair]) -> Pair:
    return np.concatenate([a.ravel() for a, _ in pairs]), np.concatenate([b.ravel() for _, b in pairs])


# ---- the metrics -------------------------------------------------------------------------------------------------


def cosine(dense: Run, other: Run, samples: Iterable[Arrays], inputs: Sequence[TensorInfo] = ()) -> float:
    """1 - mean cosine of vectors; of single scores, 1 - the cosine of all of them as one vector. The greatest where a
    model has both."""
    held = gather(dense, other, samples, inputs)
    drops = [1 - float(np.mean(np.concatenate([cosines(a, b) for a, b in pairs])))
             for pairs in [[pair for item in held.values() for pair in item.vectors]] if pairs]  # fmt: skip
    scores = [_all(item.scores) for item in held.values() if item.kind == "scores"]
    drops += [1 - float(cosines(a[None], b[None])[0]) for a, b in scores if a.size > 1]
    return _most("cosine", drops, held)


def divergence(dense: Run, other: Run, samples: Iterable[Arrays], inputs: Sequence[TensorInfo] = ()) -> float:
    """Mean KL(softmax(dense) | softmax(other)), nats."""
    held = gather(dense, other, samples, inputs)
    found = []
    for a, b in (pair for item in held.values() for pair in item.vectors):
        p, q = _log_softmax(a), _log_softmax(b)
        found.append(np.sum(np.exp(p) * (p - q), axis=1))
    return _most("kl", [float(np.mean(np.concatenate(found)))] if found else [], held)


def disagreement(dense: Run, other: Run, samples: Iterable[Arrays], inputs: Sequence[TensorInfo] = ()) -> float:
    """Share of vectors whose largest element is another; of labels (whole numbers), share that are others. The greatest
    where a model has both."""
    held = gather(dense, other, samples, inputs)
    found = [a.argmax(axis=1) != b.argmax(axis=1) for item in held.values() for a, b in item.vectors]
    drops = [float(np.mean(np.concatenate(found)))] if found else []
    labels = [_all(item.labels) for item in held.values() if item.kind == "labels"]
    return _most("top1", drops + [float(np.mean(a != b)) for a, b in labels], held)


def _most(name: str, drops: Sequence[float], held: Mapping[str, Held]) -> float:
    """The greatest drop, NaN if there is one; InputError where nothing was measured."""
    if drops:
        return float(np.max(drops))
    if not held:
        raise InputError(f"--max-drop {name} has nothing to measure: no sample fills a batch of the model, or it has "
                         "no outputs; give more samples")  # fmt: skip
    kinds = {"scores": "single scores", "labels": "labels (whole numbers)", "nothing": "no numbers"}
    told = ", ".join(f"{output} holds {kinds[item.kind]}" for output, item in held.items())
    fits = [metric for metric, kind in (("cosine", "scores"), ("top1", "labels")) if metric != name
            and any(item.kind == kind for item in held.values())]  # fmt: skip
    more = ", or give more samples" if name == "cosine" and not fits else ""
    raise InputError(f"--max-drop {name} has nothing to measure: {told}; "
                     f"take {' or '.join([*fits, 'FILE.py:FUNCTION'])}{more}")  # fmt: skip


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


METRICS = {"cosine": cosine, "kl": divergence, "top1": disagreement}
