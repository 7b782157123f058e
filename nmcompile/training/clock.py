"""A budget that runs from before pruning on."""

from __future__ import annotations

import time
from dataclasses import replace

from nmcompile.errors import PassError
from nmcompile.training.recipe import LEAST, Recipe


class Clock:
    """clock = Clock(recipe); prune(...); train(..., clock.left(recipe))"""

    def __init__(self, recipe: Recipe) -> None:
        self._budget, self._start = recipe.budget, time.monotonic()

    def left(self, recipe: Recipe) -> Recipe:
        """The recipe with what is left of the budget; PassError where pruning has used it up. A number of steps that
        was asked for is not cut."""
        left = self._budget - (time.monotonic() - self._start)
        if left < LEAST:
            raise PassError(f"pruning took {self._budget - left:.0f} s of a budget of {self._budget:g} s; give more, "
                            "or a quicker solver such as obs")  # fmt: skip
        return replace(recipe, budget=left)
