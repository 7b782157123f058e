"""Groups are pulled to zero, the weak ones harder; then masks by percentile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nmcompile.errors import PassError
from nmcompile.sparsity import Block, Pattern
from nmcompile.training import projection
from nmcompile.training.policies.base import Layer, Optimizer, Policy, Tensor, share
from nmcompile.training.policies.optimizer_state import rates

REFRESHED = 4  # times that the weights of the groups are set, at even distances while masks may move


@dataclass(frozen=True)
class LassoOptions:
    """strength: of the pull on a group of usual size, 1: as far in a step as Adam moves it. floor: under which share
    of the usual square a smaller group is pulled no harder. until: share of the steps after which masks are
    frozen."""

    strength: float = 0.7
    floor: float = 1.0
    until: float = 0.5

    def __post_init__(self) -> None:
        share(self.until, "until")
        if self.strength < 0 or self.floor <= 0:
            raise PassError(f"strength={self.strength:g}, floor={self.floor:g}: give strength from 0, floor above 0")


class Lasso(Policy[LassoOptions]):
    """Reweighted group lasso (Li et al. 2020, arXiv 2009.08065; Candès et al. 2008, arXiv 0711.1612).

    The penalty sum_g p_g |W_g|, p_g = 1 / (|W_g|^2 + eps), is taken as a proximal step of its own behind the
    optimizer's, as Adam would scale its gradient away: each group gets shorter by lr * strength * sqrt(size) * p_g,
    at most to zero. Squares are in units of the layer's mean square of a group, so that strength and floor mean the
    same in every layer. A group of n:m or single weights is one weight.
    """

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: LassoOptions) -> None:
        super().__init__(layers, steps, options)
        self.held["pulls"] = {}

    @property
    def until(self) -> int:
        return math.ceil(self.options.until * self.steps)

    def move(self, step: int, optimizer: Optimizer) -> None:
        rate, pulls = rates(optimizer), self.held["pulls"]
        fresh = step in {self.until * index // REFRESHED for index in range(REFRESHED)}
        for name, layer in self.layers.items():
            pattern, weight = layer.goal.pattern, layer.weight
            squares = projection.unit_sums(weight.detach().T.square(), pattern)
            if fresh or name not in pulls:
                pulls[name] = self._pulls(squares)
            short = rate.get(id(weight), 0.0) * self.options.strength * math.sqrt(_size(pattern))
            left = (1 - short * pulls[name] / squares.sqrt()).clamp_min(0)
            left = torch.where(squares > 0, left, torch.zeros_like(left))
            with torch.no_grad():
                weight.mul_(projection.spread(left, pattern, weight.T.shape).T)

    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        return self.masks_of({name: layer.weight.detach().square() for name, layer in self.layers.items()})

    def _pulls(self, squares: Tensor) -> Tensor:
        """p_g of each group, from squared lengths."""
        usual = squares.sum() / (squares > 0).sum().clamp_min(1)
        return 1 / (squares / usual.clamp_min(torch.finfo(squares.dtype).tiny) + self.options.floor)


def _size(pattern: Pattern) -> int:
    return pattern.rows * pattern.cols if isinstance(pattern, Block) else 1
