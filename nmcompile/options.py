"""What is asked of a compile, in groups; the command line, recipes and `compile` build the same `Options`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.calibrate import Data
from nmcompile.calibrate.sources import Source
from nmcompile.contract import Pass
from nmcompile.errors import PassError
from nmcompile.metrics import Limit
from nmcompile.recipes import Preset
from nmcompile.sizes import wanted_size

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class PruneOptions:
    """passes: a spec string or passes that stand in for all others, run between canonical form and quantization.
    solver: magnitude, wanda, obs or admm; None is the preset's for real samples and magnitude for made-up ones. size:
    of the plan, relative to the model's file ("0.25x"), instead of `sparsity`. checkpoints: a folder from which an
    interrupted pruning goes on. train: a budget ("60m") in which pruning is followed by training on all samples of the
    data (nmcompile.passes.Train), which takes torch."""

    passes: str | Iterable[Pass] | None = None
    sparsity: float | None = None
    pattern: str | None = None
    solver: str | None = None
    size: str | None = None
    checkpoints: Place | None = None
    train: str | None = None

    def __post_init__(self) -> None:
        """PassError for what contradicts itself."""
        if self.passes is not None and not isinstance(self.passes, str):
            object.__setattr__(self, "passes", tuple(self.passes))
        if self.passes is not None and not (self.sparsity is None and self.pattern is None and self.size is None):
            raise PassError("give either passes or sparsity, pattern and size, not both")
        if self.size is not None and self.sparsity is not None:
            raise PassError("give either a size or a sparsity, not both")
        if self.train is not None and (self.passes is not None or self.size is not None):
            raise PassError("give train with sparsity and pattern; among passes it is train(sparsity=0.8, budget=60m)")
        if self.size is not None:
            wanted_size(self.size, self.pattern)
        if self.pattern == "dense" and self.sparsity:
            raise PassError(f"pattern dense has no zeros, sparsity {self.sparsity:g} is asked for; "
                            "leave --sparsity out, or give a pattern such as 2x4")  # fmt: skip


@dataclass(frozen=True)
class QuantizeOptions:
    """attention "float": queries, keys, values and softmax stay float (the default for TensorRT), or "int8".
    reduce_range: weights of 7 bits, for what `emit_onnx` writes on CPUs without VNNI; a plan needs none."""

    attention: str | None = None
    reduce_range: bool = False


@dataclass(frozen=True)
class TargetOptions:
    """target: cpu or tensorrt. engine: how an engine is made, for tensorrt. tuning: each layer runs on the kernel that
    is fastest by times measured on this machine, kept for the next compile (None), by a table that is read from a file,
    or measured and written to it where it does not exist, or by the shipped cost model ("off"), which chooses alike on
    every machine. require "native": an error unless the whole model runs on the engine."""

    target: str = "cpu"
    engine: EngineOptions | None = None
    tuning: Place | None = None
    require: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """calibration: .npz, folder, .jsonl, iterable of feeds, or a Data; without it ranges come from made-up samples.
    tokenizer: for texts. max_length: tokens of a sample at most."""

    calibration: Source | Data | None = None
    tokenizer: str | Path | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class ControlOptions:
    """max_drop: "cosine=0.01" and the like (nmcompile.metrics): layers go back to dense and to float, worst first,
    until it holds on held-out samples. measure: run the plan against the model on held-out samples, and at lengths that
    calibration had not. verify: run the graph before and after each pass that keeps what it computes."""

    max_drop: str | Limit | None = None
    measure: bool = True
    verify: bool = False


@dataclass(frozen=True)
class OutputOptions:
    """Files beside the plan. emit_onnx: the quantized model. report: everything known, as JSON."""

    emit_onnx: Place | None = None
    report: Place | None = None


class Named(TypedDict, total=False):
    """Every option by its own name, as keywords of `compile`."""

    preset: str | Preset
    passes: str | Iterable[Pass] | None
    sparsity: float | None
    pattern: str | None
    solver: str | None
    size: str | None
    checkpoints: Place | None
    train: str | None
    attention: str | None
    reduce_range: bool
    target: str
    engine: EngineOptions | None
    tuning: Place | None
    require: str | None
    calibration: Source | Data | None
    tokenizer: str | Path | None
    max_length: int | None
    max_drop: str | Limit | None
    measure: bool
    verify: bool
    emit_onnx: Place | None
    report: Place | None


@dataclass(frozen=True)
class Options:
    """How a compile goes. preset: "default", "fast", or a Preset: how much time it may spend."""

    preset: str | Preset = "default"
    prune: PruneOptions = field(default_factory=PruneOptions)
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    target: TargetOptions = field(default_factory=TargetOptions)
    data: DataOptions = field(default_factory=DataOptions)
    control: ControlOptions = field(default_factory=ControlOptions)
    write: OutputOptions = field(default_factory=OutputOptions)

    def having(self, named: Named) -> Options:
        """These options with some of them set by name. TypeError for a name that is none."""
        left, changed = dict(named), {}
        if "preset" in left:
            changed["preset"] = left.pop("preset")
        for group in fields(self)[1:]:
            before = getattr(self, group.name)
            mine = {item.name: left.pop(item.name) for item in fields(before) if item.name in left}
            if mine:
                changed[group.name] = replace(before, **mine)
        if left:
            raise TypeError(f"compile() got an unexpected keyword argument {next(iter(left))!r}")
        return replace(self, **cast("Mapping[str, Any]", changed))
