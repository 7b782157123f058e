"""Plans of one or two steps, written by hand, as a stranger may write them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nmcompile
from nmcompile.errors import PlanError
from nmcompile.plan import write_plan

FEATURES = {"name": "x", "dtype": "float32", "shape": ["batch", "sequence", 4]}
SLOWER = 10 if "ASAN_OPTIONS" in os.environ else 1  # how much longer what is timed may take: sanitizers slow it
IDS = {"name": "x", "dtype": "int64", "shape": ["batch", "sequence"]}
ENTER, LEAVE = {"step": "enter", "y": 0, "slot": 0}, {"step": "leave", "x": 0, "slot": 0}


def native(buffers: list[Any], steps: list[Any]) -> dict[str, Any]:
    return {"kind": "native", "inputs": ["x"], "outputs": ["y"], "mask": None, "views": {}, "buffers": buffers,
            "steps": steps}  # fmt: skip


def header(*segments: dict[str, Any], takes: dict[str, Any] = FEATURES, **more: Any) -> dict[str, Any]:
    return {"target": "cpu", "inputs": [takes], "outputs": [{**FEATURES, "name": "y"}], "segments": [*segments], **more}


def many_buffers(count: int, rows: int, first: dict[str, Any] = ENTER) -> dict[str, Any]:
    """A segment whose buffers all live at once."""
    steps = [first, *({"step": "unary", "x": i, "y": i + 1, "op": "relu"} for i in range(count)), {**LEAVE, "x": count}]
    steps += [{"step": "binary", "a": i, "b": i, "y": i, "op": "add"} for i in range(count)]
    return native([[rows, "f32", "tokens"]] * (count + 1), steps)


def refused(
    path: Path, content: dict[str, Any], said: str, arrays: dict[str, np.ndarray] | None = None, **options: Any
) -> None:
    """The plan is refused at load, in one line and within two seconds of the processor."""
    write_plan(path, content, arrays or {}, {})
    begin = time.process_time()
    with pytest.raises(PlanError, match=said) as caught:
        nmcompile.load(path, **options)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 2 * SLOWER
