"""A budget that runs from before pruning on."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from nmcompile.errors import PassError
from nmcompile.training.recipe import LEAST, Recipe

RUNG = 1 / 7  # of the budget, for each sparsity before the last


def rung(recipe: Recipe) -> Recipe:
    """What is trained at a sparsity that is not the last: masks as they are pruned, floats alone."""
    steps = math.ceil(recipe.steps * RUNG)
    return replace(recipe, budget=recipe.budget * RUNG, steps=steps, masks="fixed", options={}, qat=0.0, local=0.0)


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
        return replace(recipe, budget=min(left, recipe.budget))
