"""What the compiler makes of every committed model, pinned: graph texts by stage, densities, errors, plan hash.

A change that alters any of it commits the new baseline (pytest tests/test_baselines.py --update-golden), and that diff
is the review.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled import MODELS, NAMES

from nmcompile import regression

BASELINES = Path(__file__).parent / "baselines"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changed(name: str, request: pytest.FixtureRequest) -> None:
    options = {"preset": "fast", "sparsity": 0.5, "pattern": "2x4"}
    model = MODELS / f"{name}.onnx"
    if request.config.getoption("--update-golden"):
        regression.record(model, BASELINES, **options)
    differences = regression.compare(model, BASELINES, **options)
    assert not differences, "\n".join(differences)
