"""The best values of the weights that a mask keeps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EXACT = 512  # inputs up to which each row's equations are solved as they stand
STEPS = 100
LARGEST = 1e15  # of what is squared in single precision
CLOSE = 1e-4  # of a row's first residual, where conjugate gradients stop
CROWDED = 0.8  # share of rows that still move, below which the others are set aside


class Scaled(NamedTuple):
    """A Hessian with inputs in units of their power: matrix[i, j] = H[i, j] / (scale[i] scale[j]), float32 [K, K], with
    a diagonal of ones."""

    scale: np.ndarray
    matrix: np.ndarray


def scaled(hessian: np.ndarray) -> Scaled:
    """The Hessian in units of its diagonal, which must not be 0."""
    scale = np.sqrt(np.diag(hessian))
    return Scaled(scale, (hessian / np.outer(scale, scale)).astype(np.float32))


def refit(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
    """Least tr((V - W) H (V - W)^T) over all V [N, K] that are zero outside `mask` [N, K].

    Up to 512 inputs the equations of each row are solved, once for all rows that share their support; for more,
    `descended` from `start` on. H must be positive definite.
    """
    if weight.shape[1] <= EXACT:
        return solved(weight, hessian, mask)
    return descended(weight, scaled(hessian), mask, start=start)


def solved(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each row's equations as they stand."""
    wanted = weight @ hessian
    result: np.ndarray = np.zeros_like(wanted)
    supports, which = np.unique(np.packbits(mask, axis=1), axis=0, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    ends = np.searchsorted(which.ravel()[order], np.arange(len(supports) + 1))
    for group in range(len(supports)):
        rows = order[ends[group] : ends[group + 1]]
        kept = np.flatnonzero(mask[rows[0]])
        if kept.size:
            found = np.linalg.solve(hessian[np.ix_(kept, kept)], wanted[np.ix_(rows, kept)].T)
            result[np.ix_(rows, kept)] = found.T
    return result


def descended(
    weight: np.ndarray, hessian: Scaled, mask: np.ndarray, steps: int = STEPS, start: np.ndarray | None = None
) -> np.ndarray:
    """Preconditioned conjugate gradients on all rows at once, at most `steps` of them.

    start: weights near the solution, zero outside the mask; otherwise it is `weight`, masked. A row stops where its
    residual is `CLOSE` to nothing, of what it is at the masked weight.
    """
    scale, matrix = hessian
    goal = (weight * scale).astype(np.float32, order="C")  # as all others: mixed orders are slow
    keep = mask.astype(np.float32, order="C")
    result = goal * keep
    residual = ((goal - result) @ matrix) * keep
    enough = CLOSE**2 * _power(residual)
    if start is not None:
        result = (start * scale).astype(np.float32, order="C") * keep
        residual = ((goal - result) @ matrix) * keep
    rows, at, direction, power = np.arange(len(goal)), result.copy(), residual.copy(), _power(residual)
    room = np.empty_like(goal), np.empty_like(goal)  # that every step takes again
    for turn in range(steps):
        left = power > enough
        moving = np.flatnonzero(left)
        if not moving.size:
            break
        if moving.size <= CROWDED * len(rows):
            result[rows] = at
            rows, left = rows[moving], left[moving]
            at, residual, direction, keep = at[moving], residual[moving], direction[moving], keep[moving]
            power, enough = power[moving], enough[moving]
        moved = np.matmul(direction, matrix, out=room[0][: len(rows)])
        moved *= keep
        spare = np.multiply(direction, moved, out=room[1][: len(rows)])
        curve = np.sum(spare, axis=1, keepdims=True)
        step = np.where(left, power / np.maximum(curve, 1e-30), 0).astype(np.float32)
        at += np.multiply(direction, step, out=spare)
        if turn == steps - 1:
            break
        moved *= step
        residual -= moved
        now = _power(residual)
        direction *= np.where(left, now / np.maximum(power, 1e-30), 0).astype(np.float32)
        direction += residual
        power = now
    result[rows] = at
    return np.asarray(result / scale)


def _power(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nk,nk->n", rows, rows)[:, None])
