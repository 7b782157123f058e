"""What a solver is, and what is known of it without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from nmcompile import sparsity as sp
from nmcompile.sparsity import Mask, Pattern


class Needs(Enum):
    """What a solver must know of a layer's inputs x [T, K]; whatever is not NOTHING takes calibration samples."""

    NOTHING = "nothing"
    SQUARES = "squares"  # the sums of x_k^2, [K]
    HESSIAN = "hessian"  # x^T x, [K, K]


class Solution(NamedTuple):
    """The weight that is left [N, K], zero outside `mask` [N, K]."""

    weight: np.ndarray
    mask: Mask


# (weight [N, K], squares [K]) -> what each weight is worth, [N, K]
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
# (weight [N, K], hessian [K, K], pattern, sparsity) -> what is left
Solve = Callable[[np.ndarray, np.ndarray, Pattern, float], Solution]


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    fits: the weights that stay change too, and are fitted to what the dense model gives. score: of a solver that leaves
    them as they are, by which the weights of many layers can be ranked together.
    """

    solve: Solve
    needs: Needs
    score: Score | None = None

    @property
    def fits(self) -> bool:
        return self.score is None


def scored(score: Score, needs: Needs) -> Solver:
    """The solver that keeps the units of greatest score, and leaves them as they are."""

    def solve(weight: np.ndarray, hessian: np.ndarray, pattern: Pattern, sparsity: float) -> Solution:
        mask = sp.keep_mask(score(weight, np.diag(hessian)), pattern, sparsity)
        return Solution(np.asarray(weight * mask), mask)

    return Solver(solve, needs, score)
