"""Sparsity grows step by step; masks by magnitude, movement or momentum of sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nmcompile.errors import PassError
from nmcompile.prune.plan import Goal
from nmcompile.sparsity import NM
from nmcompile.training import projection
from nmcompile.training.policies.base import Layer, Optimizer, Policy, Tensor, keep_of, mask_gradient, share, through

CHOICES = {
    "criterion": ("magnitude", "movement", "snip-momentum"),
    "scope": ("uniform", "global"),
    "schedule": ("cubic", "exp"),
    "masked": ("auto", "zero", "held", "through"),
}


@dataclass(frozen=True)
class GradualOptions:
    """criterion: what a weight counts. scope: each layer reaches its goal by itself, or all of one goal together, no
    layer more than `cap`. schedule: cubic, or by a constant factor in what is left (exp). start: sparsity at `begin`;
    begin, end: shares of the steps, masks are frozen from `end` on; every: steps between masks. masked: weights
    outside of the mask are zero; held at the value they had; or updated straight through it; auto is held for
    movement, else zero. momentum: of snip-momentum."""

    criterion: str = "snip-momentum"
    scope: str = "uniform"
    schedule: str = "cubic"
    start: float = 0.0
    begin: float = 0.0
    end: float = 0.6
    every: int = 10
    masked: str = "auto"
    cap: float = projection.MOST
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise PassError(f"{name}={getattr(self, name)} is not known; choose one of {', '.join(choices)}")
        for name in ("start", "begin", "end", "cap", "momentum"):
            share(getattr(self, name), name)
        if self.begin > self.end or self.every < 1:
            raise PassError(f"begin={self.begin:g}, end={self.end:g}, every={self.every}: give begin up to end and "
                            "every from 1")  # fmt: skip
        if self.criterion == "movement" and self.masked == "zero":
            raise PassError("masked=zero leaves movement nothing to measure; choose one of held, through")


class Gradual(Policy[GradualOptions]):
    """Gradual pruning (Zhu and Gupta 2017, arXiv 1710.01878: the cubic schedule).

    Scores are summed over each unit: magnitude |w|; movement, the sum over all steps of -w dL/dw (Sanh et al. 2020,
    arXiv 2005.07683), for which gradients go straight through the mask; snip-momentum, s <- momentum s + |w dL/dw|
    (Intel Neural Compressor's block recipes). A layer never gets denser than it started, and units that are all zero
    are the first to go, so that masks that start at their goal move only where something is there to come back. n:m
    goes from m:m down.
    """

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: GradualOptions) -> None:
        super().__init__(layers, steps, options)
        self.masked = options.masked
        if self.masked == "auto":
            self.masked = "held" if options.criterion == "movement" else "zero"
        self._before: dict[str, Tensor] = {}
        if options.criterion != "magnitude":
            self.held["scores"] = {name: torch.zeros_like(layer.weight.detach()) for name, layer in layers.items()}
        if self.masked == "zero":
            self._clear()
        self._own = _sparsities(self.layers, options.scope == "global")

    @property
    def until(self) -> int:
        return math.ceil(self.options.end * self.steps)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.frozen or self.masked == "zero" else through(weight, self.masks[name])

    def collect(self, step: int) -> None:
        for name, layer in self.layers.items():
            gradient = layer.weight.grad
            if gradient is not None and self.options.criterion == "movement":
                self.held["scores"][name].addcmul_(layer.weight.detach(), gradient, value=-1)
            elif gradient is not None and self.options.criterion == "snip-momentum":
                scores = self.held["scores"][name]
                scores.mul_(self.options.momentum).add_((layer.weight.detach() * gradient).abs_())
            if self.masked != "through":
                mask_gradient(layer.weight, self.masks[name])
            if self.masked == "held":
                self._before[name] = layer.weight.detach().clone()

    def move(self, step: int, optimizer: Optimizer) -> None:
        done, first = step + 1, math.ceil(self.options.begin * self.steps)
        if self.masked == "zero":
            self._clear()
        for name, before in self._before.items():
            with torch.no_grad():
                weight = self.layers[name].weight
                weight.copy_(torch.where(self.masks[name], weight, before))
        self._before.clear()
        if first <= done < self.until and (done - first) % self.options.every == 0:
            for name, mask in self._masks((done - first) / (self.until - first)).items():
                if self.masked == "through":
                    self.masks[name] = mask
                else:
                    self.renew(name, mask, optimizer, zero=self.masked == "zero")

    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        return self._masks(1.0)

    def _masks(self, part: float) -> dict[str, Tensor]:
        """Masks at a part of the way to the goals."""
        goals = {name: self._goal(self._own[name], layer.goal, part) for name, layer in self.layers.items()}
        scores = {name: self._scores(name) for name in self.layers}
        if self.options.scope == "uniform":
            return {name: keep_of(scores[name], goal) for name, goal in goals.items()}
        turned = {name: item.T for name, item in scores.items()}
        masks = projection.keep_together(turned, goals, self.options.cap)
        return {name: mask.T.contiguous() for name, mask in masks.items()}

    def _goal(self, own: float, goal: Goal, part: float) -> Goal:
        if part >= 1:
            return goal
        start, end = min(max(self.options.start, own), goal.sparsity), goal.sparsity
        cubic = end + (start - end) * (1 - part) ** 3
        level = cubic if self.options.schedule == "cubic" else 1 - (1 - start) ** (1 - part) * (1 - end) ** part
        if not isinstance(goal.pattern, NM):
            return Goal(goal.pattern, min(max(level, 0.0), end))
        left = max(goal.pattern.n, math.floor(goal.pattern.m * (1 - level) + 0.5))
        return Goal(NM(left, goal.pattern.m), 1 - left / goal.pattern.m)

    def _scores(self, name: str) -> Tensor:
        """Of each weight [K, N]; least where a whole unit is zero."""
        layer = self.layers[name]
        size = layer.weight.detach().abs()
        if self.options.criterion == "magnitude":
            return size
        dead = projection.unit_sums(size.T, layer.goal.pattern) == 0
        everywhere = projection.spread(dead, layer.goal.pattern, size.T.shape).T
        return self.held["scores"][name].masked_fill(everywhere, -math.inf)


def _sparsities(layers: Mapping[str, Layer], together: bool) -> dict[str, float]:
    """The share of units that the masks leave out at the start, by layer or of all layers of one goal."""
    counts: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        kept = projection.unit_sums(layer.mask.T.float(), layer.goal.pattern) > 0
        counts[name] = (int((~kept).sum()), kept.numel())
    shares = {}
    for name, layer in layers.items():
        peers = [other for other in layers if other == name or (together and layers[other].goal == layer.goal)]
        shares[name] = sum(counts[other][0] for other in peers) / max(sum(counts[other][1] for other in peers), 1)
    return shares
