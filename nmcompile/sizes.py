"""How large a model is, what sparsity a plan of a size needs, and whether it got there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import uses_external_data

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.errors import PassError

Model: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | gs.Graph"

TRIED = (0.5, 0.9)  # sparsities that a size is first interpolated between
MOST_TRIES = 4
MOST = 0.99  # sparsity that a size may ask for
NEAR = 0.005  # of the size asked for: the tried plan is near enough
INSIDE = 100_000_000  # bytes of a model's file that holds its weights itself
CLOSE = 0.02  # of the size asked for: nearer is met


def wanted_size(size: str, pattern: str | None) -> float:
    """The share that "0.25x" means. PassError when it is none, or the pattern leaves no choice."""
    match = re.fullmatch(r"(0?\.[0-9]+|1|1\.0*)x", size.strip())
    if match is None or not float(match[1]):
        raise PassError(f"size {size!r} is not a share of the model's file; write for example 0.25x")
    if pattern == "dense" or isinstance(sp.parse_pattern(pattern or "2x4"), sp.NM):
        raise PassError(f"pattern {pattern} always has the same size; leave --size out")
    return float(match[1])


def sparsity_for(size: str, pattern: str | None, whole: int, size_at: Callable[[float], int]) -> float:
    """The sparsity at which a plan has a size, within NEAR of it; size_at(sparsity) gives the bytes of a plan. `whole`:
    bytes of the model. Sizes are all but linear in what is left of the weights, so secants find it in few tries.
    PassError when no sparsity reaches it."""
    wanted = wanted_size(size, pattern)
    low, high = ((sparsity, size_at(sparsity) / whole) for sparsity in TRIED)
    for _ in range(MOST_TRIES):
        slope = (high[1] - low[1]) / (high[0] - low[0])
        sparsity = low[0] + (wanted - low[1]) / slope if slope < 0 else 1.0
        if sparsity >= MOST:
            raise PassError(f"size {size}: with 90 % zeros the plan still has {high[1]:.3g} of the model's size; "
                            "take a larger size")  # fmt: skip
        if sparsity <= 0:
            return 0.0
        found = size_at(sparsity) / whole
        if abs(found - wanted) <= NEAR * wanted:
            return sparsity
        low, high = sorted([min((low, high), key=lambda item: abs(item[1] - wanted)), (sparsity, found)])
    return sparsity


def size_note(size: str, plan: int, whole: int) -> list[str]:
    """What to say where a plan has not become the size that was asked for."""
    wanted, found = wanted_size(size, None), plan / whole
    if abs(found - wanted) <= CLOSE * wanted:
        return []
    if found > wanted:
        return [f"size {size} is not met: the plan has {found:.3g}x of the model's size; ask for less, or give "
                "--sparsity"]  # fmt: skip
    return [f"size {size}: the plan is smaller, {found:.3g}x of the model's size"]


def model_bytes(model: Model) -> int:
    """Size of a model's file with its external data; of its weights where it is no file."""
    if not isinstance(model, (str, os.PathLike)):
        graph = g.load(model)
        seen = {id(t.values): np.asarray(t.values).nbytes for t in graph.tensors().values()
                if isinstance(t, gs.Constant)}  # fmt: skip
        return sum(seen.values())
    path = Path(model)
    return int(path.stat().st_size) + sum(file.stat().st_size for file in external_files(path).values())


def external_files(model: object) -> dict[str, Path]:
    """The files of weights beside a model's file, each by what it is; none where it is no file or cannot be read."""
    if not isinstance(model, (str, os.PathLike)):
        return {}
    path = Path(model)
    try:
        if not path.is_file() or path.stat().st_size > INSIDE:
            return {}
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # what is wrong with it is told where it is read
        return {}
    names = sorted({str(entry.value) for tensor in graph.initializer if uses_external_data(tensor)
                    for entry in tensor.external_data if entry.key == "location"})  # fmt: skip
    return {f"the model's weights {name}": path.parent / name for name in names if (path.parent / name).is_file()}
