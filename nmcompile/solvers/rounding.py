"""Int8 levels for the kept weights that lose less than rounding each by itself."""

from __future__ import annotations

import numpy as np

from nmcompile.quantize import quantize_weight

SWEEPS = 3


def rounded(weight: np.ndarray, hessian: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """weight [N, K] on the levels of its rows' symmetric int8 scales, zero outside `mask`: coordinate descent.

    From plain rounding on, each column in turn moves to the level that is best while the others stay, so the error
    tr((V - W) H (V - W)^T) never grows (QuantEase, Behdin et al. 2023, arXiv 2309.01885). The largest weight of a row
    stays where it is, so that quantize_weight finds the same scales again.
    """
    levels, scale = quantize_weight(weight)
    scales = scale.astype(np.float64)
    left = levels * scales[:, None] * mask
    fixed = np.abs(weight).argmax(axis=1)
    slope = (left - weight) @ hessian
    for _ in range(SWEEPS):
        moved = 0
        for k in range(weight.shape[1]):
            best = np.clip(np.rint((left[:, k] - slope[:, k] / hessian[k, k]) / scales), -127, 127) * scales
            step = np.where(mask[:, k] & (fixed != k), best - left[:, k], 0.0)
            rows = np.flatnonzero(step)
            if rows.size:
                slope[rows] += step[rows, None] * hessian[k]
                left[rows, k] += step[rows]
                moved += rows.size
        if not moved:
            break
    return np.asarray(left)
