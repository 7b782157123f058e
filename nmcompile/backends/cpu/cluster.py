"""Order the outputs of a sparse layer so that neighbours read the same inputs; numpy only.

The rows of a layer whose results only one other layer reads may stand in any order, if that layer's inputs follow. So
zeros without a pattern, or of one that the kernels have no format for, fill fewer and fuller groups of R rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nmcompile.backends.cpu.pack import BLOCKS, GROUP, fills, predicted

WORTH = 0.97  # of the former time: what must be reached for another order to be taken
GAIN = 1.15  # times that perfect groups must be faster for an order to be looked for
ALIKE = 0.3  # of what a row reads its most similar one must read on average, or pairing them up saves nothing
LEVELS = 4  # doublings: groups of 2, 4, 8 and 16 rows
MOST_WORK = 1 << 31  # 64-bit words to compare, some seconds; larger layers stay as they are


def best_order(first: np.ndarray, second: np.ndarray, gather: bool = False) -> np.ndarray | None:
    """The order of the rows of `first` [N, K], inputs of `second` [M, N], for which both together cost least.

    None when no order found is worth it by the shipped model.
    """
    least, best = WORTH * (cost(first, gather) + cost(second, gather)), None
    for order in orders(first, second, gather):
        now = cost(first[order], gather) + cost(second[:, order], gather)
        if now < least:
            least, best = now, order
    return best


def orders(first: np.ndarray, second: np.ndarray, gather: bool = False) -> Iterator[np.ndarray]:
    """Orders worth trying for the rows of `first` int8 [N, K], which are the inputs of `second` int8 [M, N].

    By what the rows of the first layer read, in groups of four inputs and, for `gather`, one by one; and by which rows
    of the second read them. None where even perfect groups would save little.
    """
    if GAIN * (_bound(first) + _bound(second)) > cost(first, gather) + cost(second, gather):
        return
    sights = [(first != 0, GROUP, 1), (second.T != 0, 1, 1)]
    if gather:
        sights.append((first != 0, 1, 1))
    # groups of four move as one where the second layer has blocks that must stay whole
    sights.append((first != 0, GROUP, GROUP))
    for support, columns, unit in sights:
        if len(support) % unit:
            continue
        units = _coarse(support, unit, columns)
        if units.mean() < 0.9 and len(units) ** 2 / 2 * units.shape[1] / 64 < MOST_WORK and _alike(units) >= ALIKE:
            yield clustered(units, unit)


def clustered(support: np.ndarray, unit: int = 1) -> np.ndarray:
    """The order of N rows in which groups of 2, 4, 8, 16 share the most of their support, bool [N / unit, columns].

    Greedy, doubling the groups level by level: the fullest free group takes the one that adds least to it. Each entry
    stands for `unit` rows that stay together. The same support always gives the same order.
    """
    groups = [np.arange(i * unit, (i + 1) * unit) for i in range(len(support))]
    sets = _bits(support)
    for _ in range(LEVELS):
        if len(groups) < 2:
            break
        pairs = _pairs(sets)
        alone = sorted(set(range(len(groups))) - {i for pair in pairs for i in pair})
        sets = np.concatenate([np.array([sets[a] | sets[b] for a, b in pairs]), sets[alone]])
        groups = [*(np.concatenate([groups[a], groups[b]]) for a, b in pairs), *(groups[i] for i in alone)]
    return np.concatenate(groups)


def cost(weight: np.ndarray, gather: bool = False) -> float:
    """What the cheapest kernel for an int8 weight costs by the shipped model."""
    n, k = weight.shape
    return min(predicted(n, k, kind, density) for kind, density in fills(weight, gather).items())


def _bound(weight: np.ndarray) -> float:
    """What `cost` would be if blocks of whatever size held no zeros."""
    n, k = weight.shape
    density = np.count_nonzero(weight) / max(weight.size, 1)
    return min(predicted(n, k, kind, density) for kind in BLOCKS)


def _alike(support: np.ndarray) -> float:
    """How much of a row's support its most similar row has too, on average over some rows."""
    sets = _bits(support)
    found = []
    for index in range(0, len(sets), -(-len(sets) // 64)):
        shared = np.bitwise_count(sets & sets[index]).sum(axis=1, dtype=np.int64)
        size = int(shared[index])
        shared[index] = 0
        found.append(int(shared.max()) / max(size, 1))
    return sum(found) / max(len(found), 1)


def _pairs(sets: np.ndarray) -> list[tuple[int, int]]:
    """Rows of bits paired greedily: the fullest first, with the one that adds least, then shares most."""
    sizes = np.bitwise_count(sets).sum(axis=1, dtype=np.int32)
    free = np.argsort(-sizes, kind="stable")
    words, sizes = np.ascontiguousarray(sets[free].T), sizes[free]  # words first: sums over them are along long rows
    most, taken = np.int64(sets.shape[1] * 64 + 1), np.iinfo(np.int64).max
    pairs = []
    first, left = 0, np.ones(len(free), bool)
    for _ in range(len(free) // 2):
        while not left[first]:
            first += 1
        shared = np.bitwise_count(words[:, first:] & words[:, first : first + 1]).sum(axis=0, dtype=np.int32)
        rank = (sizes[first:] - shared) * most - shared
        rank[0] = taken
        rank[~left[first:]] = taken
        best = first + int(np.argmin(rank))
        pairs.append((int(free[first]), int(free[best])))
        left[[first, best]] = False
        if left[first:].sum() * 4 < 3 * (len(left) - first):  # a quarter of what is looked at is gone
            keep = np.flatnonzero(left)
            free, sizes, words = free[keep], sizes[keep], np.ascontiguousarray(words[:, keep])
            first, left = 0, np.ones(len(free), bool)
    return pairs


def _bits(support: np.ndarray) -> np.ndarray:
    """bool [rows, columns] -> uint64 [rows, columns / 64]."""
    packed = np.packbits(support, axis=1)
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))).view(np.uint64)


def _coarse(support: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Whether anything is filled in units of rows x columns; rows divide N."""
    n, k = support.shape
    padded = np.pad(support, ((0, 0), (0, -k % columns)))
    return np.asarray(padded.reshape(n // rows, rows, -1, columns).any(axis=(1, 3)))
