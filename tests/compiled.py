"""Committed models, compiled once per test run, and inputs of awkward shapes for them."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import nmcompile
from nmcompile import ir as g
from nmcompile.compiler import Result
from nmcompile.fallback import Held

MODELS = Path(__file__).resolve().parent.parent / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.onnx"))
# Architectures that the engine runs whole.
NATIVE = [name for name in NAMES if name.split("-")[0] in ("bert", "distilbert", "electra", "gpt2", "roberta", "vit")]
# One of each family, small: what the job for emulated CPUs compiles.
FAMILIES = (
    "bert-torchscript", "cnn", "control-flow", "distilbert-torchscript", "electra-torchscript", "gpt2-torchscript",
    "lstm", "roberta-torchscript", "t5-torchscript", "vit-torchscript",
)  # fmt: skip
SHAPES = ((1, 1), (1, 16), (2, 17), (3, 33), (5, 7), (8, 24))  # batch x tokens


@dataclass(frozen=True)
class Compiled:
    source: Path
    plan: Path
    qdq: Path
    result: Result


@cache
def compiled(name: str, **options: object) -> Compiled:
    """The plan and the Q/DQ graph of models/NAME.onnx, calibrated on made-up samples."""
    folder = Path(mkdtemp(prefix="nmcompile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = MODELS / f"{name}.onnx"
    plan, qdq = folder / f"{name}.plan", folder / f"{name}.qdq.onnx"
    result = nmcompile.compile(source, plan, preset="fast", emit_onnx=qdq, measure=False, **options)  # type: ignore[arg-type]
    return Compiled(source, plan, qdq, result)


def feeds(path: Path, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[dict[str, np.ndarray]]:
    """Seeded ragged batches for a model."""
    infos = g.inputs(g.load(path))
    for seed, (batch, tokens) in enumerate(shapes):
        dims = {dim: tokens for info in infos for dim in info.shape[1:] if isinstance(dim, str)}
        dims |= {info.shape[0]: batch for info in infos if info.shape and isinstance(info.shape[0], str)}
        yield g.random_feeds(infos, seed=seed, dims=dims)


def held_of(result: Result) -> Held:
    """How a compile with a limit held it."""
    assert result.held is not None
    return result.held
