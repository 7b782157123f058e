"""Optimal brain surgeon over columns: SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), for any pattern."""

from __future__ import annotations

import numpy as np

from nmcompile import sparsity as sp
from nmcompile.solvers.solver import Solution

CHUNK = 128  # columns whose mask is chosen together, and whose updates to all others are made at once


def obs(weight: np.ndarray, hessian: np.ndarray, pattern: sp.Pattern, sparsity: float) -> Solution:
    """Prune chunk by chunk of columns; what a pruned column did is passed on to the columns after it.

    A unit's saliency is what its loss costs once all columns before it are done: |w_B U_BB^-1|^2 over its columns B,
    U the upper Cholesky factor of H^-1. H must be positive definite. Ties keep the unit of least index.
    """
    n, k = weight.shape
    left = np.array(weight, np.float64)
    upper, kept = inverse_factor(hessian), np.empty((n, k), np.bool_)
    width, rows = (pattern.cols, pattern.rows) if isinstance(pattern, sp.Block) else (1, 1)
    if isinstance(pattern, sp.NM):
        width = pattern.m
    chunk = max(CHUNK // width, 1) * width
    for begin in range(0, k, chunk):
        end = min(begin + chunk, k)
        if not isinstance(pattern, sp.NM):
            cost = _saliency(left[:, begin:end], upper[begin:end, begin:end], width)
            keep = sp.keep_mask(cost, sp.Block(rows, 1), sparsity).repeat(width, axis=1)[:, : end - begin]
        else:
            keep = np.zeros((n, end - begin), bool)
        part, lost = left[:, begin:end], np.zeros((n, end - begin))
        for i in range(end - begin):
            if isinstance(pattern, sp.NM) and i % width == 0:
                stop = min(i + width, end - begin)
                scale = np.diag(upper)[begin + i : begin + stop]
                keep[:, i:stop] = sp.keep_mask((part[:, i:stop] / scale) ** 2, pattern, 0.0)
            gone = np.where(keep[:, i], 0.0, part[:, i])
            lost[:, i] = gone / upper[begin + i, begin + i]
            part[:, i:] -= lost[:, i : i + 1] * upper[begin + i, begin + i : end]
            part[~keep[:, i], i] = 0.0
        kept[:, begin:end] = keep
        left[:, end:] -= lost @ upper[begin:end, end:]
    return Solution(left, kept)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """U upper triangular with U^T U = H^-1, float64 [K, K]."""
    inverse = np.linalg.inv(hessian)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)


def _saliency(part: np.ndarray, upper: np.ndarray, width: int) -> np.ndarray:
    """[N, units along the columns] of columns [N, C], units of `width`."""
    if width == 1:
        return np.asarray((part / np.diag(upper)) ** 2)
    found = []
    for i in range(0, part.shape[1], width):
        block = upper[i : i + width, i : i + width]
        found.append(np.sum(np.linalg.solve(block.T, part[:, i : i + width].T) ** 2, axis=0))
    return np.stack(found, axis=1)
