"""Which unit gets which share of zeros, so that all together reach a target at the least error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nmcompile.errors import NmcompileError

BUCKETS = 4000  # in which the weights to zero are counted


def allocate(errors: Sequence[Sequence[float]], saved: Sequence[Sequence[int]], target: int) -> list[int]:
    """The level of each unit: least sum of errors[u][level] with a sum of saved[u][level] of at least `target`.

    Dynamic programming over units and what they have saved together, counted in `BUCKETS` steps that are rounded
    against us, so that the target is met. NmcompileError when even the most of all does not reach it.
    """
    if target <= 0:
        return [int(np.argmin(row)) for row in errors]
    most = sum(max(row) for row in saved)
    if most < target:
        raise NmcompileError(f"at most {most} weights can be zeroed, {target} are asked for; ask for less")
    step = max(target, 1) / BUCKETS
    best = np.full(BUCKETS + 1, np.inf)  # by steps saved, more than all of them being all
    best[0] = 0.0
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    for unit_errors, unit_saved in zip(errors, saved, strict=True):
        now = np.full(BUCKETS + 1, np.inf)
        level, before = np.zeros(BUCKETS + 1, np.int64), np.zeros(BUCKETS + 1, np.int64)
        for index, (error, weights) in enumerate(zip(unit_errors, unit_saved, strict=True)):
            gain = min(int(weights / step + 1e-9), BUCKETS)
            moved, source = np.full(BUCKETS + 1, np.inf), np.arange(BUCKETS + 1) - gain
            moved[gain:] = best[: BUCKETS + 1 - gain] + error
            source[-1] = BUCKETS - gain + int(np.argmin(best[BUCKETS - gain :]))
            moved[-1] = best[source[-1]] + error
            better = moved < now
            now[better], level[better], before[better] = moved[better], index, source[better]
        best = now
        choices.append((level, before))
    if not np.isfinite(best[-1]):  # so near the most of all that rounding is in the way
        return [int(np.argmax(row)) for row in saved]
    levels, at = [], BUCKETS
    for level, before in reversed(choices):
        levels.append(int(level[at]))
        at = int(before[at])
    return levels[::-1]
