"""What strangers send into the compiler: models and calibration data, as the tests' seeds make them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tools.fuzz.target import Attempt, Target

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from fuzz_data import fuzz_data
from fuzz_models import fuzz_model


def _attempts(once: Callable[[int], str]) -> Callable[[Path], Attempt]:
    def attempt(seed: int, folder: Path) -> str:
        return once(seed)  # makes its input of the seed alone

    return lambda folder: attempt


MODELS = Target("models", "mutated ONNX files: loading, the canonical passes, saving", _attempts(fuzz_model), 60.0)
DATA = Target("data", "strange and damaged .npz, .npy and .jsonl", _attempts(fuzz_data))
