"""Masks from scores, the values left as they are."""

from __future__ import annotations

import numpy as np

from nmcompile import sparsity as sp


def magnitude(weight: np.ndarray, hessian: np.ndarray | None, pattern: sp.Pattern, sparsity: float) -> np.ndarray:
    """Keeps the units of largest |w|; needs no Hessian."""
    return np.asarray(weight * sp.keep_mask(sp.magnitude(weight), pattern, sparsity))


def wanda(weight: np.ndarray, hessian: np.ndarray, pattern: sp.Pattern, sparsity: float) -> np.ndarray:
    """Keeps the units of largest |w| * ||x|| (Sun et al. 2023, arXiv 2306.11695)."""
    return np.asarray(weight * sp.keep_mask(sp.wanda(weight, np.diag(hessian)), pattern, sparsity))
