"""Masks that never move: training of the weights that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nmcompile.training.policies.base import Layer, Optimizer, Policy, Tensor


@dataclass(frozen=True)
class FixedOptions:
    """None."""


class Fixed(Policy[FixedOptions]):
    """The masks that are given, whatever the goals are."""

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: FixedOptions) -> None:
        super().__init__(layers, steps, options)
        self._freeze(None)

    @property
    def until(self) -> int:
        return 0

    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        return dict(self.masks)
