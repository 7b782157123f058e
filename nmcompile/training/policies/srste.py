"""Masks of the weights as they are in each step, gradients straight through them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nmcompile.errors import PassError
from nmcompile.training import projection
from nmcompile.training.policies.base import Layer, Optimizer, Policy, Tensor, share, through
from nmcompile.training.policies.optimizer_state import rates


@dataclass(frozen=True)
class SrSteOptions:
    """decay: of masked weights; 1: a weight of usual size goes back as far in a step as Adam moves it. every: steps
    between masks. until: share of the steps after which masks are frozen."""

    decay: float = 1.0
    every: int = 1
    until: float = 0.5

    def __post_init__(self) -> None:
        share(self.until, "until")
        if self.decay < 0 or self.every < 1:
            raise PassError(f"decay={self.decay:g}, every={self.every}: give a decay from 0 and every from 1")


class SrSte(Policy[SrSteOptions]):
    """SR-STE (Zhou et al. 2021, arXiv 2102.04010), for blocks and single weights as well as n:m.

    Masks are renewed on the magnitudes of all weights, masked ones included, which keep their values; the gradient by
    the masked weight goes to all of them, and those outside of the mask decay. The paper adds decay * w to their
    gradients, which Adam divides by the size of the gradients; here they shrink by lr * decay / size behind the
    optimizer's step instead, size the root mean square of the weights kept at the start, so that 1 means the same in
    every layer and for every loss. STEP (Lu et al. 2023, arXiv 2302.01172), which holds Adam's second moment still from
    a dense phase on, is not for a student that starts as its own teacher: gradients are near zero there, and steps by
    the moments that they leave diverge.
    """

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: SrSteOptions) -> None:
        super().__init__(layers, steps, options)
        self.held["sizes"] = {name: projection.usual_size(layer.weight.detach().masked_fill(~self.masks[name], 0))
                              for name, layer in self.layers.items()}  # fmt: skip

    @property
    def until(self) -> int:
        return math.ceil(self.options.until * self.steps)

    def effective(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.frozen else through(weight, self.masks[name])

    def move(self, step: int, optimizer: Optimizer) -> None:
        rate = rates(optimizer)
        for name, layer in self.layers.items():
            lost = self.options.decay * rate.get(id(layer.weight), 0.0) / self.held["sizes"][name]
            with torch.no_grad():
                layer.weight.copy_(torch.where(self.masks[name], layer.weight, layer.weight * (1 - lost.clamp_max(1))))
        if (step + 1) % self.options.every == 0:
            self.masks.update(self.chosen(optimizer))

    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        return self.masks_of({name: layer.weight.detach().abs() for name, layer in self.layers.items()})
