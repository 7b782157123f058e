"""What eight bits do to the outputs of linear layers, on a sample of tokens: ranges and biases chosen by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nmcompile import quantize as q8
from nmcompile.calibrate.statistics import Method

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics

CANDIDATES: tuple[tuple[Method, float], ...] = (("mse", 0.0), ("min-max", 0.0), ("percentile", 99.999),
                                                ("percentile", 99.99), ("percentile", 99.9))  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Layers that read one tensor, on a sample of it.

    x [T, K]; exact: what each layer gives, [T, N]; coarse: each weight [N, K] after quantization and back.
    """

    x: np.ndarray
    exact: tuple[np.ndarray, ...]
    coarse: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, x: np.ndarray, weights: Sequence[np.ndarray], coarse: Sequence[np.ndarray]) -> Sample:
        return cls(x, tuple(x @ weight.T for weight in weights), tuple(coarse))

    def trial(self, params: q8.QuantParams, limit: float | None = None) -> Trial | None:
        """x rounded so; None as soon as the error reaches `limit`."""
        small, products, terms = q8.rounded(self.x, params), [], [0.0]
        for weight, wanted in zip(self.coarse, self.exact, strict=True):
            products.append(small @ weight.T)
            lost = products[-1] - wanted
            terms.append(float(np.vdot(lost, lost)) / max(float(np.vdot(wanted, wanted)), 1e-30))
            if limit is not None and not sum(terms) < limit:  # terms are not negative, or not numbers
                return None
        return Trial(params, tuple(products), sum(terms))


@dataclass(frozen=True)
class Trial:
    """What layers give where x and their weights are rounded, [T, N] each; error: the sum over them of
    |Q(x) Q(W)^T - x W^T|^2 / |x W^T|^2."""

    params: q8.QuantParams
    products: tuple[np.ndarray, ...]
    error: float


def candidates(statistics: Statistics, name: str, dtype: q8.QuantType) -> list[q8.QuantParams]:
    """What the clipping methods propose for a tensor, each once."""
    ends = dict.fromkeys(statistics.clip(name, method, share, dtype) for method, share in CANDIDATES)
    return [q8.activation_params(low, high, dtype) for low, high in ends]


def best_trial(sample: Sample, proposed: Iterable[q8.QuantParams]) -> Trial:
    """The first of those with the least error; `proposed` holds one at least."""
    best: Trial | None = None
    for params in proposed:
        best = sample.trial(params, None if best is None else best.error) or best
    assert best is not None
    return best


def mean_errors(sample: Sample, trial: Trial) -> list[np.ndarray]:
    """What biases take on, float32 [N] of each layer: what rounding takes from its outputs on average (Nagel et al.
    2019, arXiv 1906.04721)."""
    return [(wanted - found).mean(axis=0).astype(np.float32)
            for wanted, found in zip(sample.exact, trial.products, strict=True)]  # fmt: skip
