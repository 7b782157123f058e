"""The recipe of an engine: everything that builds it where TensorRT and a GPU are, as JSON beside its ONNX files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmcompile.backends.tensorrt.profiles import PROFILES
from nmcompile.backends.tensorrt.shapes import Ranges
from nmcompile.errors import UnsupportedError
from nmcompile.files import write

FORMAT = 1


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is made.

    version: of TensorRT ("8.6", "10" or "11"), None: that of `python`, else 10. shapes: "MIN,OPT,MAX" or
    "NAME=MIN,OPT,MAX" for inputs with free sizes. outputs: which layers hand on eight bits (sparse, all, none).
    weights: stored as float or int8. python: the interpreter that has tensorrt, None: this one. workspace: bytes,
    level: 0 to 5, None leaves them to TensorRT. timing_cache: a file that is read and written, None: one in the user's
    cache folder. build: whether to build here.
    """

    version: str | None = None
    shapes: tuple[str, ...] = ()
    outputs: str = "sparse"
    weights: str = "float"
    python: str | None = None
    workspace: int | None = None
    level: int | None = None
    timing_cache: Path | None = None
    build: bool = True

    def __post_init__(self) -> None:
        choices = {"version": (self.version, (None, *PROFILES)), "outputs": (self.outputs, ("sparse", "all", "none")),
                   "weights": (self.weights, ("float", "int8")), "level": (self.level, (None, *range(6)))}  # fmt: skip
        for name, (value, known) in choices.items():
            if value not in known:
                words = ", ".join(str(item) for item in known if item is not None)
                raise UnsupportedError(f"engine option {name}={value} is not known; choose one of {words}")
        if self.workspace is not None and self.workspace < 1:
            raise UnsupportedError(f"engine option workspace={self.workspace} is not a number of bytes")


@dataclass(frozen=True)
class Recipe:
    """What is written as JSON. models: variant (sparse, dense, mixed) -> ONNX file beside the recipe. facts: what the
    engine's description repeats (inputs, outputs, layers, passes, loss)."""

    path: Path
    plan: Path
    version: str
    strong: bool
    models: Mapping[str, str]
    shapes: Ranges
    options: EngineOptions
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, nmcompile: str) -> None:
        """The file; NmcompileError when it cannot be written."""
        keys = ("min", "opt", "max")
        shapes = {name: dict(zip(keys, map(list, three), strict=True)) for name, three in self.shapes.items()}
        options, cache = self.options, self.options.timing_cache
        content = {
            "format": FORMAT, "nmcompile": nmcompile, "version": self.version, "strong": self.strong,
            "models": dict(self.models), "plan": self.plan.name, "shapes": shapes or None,
            "workspace": options.workspace, "level": options.level,
            "timing_cache": None if cache is None else str(cache.absolute()),
            "source": self.source, "facts": dict(self.facts),
        }  # fmt: skip
        write(self.path, json.dumps(content, indent=1) + "\n")


def names_beside(plan: Path, variants: Sequence[str]) -> dict[str, Path]:
    """Where the ONNX files of the variants go: model.sparse.onnx beside model.plan."""
    return {variant: plan.with_name(f"{plan.stem}.{variant}.onnx") for variant in variants}


def recipe_path(plan: Path) -> Path:
    """Where the recipe of a plan goes."""
    return plan.with_name(f"{plan.stem}.recipe.json")
