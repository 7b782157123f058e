"""tools.accuracy classify: a classifier pruned, trained, compiled, scored on its plan and timed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from accuracy_cases import WORDS

pytest.importorskip("torch", reason="training needs the extra train")

from tools.accuracy.classify import Row, Setting, markdown, rows, to_json

MODEL = Path(__file__).parent.parent / "models" / "bert-classifier.onnx"


def test_rows_of_a_small_model(tmp_path: Path, tokenizer: Path) -> None:
    rng = random.Random(0)
    texts = [(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))), rng.choice("abc")) for _ in range(80)]
    parts = texts[:64], texts[64:]
    setting = Setting(MODEL, tokenizer, parts, ("a", "b", "c"), tmp_path, shapes=((1, 16),), timed=0.1)
    told: list[str] = []
    found = rows(setting, "2x4", 0.5, ["30s"], {"steps": 4, "tokens": 128, "labels": "label"}, told.append)
    assert [row.name for row in found] == ["float in onnxruntime", "dense INT8", "2x4, 50 %, one shot",
                                           "2x4, 50 %, trained 30s"]  # fmt: skip
    assert all(0 <= row.accuracy <= 1 for row in found) and [round(row.zeros, 1) for row in found] == [0, 0, 0.5, 0.5]
    assert all(row.speed is not None and row.speed[0][0] > 0 for row in found)
    assert told[-1] == "timing" and len(json.loads(to_json(found))) == 4


def test_points_are_those_that_the_float_model_has_more() -> None:
    found = [Row("float", 0.96, 0, 0, ((1.0, 1.0, 1.0),)), Row("sparse", 0.955, 0.8, 60, ((4.5, 4.25, 5.0),)),
             Row("2:4", 0.95, 0.5, 60, None)]  # fmt: skip
    lines = markdown(found, [(1, 128)]).splitlines()
    assert lines[3] == "| sparse | 80% | 95.50% | 0.50 | 4.50 (4.25 to 5.00) | 60 |"
    assert lines[4].startswith("| 2:4 | 50% | 95.00% | 1.00 | - |")
