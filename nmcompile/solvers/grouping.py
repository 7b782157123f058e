"""An order of features in which those that matter to the same outputs lie side by side, so that blocks lose less."""

from __future__ import annotations

import numpy as np

AT_ONCE = 1 << 15  # pairs that are looked at together: most are of features that are taken already


def grouped(profiles: np.ndarray, size: int) -> np.ndarray:
    """The order of F features, by `profiles` [F, D] of what each matters to every one of D outputs (not negative).

    Groups of `size`, a power of two, are made level by level: pairs of features, then of pairs, ..., the most alike
    first. Groups stand in order of weight. The same profiles always give the same order.
    """
    groups = [np.array([i]) for i in range(len(profiles))]
    sums = np.asarray(profiles, np.float64)
    while len(groups) > 1 and len(groups[0]) < size:
        pairs = _pairs(sums)
        alone = sorted(set(range(len(groups))) - {i for pair in pairs for i in pair})
        sums = np.concatenate([np.array([sums[a] + sums[b] for a, b in pairs]), sums[alone]])
        groups = [*(np.concatenate([groups[a], groups[b]]) for a, b in pairs), *(groups[i] for i in alone)]
    whole = [i for i, group in enumerate(groups) if len(group) >= min(size, len(profiles))]
    rest = [i for i in range(len(groups)) if i not in set(whole)]
    whole.sort(key=lambda i: (-float(sums[i].sum()), int(groups[i].min())))
    return np.concatenate([groups[i] for i in [*whole, *rest]])


def _pairs(profiles: np.ndarray) -> list[tuple[int, int]]:
    """Disjoint pairs, chosen greedily by how alike two profiles are (cosine)."""
    norms = np.linalg.norm(profiles, axis=1, keepdims=True)
    unit = (profiles / np.maximum(norms, 1e-300)).astype(np.float32)
    alike = unit @ unit.T
    rows, cols = np.triu_indices(len(unit), 1)
    order = np.argsort(-alike[rows, cols], kind="stable")
    free = np.ones(len(unit), bool)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(order), AT_ONCE):
        firsts, seconds = rows[order[start : start + AT_ONCE]], cols[order[start : start + AT_ONCE]]
        open_ = free[firsts] & free[seconds]
        for a, b in zip(firsts[open_].tolist(), seconds[open_].tolist(), strict=True):
            if free[a] and free[b]:
                pairs.append((a, b))
                free[a] = free[b] = False
        if 2 * len(pairs) >= len(unit) - 1:
            break
    return pairs


ROUNDS = 200  # of trying one exchange between every two groups


def spread(score: np.ndarray, kept: int, size: int, span: int, seed: int = 0) -> np.ndarray:
    """The order of the K columns of score [N, K] whose groups of `size` keep most when each row keeps the `kept` best
    of every group: features that matter to the same rows stand apart.

    Exchanges of two columns between two groups, drawn at random from `seed`, are kept where they gain (after Pool and
    Yu 2021). Columns stay within their `span` of neighbours (a head); `size` divides it.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(score.shape[1]).reshape(-1, size)
    parts = np.ascontiguousarray(score[:, order.ravel()].reshape(len(score), -1, size).swapaxes(0, 1), np.float32)
    worth = _best(parts, kept)
    per_span = span // size
    for _ in range(ROUNDS):
        mixed = np.concatenate([start + rng.permutation(per_span) for start in range(0, len(order), per_span)])
        pairs = mixed.reshape(-1, per_span)[:, : per_span // 2 * 2].reshape(-1, 2)
        if not len(pairs):
            break
        first, second = pairs.T
        i, j = rng.integers(0, size, (2, len(pairs)))
        a, b, at = parts[first].copy(), parts[second].copy(), np.arange(len(pairs))
        a[at, :, i], b[at, :, j] = b[at, :, j].copy(), a[at, :, i].copy()
        now = np.stack([_best(a, kept), _best(b, kept)])
        better = now.sum(axis=0) > worth[first] + worth[second]
        first, second, i, j = first[better], second[better], i[better], j[better]
        parts[first], parts[second] = a[better], b[better]
        worth[first], worth[second] = now[:, better]
        order[first, i], order[second, j] = order[second, j].copy(), order[first, i].copy()
    return order.ravel()


def _best(parts: np.ndarray, kept: int) -> np.ndarray:
    """[groups] sums of the `kept` largest of [groups, N, size] along the last axis."""
    cut = parts.shape[-1] - kept
    return np.asarray(np.partition(parts, cut, axis=-1)[..., cut:].sum(axis=(1, 2), dtype=np.float64))
