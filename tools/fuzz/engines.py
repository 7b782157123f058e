"""Descriptions of TensorRT engines, changed. The engine itself is code, which TensorRT runs, and is not read here."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import nmcompile
from nmcompile.errors import NmcompileError
from nmcompile.session import is_plan
from tools.fuzz import plans
from tools.fuzz.target import Attempt, Target, refused

SIZES = {"min": [1, 8], "opt": [8, 128], "max": [32, 384]}
DESCRIPTION: dict[str, Any] = {
    "format": 1, "target": "tensorrt", "nmcompile": "0.1.0", "source": "model.onnx", "profile": "10",
    "shapes": {"ids": SIZES},
    "inputs": [{"name": "ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "sequence", 4]}],
    "tensorrt": "10.16.1", "gpu": {"name": "NVIDIA L4", "sm": [8, 9]}, "kept": "sparse",
    "variants": {"sparse": {"loss": {}}},
    "layers": [{"name": "a", "outputs": 4, "inputs": 4, "verdict": "sparse", "why": ""}], "timed": {}, "warnings": [],
}  # fmt: skip


def attempt(seed: int, now: Path) -> str:
    rng = random.Random(seed)
    header: Any = copy.deepcopy(DESCRIPTION)
    places = plans.places(header)
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(places)
        try:
            holder = plans.value_at(header, path[:-1])
            if rng.random() < 0.2:
                del holder[path[-1]]
            else:
                holder[path[-1]] = copy.deepcopy(rng.choice(plans.WILD))
        except (KeyError, IndexError, TypeError):
            continue
    text = json.dumps(header).encode()
    engine = now / "x.plan"
    engine.write_bytes(b"ftrt")
    (now / "x.plan.json").write_bytes(plans.changed_bytes(rng, text) if rng.random() < 0.2 else text)
    try:
        is_plan(engine)
        nmcompile.load(engine)
    except NmcompileError as error:
        return refused(error)
    return "runs"


def prepare(folder: Path) -> Attempt:
    return attempt


TARGET = Target("engines", "descriptions of TensorRT engines", prepare)
