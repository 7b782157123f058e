"""Plans whose container is sound but whose content lies: an error each, or a run within bounds, never a crash."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import compiled

import nmcompile
from nmcompile.errors import InputError, PlanError
from nmcompile.plan import read_plan, write_plan

FEEDS = {
    "input_ids": np.array([[5, 6, 7, 8], [9, 8, 7, 6]], np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64),
    "token_type_ids": np.zeros((2, 4), np.int64),
}
Content = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def content() -> Content:
    plan = read_plan(compiled("bert-torchscript", pattern="2x4", sparsity=0.6).plan)
    header = {key: value for key, value in plan.header.items() if key not in ("format", "members")}
    return header, {name: np.array(values) for name, values in plan.arrays.items()}


def attempt(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """"runs", or the class of the error that it is refused with."""
    write_plan(path, header, arrays, {})
    try:
        nmcompile.load(path, threads=2).run(FEEDS)
    except (PlanError, InputError) as error:
        assert "\n" not in str(error)
        return type(error).__name__
    return "runs"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every leaf of nested lists and dictionaries."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in places(item, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in places(item, (*path, index))]
    return [path]


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_the_unchanged_plan_runs(tmp_path: Path, content: Content) -> None:
    assert attempt(tmp_path / "x.plan", *content) == "runs"


def test_changed_numbers_and_names(tmp_path: Path, content: Content) -> None:
    header, arrays = content
    rng = random.Random(0)
    leaves = places(header["segments"])
    wild: list[Any] = [-1, 0, 1, 3, 2**31, 2**40, -(2**62), 1e30, "", "f32", "u8", "values", None, True, [], {}]
    seen = set()
    for _ in range(250):
        changed = copy.deepcopy(header)
        put(changed["segments"], rng.choice(leaves), rng.choice(wild))
        seen.add(attempt(tmp_path / "x.plan", changed, arrays))
    assert "PlanError" in seen


def test_steps_left_out_doubled_and_swapped(tmp_path: Path, content: Content) -> None:
    header, arrays = content
    rng = random.Random(1)
    for _ in range(80):
        changed = copy.deepcopy(header)
        steps = changed["segments"][0]["steps"]
        i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
        kind = rng.randrange(3)
        if kind == 0:
            del steps[i]
        elif kind == 1:
            steps.insert(j, steps[i])
        else:
            steps[i], steps[j] = steps[j], steps[i]
        attempt(tmp_path / "x.plan", changed, arrays)


def test_changed_arrays(tmp_path: Path, content: Content) -> None:
    header, arrays = content
    rng = np.random.default_rng(2)
    names = sorted(arrays)
    refused = 0
    for _ in range(120):
        changed = dict(arrays)
        name = names[rng.integers(len(names))]
        values = changed[name]
        kind = rng.integers(5)
        if kind == 0:  # indices and weights of any value
            values = np.frombuffer(rng.bytes(values.nbytes), values.dtype).reshape(values.shape)
        elif kind == 1:
            values = values[: len(values) // 2]
        elif kind == 2:
            values = np.concatenate([values, values])
        elif kind == 3:
            values = values.astype(np.float64 if values.dtype != np.float64 else np.int8)
        else:
            values = values.reshape(-1)
        changed[name] = np.ascontiguousarray(values)
        with np.errstate(all="ignore"):
            refused += attempt(tmp_path / "x.plan", header, changed) == "PlanError"
    assert refused > 40


@pytest.mark.parametrize("what", ["starts", "columns"])
def test_block_indices_out_of_bounds(tmp_path: Path, content: Content, what: str) -> None:
    header, arrays = content
    for name in [name for name in arrays if name.endswith(what)][:3]:
        for position in (0, -1):
            changed = dict(arrays)
            changed[name] = arrays[name].copy()
            changed[name][position] = np.iinfo(arrays[name].dtype).max
            assert attempt(tmp_path / "x.plan", header, changed) == "PlanError", name


@pytest.mark.parametrize(
    "change",
    [
        {"segments": []},
        {"segments": [{"kind": "shell", "command": "true"}]},
        {"segments": [{"kind": "native"}]},
        {"inputs": [{"name": "x"}]},
        {"outputs": [{"name": "x", "dtype": "object", "shape": []}]},
        {"target": "tensorrt"},
        {"inputs": 3},
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, content: Content, change: dict[str, Any]) -> None:
    header, arrays = content
    write_plan(tmp_path / "x.plan", {**json.loads(json.dumps(header)), **change}, arrays, {})
    with pytest.raises((PlanError, InputError)):
        nmcompile.load(tmp_path / "x.plan").run(FEEDS)
