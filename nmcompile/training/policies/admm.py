"""Dense weights are pulled to a copy that has the pattern, until both are one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nmcompile.errors import PassError
from nmcompile.training import projection
from nmcompile.training.policies.base import Layer, Optimizer, Policy, Tensor, keep_of, share
from nmcompile.training.policies.optimizer_state import rates, second_moment

LEAST = 20  # projections, however few the steps are


@dataclass(frozen=True)
class AdmmOptions:
    """first, last: the penalty rho at the start and at the end, geometric between; 1: a weight that is as far from
    where it is pulled to as weights are large, goes as far in a step as Adam moves it. every: steps between
    projections, fewer in short trainings. until: share of the steps after which the pattern is forced and masks are
    frozen. weighting: projections weigh squares by Adam's second moment (fisher), or not (none)."""

    first: float = 1.0
    last: float = 10.0
    every: int = 32
    until: float = 0.6
    weighting: str = "fisher"

    def __post_init__(self) -> None:
        share(self.until, "until")
        if not 0 < self.first <= self.last or self.every < 1:
            raise PassError(f"first={self.first:g}, last={self.last:g}, every={self.every}: give 0 < first <= last and "
                            "every from 1")  # fmt: skip
        if self.weighting not in ("fisher", "none"):
            raise PassError(f"weighting={self.weighting} is not known; choose one of fisher, none")


class Admm(Policy[AdmmOptions]):
    """ADMM on the true loss: reconstructed from the abstracts of NxMiFormer (Holmes et al. 2022, arXiv 2206.15014)
    and ELSA (arXiv 2510.01650), which publish no code.

    min f(W) with W = Z, Z of the pattern: the optimizer trains W on f(W) + rho/2 |W - Z + U|^2; every few steps Z is
    the nearest of the pattern to W + U, distances weighted by the diagonal of the Fisher information, and U grows by
    W - Z; U shrinks as rho grows, since rho U is the multiplier. Starts with Z = W masked and U = 0, so that a start
    that has the pattern is not pulled anywhere.

    The penalty is no part of the loss, where Adam would divide its gradient by the loss's, but a step of its own behind
    Adam's: W moves by lr * rho / size of the way to Z - U, size the root mean square of the weights kept at the start.
    What this settles at is the penalty in Adam's metric. A rho then means the same in every layer and for every loss,
    also where the student starts as its own teacher and the loss has no gradient yet.
    """

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: AdmmOptions) -> None:
        super().__init__(layers, steps, options)
        self.every = max(1, min(options.every, self.until // LEAST))
        self.held |= {"copies": {}, "drifts": {}, "sizes": {}}
        for name, layer in self.layers.items():
            copy = layer.weight.detach().masked_fill(~self.masks[name], 0)
            self.held["copies"][name] = copy
            self.held["drifts"][name] = torch.zeros_like(copy)
            self.held["sizes"][name] = projection.usual_size(copy)

    @property
    def until(self) -> int:
        return math.ceil(self.options.until * self.steps)

    def move(self, step: int, optimizer: Optimizer) -> None:
        done, rate = step + 1, rates(optimizer)
        for name, layer in self.layers.items():
            weight, copy, drift = layer.weight, self.held["copies"][name], self.held["drifts"][name]
            pull = self._penalty_at(step) * rate.get(id(weight), 0.0) / self.held["sizes"][name]
            with torch.no_grad():
                weight.lerp_(copy - drift, pull.clamp_max(1))
        if done % self.every == 0:
            for name in self.layers:
                self._project(name, optimizer)
                self.held["drifts"][name].mul_(self._penalty_at(step) / self._penalty_at(done))

    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        return self.masks_of({name: self._squares(name, optimizer) for name in self.layers})

    def _project(self, name: str, optimizer: Optimizer) -> None:
        """Z from W + U, then U."""
        layer, drift = self.layers[name], self.held["drifts"][name]
        self.masks[name] = keep_of(self._squares(name, optimizer), layer.goal)
        drift.add_(layer.weight.detach())
        self.held["copies"][name] = drift.masked_fill(~self.masks[name], 0)
        drift.sub_(self.held["copies"][name])

    def _squares(self, name: str, optimizer: Optimizer | None) -> Tensor:
        weight = self.layers[name].weight
        moment = second_moment(optimizer, weight) if self.options.weighting == "fisher" else None
        return projection.squares(weight.detach() + self.held["drifts"][name], moment)

    def _penalty_at(self, done: int) -> float:
        """rho once so many steps are done; it changes with the projections."""
        part = min(done // self.every * self.every / max(self.until, 1), 1.0)
        return float(self.options.first * (self.options.last / self.options.first) ** part)
