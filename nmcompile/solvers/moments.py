"""The normal equations of a linear layer, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nmcompile.errors import CalibrationError

ROWS = 4096  # at once, widened to float64: means are subtracted from the sums later, which float32 would not stand


class Moments:
    """Of inputs x [T, K] and, by name, of targets t [T, N]: x^T x, t^T x, |t|^2 and sums; float64, in memory that no
    data size changes."""

    def __init__(self, size: int, outputs: Mapping[str, int]) -> None:
        self.rows = 0
        self.hessian = np.zeros((size, size))
        self.sums = np.zeros(size)
        self.cross = {name: np.zeros((n, size)) for name, n in outputs.items()}
        self.target_sums = {name: np.zeros(n) for name, n in outputs.items()}
        self.power = dict.fromkeys(outputs, 0.0)

    def add(self, x: np.ndarray, targets: Mapping[str, np.ndarray]) -> None:
        """Take in inputs and what each layer should make of them. CalibrationError: NaN or Inf."""
        for values in (x, *targets.values()):
            if not np.isfinite(values).all():
                raise CalibrationError("NaN or Inf on the calibration data; check the data and the model")
        for start in range(0, len(x), ROWS):
            part = np.asarray(x[start : start + ROWS], np.float64)
            self.hessian += part.T @ part
            self.sums += part.sum(axis=0)
            for name, target in targets.items():
                wanted = np.asarray(target[start : start + ROWS], np.float64)
                self.cross[name] += wanted.T @ part
                self.target_sums[name] += wanted.sum(axis=0)
                self.power[name] += float(np.vdot(wanted, wanted))
        self.rows += len(x)

    @property
    def power_mean(self) -> float:
        """Mean of the Hessian's diagonal, never 0."""
        return max(float(np.mean(np.diag(self.hessian))), 1e-8)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.sums), {name: len(cross) for name, cross in self.cross.items()})
        total.rows = self.rows + other.rows
        total.hessian = self.hessian + other.hessian
        total.sums = self.sums + other.sums
        for name in self.cross:
            total.cross[name] = self.cross[name] + other.cross[name]
            total.target_sums[name] = self.target_sums[name] + other.target_sums[name]
            total.power[name] = self.power[name] + other.power[name]
        return total

    def centred(self) -> Moments:
        """The same about the means of inputs and targets: the fit of a layer that has a bias."""
        total = Moments(len(self.sums), {name: len(cross) for name, cross in self.cross.items()})
        total.rows, count = self.rows, max(self.rows, 1)
        total.hessian = self.hessian - np.outer(self.sums, self.sums) / count
        diagonal = np.einsum("kk->k", total.hessian)
        np.maximum(diagonal, 0.0, out=diagonal)
        for name, cross in self.cross.items():
            wanted = self.target_sums[name]
            total.cross[name] = cross - np.outer(wanted, self.sums) / count
            total.power[name] = self.power[name] - float(wanted @ wanted) / count
        return total

    def shift(self, name: str, weight: np.ndarray) -> np.ndarray:
        """What a layer of this weight [N, K] lacks of the target on average, [N]: what its bias must take on."""
        return np.asarray((self.target_sums[name] - weight @ self.sums) / max(self.rows, 1))

    def error(self, name: str, weight: np.ndarray) -> float:
        """|x V^T - t|^2 / |t|^2 of a weight V [N, K]."""
        lost = float(np.sum((weight @ self.hessian - 2 * self.cross[name]) * weight)) + self.power[name]
        return max(lost, 0.0) / max(self.power[name], 1e-300)


LEAST = 1e-4  # of the mean diagonal: what damping takes the power of an input that is hardly ever there for


def damped(moments: Moments, name: str, weight: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(target weight [N, K], Hessian [K, K]) of the fit to a target, pulled towards `weight`.

    The best V of |x V^T - t|^2 + tr((V - W) D (V - W)^T), D = `share` of the Hessian's diagonal, and H + D: the error
    of any other V beside it is tr((V - V0)(H + D)(V - V0)^T). Where t = W x, V0 is W itself. The pull is what makes a
    Hessian of too few rows usable; it is relative to each input's own power, because a few outlier channels would
    otherwise decide for all.
    """
    power = np.diag(moments.hessian)
    pull = share * np.maximum(power, LEAST * moments.power_mean)
    hessian = moments.hessian + np.diag(pull)
    target = np.linalg.solve(hessian, (moments.cross[name] + pull * weight).T).T
    return target, hessian
