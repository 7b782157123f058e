"""Recipes for the TensorRT worker and runs of it in this process, with fakes of TensorRT and the CUDA driver."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Script, load

from nmcompile.backends.tensorrt import worker

SHAPES = {"x": {"min": [1, 4], "opt": [8, 4], "max": [32, 4]}}


def write_recipe(folder: Path, variants: str = "sparse dense", **changes: Any) -> Path:
    """A recipe with its models; a change to ... drops the key."""
    for name in variants.split():
        (folder / f"m.{name}.onnx").write_bytes(b"onnx")
    recipe = {
        "format": 1, "nmcompile": "0.1.0", "version": "10", "strong": True, "plan": "m.plan",
        "models": {name: f"m.{name}.onnx" for name in variants.split()}, "shapes": SHAPES, "inputs": None,
        "workspace": None, "level": None, "timing_cache": None, "repeats": 5, "source": "0123",
    }  # fmt: skip
    recipe.update(changes)
    path = folder / "m.recipe.json"
    path.write_text(json.dumps({key: value for key, value in recipe.items() if value is not ...}))
    return path


class Work:
    """A run of the worker in this process: its lines, its status and the fake that it used."""

    def __init__(self, recipe: Path, script: Script, driver: str, patch: pytest.MonkeyPatch, *options: str) -> None:
        script.cuda = driver
        self.fake, self.lines = load(script), list[dict[str, Any]]()
        patch.setitem(sys.modules, "tensorrt", self.fake)
        self.status = worker.main([str(recipe), "--cuda", driver, *options], self.lines.append, worker.Files())

    @property
    def result(self) -> dict[str, Any]:
        assert "result" in self.lines[-1], self.lines[-1]
        assert self.status == 0
        found: dict[str, Any] = self.lines[-1]["result"]
        return found

    def error(self, kind: str) -> str:
        assert self.lines[-1].get("kind") == kind, self.lines[-1]
        assert self.status == (3 if kind in ("no-gpu", "no-tensorrt") else 1)
        text: str = self.lines[-1]["error"]
        assert "\n" not in text
        return text

    def calls(self, *names: str) -> list[Any]:
        return [arguments for _, name, arguments in self.fake._calls if name in names]


def left(folder: Path) -> list[str]:
    """Files that are neither the recipe nor a model."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".json"))
