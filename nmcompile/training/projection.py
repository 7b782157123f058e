"""Patterns of zeros on torch tensors [N outputs, K inputs]: what nmcompile.sparsity does with arrays, on any device.

Masks are those of sparsity.keep_mask bit for bit: sums of blocks are in double precision and in numpy's order, equal
scores keep the unit of least index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from nmcompile.prune.plan import Goal
from nmcompile.sparsity import NM, WIDEST_SUM, Block, Pattern, PatternError

Tensor = torch.Tensor
MOST = 0.98  # of a layer that may go where layers are ranked together (Intel Neural Compressor's limit per layer)
UNROLLED, PAIRWISE = 8, 128  # numpy adds up to so many numbers one by one; into eight sums; more of them in halves


def keep(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Which weights stay, bool [N, K], of scores [N, K]: as sparsity.keep_mask."""
    if not 0 <= sparsity <= 1:
        raise PatternError(f"sparsity {sparsity:g} is not between 0 and 1; 0.8 means that 80 % are zeros")
    units = unit_sums(scores, pattern)
    if isinstance(pattern, NM):
        return _keep_nm(units, pattern)
    kept = _largest(units.flatten(), units.numel() - _pruned(units.numel(), sparsity))
    return spread(kept.reshape(units.shape), pattern, scores.shape)


def unit_sums(scores: Tensor, pattern: Pattern) -> Tensor:
    """One score for each unit that goes as a whole: float64 [ceil(N / rows), ceil(K / cols)] for blocks, else the
    scores themselves; as sparsity.unit_scores."""
    if scores.ndim != 2:
        raise PatternError(f"a score of shape {list(scores.shape)} is not [outputs, inputs]")
    if bool(torch.isnan(scores).any()):
        raise PatternError("the score holds NaN; training diverged, take a lower learning rate")
    if not isinstance(pattern, Block):
        return scores
    in_turn = scores.shape[0] % pattern.rows == 0 and pattern.rows <= WIDEST_SUM  # so does sparsity for speed
    tall = _summed(scores.double(), pattern.rows, _in_turn if in_turn else _added)
    return _summed(tall.T, pattern.cols, _added).T


def spread(units: Tensor, pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """A value per unit as a value per weight [N, K]."""
    if not isinstance(pattern, Block):
        return units
    tall, wide = units.shape
    whole = units[:, None, :, None].expand(tall, pattern.rows, wide, pattern.cols)
    return whole.reshape(tall * pattern.rows, wide * pattern.cols)[: shape[0], : shape[1]]


def keep_together(scores: Mapping[str, Tensor], goals: Mapping[str, Goal], most: float = MOST) -> dict[str, Tensor]:
    """Masks by layer [N, K]: of all layers of one goal together, round(sparsity * units) units go, the least first.

    No layer loses more than the share `most` of its units (or the goal's sparsity, where that is more). n:m is each
    layer's own.
    """
    masks: dict[str, Tensor] = {}
    for goal in dict.fromkeys(goals[name] for name in scores):
        names = [name for name in scores if goals[name] == goal]
        if isinstance(goal.pattern, NM):
            masks |= {name: keep(scores[name], goal.pattern, goal.sparsity) for name in names}
            continue
        units = [unit_sums(scores[name], goal.pattern) for name in names]
        kept = _ranked_together([item.flatten() for item in units], goal.sparsity, max(most, goal.sparsity))
        for name, item, part in zip(names, units, kept, strict=True):
            masks[name] = spread(part.reshape(item.shape), goal.pattern, scores[name].shape)
    return {name: masks[name] for name in scores}


def project(weight: Tensor, pattern: Pattern, sparsity: float, weighting: Tensor | None = None) -> Tensor:
    """The nearest weight [N, K] of the pattern: units of least square (each weight's times `weighting`) are zero."""
    return weight.masked_fill(~keep(squares(weight, weighting), pattern, sparsity), 0)


def squares(weight: Tensor, weighting: Tensor | None = None) -> Tensor:
    """weight^2 * weighting, in float64: second moments of gradients are too small for less."""
    wide = weight.detach().double().square()
    return wide if weighting is None else wide * weighting.double()


def usual_size(weight: Tensor) -> Tensor:
    """Root of the mean square of the weights that are not zero, 0-d, of the weight's type; tiny where all are zero."""
    wide = squares(weight)
    size = (wide.sum() / (wide > 0).sum().clamp_min(1)).sqrt().to(weight.dtype)
    return size.clamp_min(torch.finfo(weight.dtype).tiny)


def _pruned(units: int, sparsity: float) -> int:
    return math.floor(sparsity * units + 0.5)


def _ranked_together(units: Sequence[Tensor], sparsity: float, most: float) -> list[Tensor]:
    """Which units of each stay; those above a layer's limit whatever the others are."""
    sizes = [item.numel() for item in units]
    safe = torch.cat([_largest(item, size - math.ceil(most * size)) for item, size in zip(units, sizes, strict=True)])
    wanted = sum(sizes) - _pruned(sum(sizes), sparsity) - int(safe.sum())
    kept = safe.clone()
    kept[~safe] = _largest(torch.cat(list(units))[~safe], wanted)
    return list(torch.split(kept, sizes))


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores [U], bool; equal ones by index."""
    size = scores.numel()
    if count <= 0 or count >= size:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if scores.device.type == "cpu":
        bar = scores.kthvalue(size - count + 1).values
    else:  # kthvalue is refused there where algorithms are to be deterministic
        bar = scores.sort().values[size - count]
    kept = scores > bar
    level = (scores == bar).nonzero().flatten()
    kept[level[: count - int(kept.sum())]] = True
    return kept


def _keep_nm(scores: Tensor, pattern: NM) -> Tensor:
    rows, cols = scores.shape
    ragged = -cols % pattern.m
    groups = torch.nn.functional.pad(scores, (0, ragged), value=-math.inf).reshape(rows, -1, pattern.m)
    if pattern.m > WIDEST_SUM:
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : pattern.n], True)
    else:
        kept = _ranks(groups) < pattern.n
    return kept.reshape(rows, -1)[:, :cols]


def _ranks(groups: Tensor) -> Tensor:
    """How many of its group stand before each [N, G, m], equal ones by index; many times faster than sorting few."""
    columns = groups.unbind(-1)
    ranks = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in columns]
    for i, first in enumerate(columns):
        for j in range(i + 1, len(columns)):
            later = columns[j] > first
            ranks[i] += later
            ranks[j] += ~later
    return torch.stack(ranks, -1)


def _summed(scores: Tensor, size: int, add: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Sums of `size` neighbouring rows, the last of what is left."""
    whole = len(scores) // size * size
    sums = add([scores[i:whole:size] for i in range(size)])
    if whole == len(scores):
        return sums
    return torch.cat([sums, add([scores[i : i + 1] for i in range(whole, len(scores))])])


def _added(parts: Sequence[Tensor]) -> Tensor:
    """The sum as numpy.add.reduceat has it: the first and the sum of the others."""
    return parts[0] + _pairwise(parts[1:]) if len(parts) > 1 else parts[0]


def _pairwise(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) < UNROLLED:
        return _in_turn(parts)
    if len(parts) > PAIRWISE:
        half = len(parts) // 2 // UNROLLED * UNROLLED
        return _pairwise(parts[:half]) + _pairwise(parts[half:])
    whole = len(parts) // UNROLLED * UNROLLED
    sums = [_in_turn(parts[i:whole:UNROLLED]) for i in range(UNROLLED)]
    while len(sums) > 1:
        sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
    return _in_turn([sums[0], *parts[whole:]])


def _in_turn(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
