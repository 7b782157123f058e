"""The best values of the weights that a mask keeps."""

from __future__ import annotations

import numpy as np

EXACT = 512  # inputs up to which each row's equations are solved as they stand
STEPS = 100
CLOSE = 1e-4  # of a row's first residual, where conjugate gradients stop


def refit(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray, *, exact: bool | None = None,
          steps: int = STEPS) -> np.ndarray:  # fmt: skip
    """Least tr((V - W) H (V - W)^T) over all V [N, K] that are zero outside `mask` [N, K].

    exact: the equations of each row are solved, once for all rows that share their support; otherwise, and for more
    than 512 inputs, preconditioned conjugate gradients on all rows at once, `steps` of them at the most. H must be
    positive definite.
    """
    if exact is None:
        exact = weight.shape[1] <= EXACT
    return _solved(weight, hessian, mask) if exact else _descended(weight, hessian, mask, steps)


def _solved(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
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


def _descended(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    kind = np.float32
    scale = np.sqrt(np.diag(hessian))  # Jacobi: the Hessian with a diagonal of ones
    matrix = (hessian / np.outer(scale, scale)).astype(kind)
    keep = mask.astype(kind)
    goal = (weight * scale).astype(kind)
    at = goal * keep
    residual = ((goal - at) @ matrix) * keep
    direction, power = residual, _power(residual)
    enough = CLOSE**2 * power
    for _ in range(steps):
        left = power > enough
        if not left.any():
            break
        moved = (direction @ matrix) * keep
        curve = np.sum(direction * moved, axis=1, keepdims=True)
        step = np.where(left, power / np.maximum(curve, 1e-30), 0).astype(kind)
        at = at + step * direction
        residual = residual - step * moved
        now = _power(residual)
        direction = residual + np.where(left, now / np.maximum(power, 1e-30), 0).astype(kind) * direction
        power = now
    return np.asarray(at / scale)


def _power(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nk,nk->n", rows, rows)[:, None])
