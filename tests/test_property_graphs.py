"""Graphs drawn at random: every form that nmcompile gives a model computes what onnxruntime computes of it.

`python -m tools.property_graphs --count 2000` does the same for thousands.
"""

from __future__ import annotations

import pytest
from graph_check import check
from random_graphs import draw

GRAPHS = 30


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_a_random_graph_is_right_at_every_length_and_mask(seed: int) -> None:
    outcome = check(draw(seed))
    assert outcome.runs, "the model takes none of the inputs"
    assert outcome.verdict in ("native", "declined"), (outcome.recipe, outcome.error, *outcome.complaints)
