"""Scores of weights: the units of greatest score stay as they are."""

from __future__ import annotations

import numpy as np

from nmcompile import sparsity as sp


def magnitude(weight: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """|w|; knows nothing of the inputs."""
    return sp.magnitude(weight)


def wanda(weight: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """|w| * ||x|| (Sun et al. 2023, arXiv 2306.11695)."""
    return sp.wanda(weight, squares)
