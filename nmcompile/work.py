"""One compile before its stages: the model and its data read, what was asked checked, the target chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile.accuracy import Reference, limit_for
from nmcompile.backends.cpu.tuning import Tuner, open_tuner
from nmcompile.backends.tensorrt.engine import choose_profile, lacking
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.backends.tensorrt.shapes import Ranges, parse_shapes
from nmcompile.calibrate import Calibration, Data, check_ids, longest, open_data
from nmcompile.contract import Pass, Progress
from nmcompile.errors import CalibrationError
from nmcompile.holdout import Holdout, hold_out
from nmcompile.metrics import Limit
from nmcompile.options import DataOptions, Options, Place
from nmcompile.pipeline import Observer
from nmcompile.qdq.scheme import Scheme
from nmcompile.recipes import PRESETS, Preset
from nmcompile.request import MAX_LENGTH, check_files, check_options, passes_for, without_effect
from nmcompile.sizes import Model, model_bytes, sparsity_for
from nmcompile.stages import Canonical, PrunePasses, Runner, prune, quantize
from nmcompile.targets import CpuTarget, Target, TensorrtTarget
from nmcompile.tensorinfo import TensorInfo

NO_DATA = ("no calibration data: activation ranges come from made-up inputs and are not to be trusted; "
           "give samples of the model's real inputs with --calibration")  # fmt: skip
ALL = 1 << 40  # samples
TRIED = 8  # samples that plans are tried on whose size alone matters


@dataclass(frozen=True)
class Work:
    """What a compile starts from.

    source: the model's graph; reference: its outputs. parts: which samples serve for what. without: what this machine
    lacks to build an engine; shapes: of an engine's inputs. limit: on the loss. output: the plan's path.
    """

    model: Model
    source: gs.Graph
    reference: Reference
    output: Path | None
    options: Options
    preset: Preset
    target: Target
    tuning: Place | None
    data: Data
    parts: Holdout
    limit: Limit | None
    runner: Runner
    without: str
    shapes: Ranges

    @property
    def engine(self) -> EngineOptions:
        return self.options.target.engine or EngineOptions()

    @property
    def tuner(self) -> Tuner | None:
        return self.target.tuner if isinstance(self.target, CpuTarget) else None

    @property
    def scheme(self) -> Scheme:
        """What is rounded and how."""
        return self.target.scheme(self.preset, self.options.quantize.attention)

    def passes(self, canonical: Canonical) -> list[Pass]:
        """The passes between canonical form and quantization."""
        asked = self.options.prune
        sparsity = asked.sparsity if asked.size is None else self._sparsity(canonical, asked.size)
        return passes_for(asked, self.preset, sparsity, self.target, self.data.synthetic)

    def _sparsity(self, canonical: Canonical, size: str) -> float:
        """What a plan of a size needs, by plans of the same zeros that are as large and lose more."""
        asked, preset = self.options.prune, PRESETS["fast"]
        few = replace(self.parts.seen, rows=self.parts.seen.rows[:TRIED])
        runner = Runner(Calibration(few), progress=self.runner.progress)
        target = CpuTarget()

        def size_at(sparsity: float) -> int:
            magnitude = replace(asked, solver="magnitude")
            plan = PrunePasses.of(passes_for(magnitude, preset, sparsity, target, True))
            pruned = prune(canonical, plan, runner)
            return target.lower(quantize(pruned, target.scheme(preset), runner), runner).plan.size

        return sparsity_for(size, asked.pattern, model_bytes(self.model), size_at)

    def notes(self, passes: list[Pass]) -> list[str]:
        """What to say before anything has run."""
        return [NO_DATA] * self.data.synthetic + without_effect(self.options, passes, self.data)


def prepared(
    model: Model, output: Place | None, options: Options, tuning: Place | None, progress: Progress,
    observers: Iterable[Observer],
) -> Work:  # fmt: skip
    """Read and check everything that can be before the long part; NmcompileError for what cannot be done."""
    preset = check_options(options)
    check_files(options, model, output, tuning)
    target = _target(options, tuning)
    engine = options.target.engine or EngineOptions()
    writes = isinstance(target, TensorrtTarget) and output is not None
    without = lacking(engine, target.profile) if isinstance(target, TensorrtTarget) and output is not None else ""
    progress("reading the model", 0, 1)
    source = g.admit(model)
    infos = input_roles.inputs(source)
    shapes = parse_shapes(engine.shapes, g.inputs(source)) if writes else {}
    training = read_data(source, infos, options.data, target, preset if options.prune.train is None else
                         replace(preset, limit=ALL))  # fmt: skip
    data = training if training.synthetic else replace(training, rows=training.rows[: preset.limit])
    source = source if data.synthetic else g.separate_dims(source, data)
    check_ids(data)
    parts = hold_out(data, limited=options.control.max_drop is not None)
    reference = Reference(source)
    limit = limit_for(options.control.max_drop, reference, parts.chosen, isinstance(target, TensorrtTarget) or
                      output is not None)  # fmt: skip
    if options.prune.size is None:  # what is wrong with the passes is told now
        passes_for(options.prune, preset, options.prune.sparsity, target, data.synthetic)
    checkpoints = None if options.prune.checkpoints is None else Path(options.prune.checkpoints)
    more = replace(data, rows=(*parts.seen.rows, *training.rows[len(data.rows) :]))
    calibration = Calibration(parts.seen, progress, checkpoints, more)
    runner = Runner(calibration, options.control.verify, tuple(observers), progress)
    return Work(model, source, reference, None if output is None else Path(output), options, preset, target, tuning,
                data, parts, limit, runner, without, shapes)  # fmt: skip


def _target(options: Options, tuning: Place | None) -> Target:
    if options.target.target == "cpu":
        return CpuTarget(open_tuner(tuning))
    engine = options.target.engine or EngineOptions()
    return TensorrtTarget(choose_profile(engine), engine.outputs, engine.weights)


def read_data(
    source: gs.Graph, infos: tuple[TensorInfo, ...], asked: DataOptions, target: Target, preset: Preset
) -> Data:
    """The samples of inputs with their roles, made up where there are none."""
    length = MAX_LENGTH if asked.max_length is None else asked.max_length
    given = asked.calibration
    if isinstance(given, Data):
        roles = {info.name: info.role for info in infos}
        known = tuple(replace(info, role=info.role or roles.get(info.name)) for info in given.inputs)
        return replace(given, inputs=known)
    if given is not None:
        return open_data(given, infos, tokenizer=asked.tokenizer, max_length=length, limit=preset.limit)
    if target.name == "tensorrt":
        raise CalibrationError("target tensorrt needs calibration data; give samples of the model's real inputs "
                               "with --calibration")  # fmt: skip
    return open_data(None, infos, max_length=longest(source, length, infos), limit=preset.made_up)
