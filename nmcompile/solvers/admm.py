"""The mask by alternating directions: ALPS (Meng et al. 2024, arXiv 2406.07831)."""

from __future__ import annotations

import numpy as np

from nmcompile import sparsity as sp
from nmcompile.solvers.inverse import inverted
from nmcompile.solvers.refit import LARGEST, refit, scaled
from nmcompile.solvers.solver import Solution

STEPS = 300
EVERY = 3  # steps between changes of the penalty
WIDE, RARER = 2048, 3  # inputs above which inverting costs the most: the penalty changes less often, by as much in all
FIRST = 0.1  # penalty, in units of the Hessian's diagonal
# share of the kept weights that moved since the last change -> how much faster the penalty may grow
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def admm(weight: np.ndarray, hessian: np.ndarray, pattern: sp.Pattern, sparsity: float) -> Solution:
    """min tr((V - W) H (V - W)^T) with V of the pattern, split into the error of V and the pattern of a copy D.

    V minimizes error + penalty/2 |V - D + U|^2, D is the nearest of the pattern to V + U, U sums up their difference;
    the penalty grows the faster the more of D's support still moves, until it stands still. Inputs are scaled so that
    H has a diagonal of ones. The kept weights are refitted at the end.
    """
    scale, matrix = scaled(hessian)
    goal = weight * scale
    largest = float(np.abs(goal).max(initial=0.0))
    unit = largest if largest > LARGEST else 1.0
    goal = (goal / unit).astype(np.float32, order="C")  # masks do not depend on the unit; mixed orders are slow
    pull = goal @ matrix
    mask = sp.keep_mask(goal**2, pattern, sparsity)
    near, drift = goal * mask, np.zeros_like(goal)  # D, and U times the penalty
    free, wanted, spare = (np.empty_like(goal) for _ in range(3))  # V, and room that every step takes again
    penalty, inverse, before = FIRST, np.empty(0), mask
    rarer = RARER if len(matrix) > WIDE else 1
    for step in range(STEPS):
        if step % (EVERY * rarer) == 0:
            if step:
                moved = int(np.count_nonzero(mask != before)) / max(2 * int(np.count_nonzero(mask)), 1)
                if moved == 0.0 and step > 2 * EVERY * rarer:
                    break
                penalty *= next(growth for least, growth in GROWTH if moved >= least) ** rarer
                before = mask
            inverse = inverted(_raised(matrix, penalty))
        np.subtract(pull, drift, out=wanted)
        wanted += np.multiply(near, np.float32(penalty), out=spare)
        np.matmul(wanted, inverse, out=free)
        reached = np.divide(drift, np.float32(penalty), out=wanted)
        reached += free
        mask = sp.keep_mask(np.square(reached, out=spare), pattern, sparsity)
        np.multiply(reached, mask, out=near)
        free -= near
        free *= np.float32(penalty)
        drift += free
    return Solution(refit(weight, hessian, mask, start=near * unit / scale), mask)


def _raised(matrix: np.ndarray, penalty: float) -> np.ndarray:
    """matrix + penalty * I."""
    raised = matrix.copy()
    np.einsum("kk->k", raised)[:] += np.float32(penalty)
    return raised
