"""Which weights of a linear layer to keep and what they become, from calibration alone; arrays only, knows no graph.

A layer with inputs x [T, K] and weight W [N, K] is fitted by its Hessian H = X^T X [K, K]: the error of another weight
V is |X (V - W)^T|^2 = tr((V - W) H (V - W)^T). A solver takes W and H and returns the pruned V of the same shape, and
the mask of what it keeps. Adding one: its file, and a row of SOLVERS with what it needs; all else reads that row.

solver     what a row of the table says
moments    H and the target W from streams of inputs, damped
masks      magnitude and Wanda: which weights to keep, values left as they are
obs        SparseGPT: column by column, what was lost goes to the columns that follow
admm       ALPS: the mask by alternating between the error and the pattern
inverse    of a Hessian, by products of blocks
refit      the best values for a mask
rounding   int8 levels, each rounding error made up for by what follows
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nmcompile.solvers.admm import admm
from nmcompile.solvers.allocate import allocate
from nmcompile.solvers.masks import magnitude, wanda
from nmcompile.solvers.moments import LEAST, Moments, damped
from nmcompile.solvers.obs import obs
from nmcompile.solvers.refit import LARGEST, Scaled, descended, refit, scaled, solved
from nmcompile.solvers.rounding import rounded
from nmcompile.solvers.solver import Needs, Solution, Solver, scored

__all__ = ["LEAST", "SOLVERS", "Moments", "Needs", "Scaled", "Solution", "Solver", "admm", "allocate", "damped",
           "descended", "obs", "power", "power_lost", "refit", "relative_error", "rounded", "scaled", "scored",
           "solved"]  # fmt: skip

SOLVERS: Mapping[str, Solver] = {
    "magnitude": scored(magnitude, Needs.NOTHING),
    "wanda": scored(wanda, Needs.SQUARES),
    "obs": Solver(obs, Needs.HESSIAN),
    "admm": Solver(admm, Needs.HESSIAN),
}


def relative_error(pruned: np.ndarray, weight: np.ndarray, hessian: np.ndarray) -> float:
    """|X (V - W)^T|^2 / |X W^T|^2: the share of a layer's output power that is lost."""
    return power(pruned - weight, hessian) / max(power(weight, hessian), 1e-300)


def power_lost(pruned: np.ndarray, weight: np.ndarray, hessian: Scaled) -> float:
    """|X (V - W)^T|^2, its product in single precision: for errors that are compared to others."""
    wide = (pruned - weight) * hessian.scale
    unit = max(float(np.abs(wide).max(initial=0.0)) / LARGEST, 1.0)  # what single precision does not hold squared
    lost = (wide / unit).astype(np.float32)
    return unit**2 * float(np.sum((lost @ hessian.matrix) * lost, dtype=np.float64))


def power(weight: np.ndarray, hessian: np.ndarray) -> float:
    """|X W^T|^2."""
    return float(np.sum((weight @ hessian) * weight))
