"""`compile`: from a model to a plan, top to bottom."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile import input_roles
from nmcompile.accuracy import Progress, hold_limit, limit_for, look_beyond, measured_loss
from nmcompile.backends.cpu.tuning import Tuner, keep, open_tuner
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.backends.tensorrt.shapes import parse_shapes
from nmcompile.calibrate import Calibration, Data, check_ids, longest, open_data
from nmcompile.calibrate.sources import Source
from nmcompile.compare import Difference
from nmcompile.control import layer_noise
from nmcompile.coverage import Coverage, coverage, timed
from nmcompile.engine import Engine, Loss, choose_profile, lacking, make
from nmcompile.errors import CalibrationError, UnsupportedError
from nmcompile.holdout import Holdout, hold_out
from nmcompile.job import Job
from nmcompile.lengths import Look
from nmcompile.metrics import Limit
from nmcompile.outputs import Outputs, real_path, staged
from nmcompile.pipeline import Observer, Pass
from nmcompile.recipes import Preset, reduced
from nmcompile.request import (
    MAX_LENGTH,
    Wanted,
    attention_note,
    check_options,
    check_paths,
    passes_for,
    pruning_note,
    without_effect,
)
from nmcompile.result import Result
from nmcompile.roles import stated
from nmcompile.session import load_cpu
from nmcompile.sizes import Model, external_files, model_bytes, size_note, zeros_for
from nmcompile.targets import CpuTarget, TensorrtTarget
from nmcompile.tensorinfo import TensorInfo

__all__ = ["DEFAULT_TUNING", "NO_DATA", "Model", "Progress", "Result", "compile", "fingerprint", "model_bytes"]

NO_DATA = ("no calibration data: activation ranges come from made-up inputs and are not to be trusted; "
           "give samples of the model's real inputs with --calibration")  # fmt: skip
DEFAULT_TUNING: str | None = None  # what compile(tuning=None) means; a test run sets "off" and never times


def compile(
    model: Model,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    preset: str | Preset = "default",
    passes: str | Iterable[Pass] | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    solver: str | None = None,
    size: str | None = None,
    calibration: Source | Data | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    attention: str | None = None,
    reduce_range: bool = False,
    engine: EngineOptions | None = None,
    tuning: str | os.PathLike[str] | None = None,
    emit_onnx: str | os.PathLike[str] | None = None,
    verify: bool = False,
    require: str | None = None,
    report: str | os.PathLike[str] | None = None,
    measure: bool = True,
    max_drop: str | Limit | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    observers: Iterable[Observer] = (),
) -> Result:
    """Compile an ONNX model to a plan.

    model: path, ModelProto or gs.Graph; never modified. output: the plan to write; None compiles without writing one.
    passes: a spec string or passes that stand in for `sparsity`, `pattern`, `size` and `solver`, run between canonical
    form and quantization. solver: magnitude, wanda, obs or admm; None is the preset's for real samples and magnitude
    for made-up ones. size: of the plan, as a share of the model's file ("0.25x"), instead of `sparsity`. calibration:
    .npz, folder, .jsonl, iterable of feeds, or a Data; without it ranges come from made-up samples. attention "float":
    queries, keys, values and softmax stay float (the default for TensorRT), or "int8". reduce_range: weights of 7 bits,
    for what `emit_onnx` writes on CPUs without VNNI; a plan needs none. engine: how an engine is made,
    for target tensorrt. tuning: each layer runs on the kernel that is fastest by times measured on this machine, kept
    for the next compile (None), by a table that is read from a file, or measured and written to it where it does not
    exist, or by the shipped cost model ("off"), which chooses alike on every machine.
    require "native": an error unless the whole model runs on the engine. measure: run the plan against the model on
    held-out samples, and at lengths that calibration had not. max_drop: "cosine=0.01" and the like (nmcompile.metrics):
    layers go back to dense and to float, worst first, until it holds on held-out samples. checkpoints: a folder from
    which an interrupted pruning goes on. Raises NmcompileError; all files appear together at the end, and a
    failed compile leaves none, but for the graphs and the recipe of an engine that TensorRT refuses to build. An option
    without effect is a note of the result.
    """
    start = time.perf_counter()
    chosen = check_options(target, preset, require, engine)
    chosen = reduced(chosen, target) if reduce_range else chosen
    options = engine or EngineOptions()
    table = DEFAULT_TUNING if tuning is None else tuning
    kept = None if table == "off" else table
    check_paths({"-o": output, "--emit-onnx": emit_onnx, "--report": report, "--tuning": kept},
                {"the model": model, **external_files(model), "--calibration": calibration, "--tokenizer": tokenizer},
                engine=target == "tensorrt")  # fmt: skip
    wanted = Wanted(passes, sparsity, pattern, solver, size)
    made = CpuTarget(open_tuner(table)) if target == "cpu" else TensorrtTarget(
        choose_profile(options), options.outputs, options.weights)  # fmt: skip
    without = lacking(options, made.profile) if isinstance(made, TensorrtTarget) and output is not None else ""
    tell = progress or (lambda *_: None)
    tell("reading the model", 0, 1)
    source = g.admit(model)
    shapes = parse_shapes(options.shapes, g.inputs(source)) if target == "tensorrt" and output is not None else {}
    infos = input_roles.inputs(source)
    data = _data(source, infos, calibration, target, chosen, tokenizer, max_length)
    source = source if data.synthetic else g.separate_dims(source, data)
    check_ids(source, data)
    parts = hold_out(data, limited=max_drop is not None)
    limit = limit_for(max_drop, source, parts.chosen, can_run=output is not None or target == "tensorrt")
    zeros = sparsity if size is None else zeros_for(size, pattern, model_bytes(model), _trial(model, pattern))
    given = passes_for(wanted, chosen, zeros, target, made.multiple, data.synthetic)
    notes = [NO_DATA] * data.synthetic + without_effect(
        wanted, given, data, source=calibration, tokenizer=tokenizer, max_length=max_length, checkpoints=checkpoints,
        tuning=tuning, target=target)  # fmt: skip
    job = Job(source, made, chosen, attention or made.attention, given,
              Calibration(parts.seen, tell, None if checkpoints is None else Path(checkpoints)), verify,
              tuple(observers), tell, fingerprint(source), roles=stated(infos))  # fmt: skip
    job.prepare()
    notes += [*pruning_note(given, job.changed, job.notes), *attention_note(attention, job.log)]
    with staged() as files:
        plan = None if output is None else real_path(output)
        scratch = None if plan is None else files.folder(plan.parent) / ".plan"
        held: Mapping[str, Any] = {}
        if limit is None or max_drop is None:
            job.quantize()
        else:
            held, parts, told = hold_limit(job, limit, max_drop, parts, scratch or Path())
            notes += told
        if require == "native":
            _require_native(job)
        if isinstance(made, CpuTarget):
            found = _cpu(job, made, scratch, parts, data, measure)
            if scratch is not None and plan is not None:
                files.move(scratch, plan)
        else:
            found = _tensorrt(job, made, plan, parts, data, measure, lambda lost: make(
                job, made, options, plan or Path(), shapes, held, lost, without, files))  # fmt: skip
        sizes = {} if emit_onnx is None else {"qdq_onnx": _emit(files, made, job, real_path(emit_onnx))}
        notes += made.emitted(job.graph) if emit_onnx is not None else []
        if isinstance(made, CpuTarget) and made.tuner is not None:
            notes += _keep(files, made.tuner, table)
        if plan is not None and (found.engine is None or found.engine.built):
            sizes["plan"] = files.size(plan)
            notes += size_note(size, sizes["plan"], model_bytes(model)) if size is not None else []
        result = Result(
            plan=Path(output) if output is not None and "plan" in sizes else None,
            passes=job.log,
            layers=tuple(made.layers),
            segments=found.segments or tuple(made.segments),
            notes=tuple(dict.fromkeys([*notes, *found.notes, *job.notes])),
            loss=found.loss,
            synthetic=data.synthetic,
            held_out=parts.held_out,
            chosen_by=limit is not None and not parts.apart,
            seconds=time.perf_counter() - start,
            sizes=sizes,
            noise=layer_noise(job.dense, job.graph, parts.measured) if measure else {},
            held=held,
            coverage=found.coverage,
            lengths=found.look,
            engine=found.engine,
            findings=tuple(map(str, made.findings)) if isinstance(made, TensorrtTarget) else (),
        )
        if report is not None:
            files.place(real_path(report), ".report").write_text(json.dumps(result.to_json(), indent=1) + "\n", "utf-8")
        files.publish()
    return result


def _data(
    source: gs.Graph, infos: tuple[TensorInfo, ...], calibration: Source | Data | None, target: str, preset: Preset,
    tokenizer: str | Path | None, max_length: int | None,
) -> Data:  # fmt: skip
    """The samples of inputs with their roles, made up where there are none."""
    length = MAX_LENGTH if max_length is None else max_length
    if isinstance(calibration, Data):
        roles = {info.name: info.role for info in infos}
        known = tuple(replace(info, role=info.role or roles.get(info.name)) for info in calibration.inputs)
        return replace(calibration, inputs=known)
    if calibration is not None:
        return open_data(calibration, infos, tokenizer=tokenizer, max_length=length, limit=preset.limit)
    if target == "tensorrt":
        raise CalibrationError("target tensorrt needs calibration data; give samples of the model's real inputs "
                               "with --calibration")  # fmt: skip
    return open_data(None, infos, max_length=longest(source, length, infos), limit=preset.made_up)


def _trial(model: Model, pattern: str | None) -> Callable[[Path, float], None]:
    """What writes a plan with a share of zeros, quickly and at any loss."""

    def trial(plan: Path, share: float) -> None:
        compile(model, plan, sparsity=share, pattern=pattern, solver="magnitude", preset="fast", tuning="off",
                measure=False)  # fmt: skip

    return trial


@dataclass(frozen=True)
class _Found:
    """What was measured on what was made."""

    loss: Mapping[str, Difference] = field(default_factory=dict)
    segments: tuple[Mapping[str, Any], ...] = ()
    coverage: Coverage | None = None
    look: Look | None = None
    engine: Engine | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.look is None else self.look.notes


def _cpu(job: Job, made: CpuTarget, scratch: Path | None, parts: Holdout, data: Data, measure: bool) -> _Found:
    """Write the plan to `scratch`, and measure it."""
    if scratch is not None:
        made.write(scratch, job.header)
    feeds = next(iter(parts.measured), None) if measure else None
    covered = coverage(job.graph, made.lowered.blobs, feeds)
    if scratch is None or not measure:
        return _Found(coverage=covered)
    session = load_cpu(scratch)
    loss = measured_loss(job.source, session.run, parts.measured, job.tell)
    mixed = any(segment["kind"] != "native" for segment in made.segments)
    segments = timed(made.segments, session, feeds) if feeds is not None and mixed else ()
    return _Found(loss, segments, covered, look_beyond(job.source, session.run, data, parts, loss, job.tell))


def _tensorrt(
    job: Job, made: TensorrtTarget, plan: Path | None, parts: Holdout, data: Data, measure: bool,
    build: Callable[[Callable[[], Loss]], Engine],
) -> _Found:  # fmt: skip
    """Write graphs and recipe, build the engine where that is possible, and measure the graph in onnxruntime."""

    def lost() -> Loss:
        run = made.opened(Path(), job.header)
        return measured_loss(job.source, run, parts.measured, job.tell) if measure else {}

    built = None if plan is None else build(lost)
    loss = lost() if built is None else built.loss
    run = made.opened(Path(), job.header)
    beyond = look_beyond(job.source, run, data, parts, loss, job.tell) if measure else None
    return _Found(loss, look=beyond, engine=built)


def _emit(files: Outputs, made: CpuTarget | TensorrtTarget, job: Job, path: Path) -> int:
    """Write the quantized graph as ONNX, a large one's weights beside it; its size."""
    folder = files.folder(path.parent)
    place = folder / path.name
    g.save(made.graph if isinstance(made, TensorrtTarget) else job.graph, place)
    for name in (f"{path.name}.data", path.name):  # the file that names the other one last
        if name in os.listdir(folder):
            files.move(folder / name, path.with_name(name))
    return place.stat().st_size


def _keep(files: Outputs, tuner: Tuner, table: str | os.PathLike[str] | None) -> list[str]:
    """Store the times that were measured, in a file only where one was asked for that there was not."""
    if table is None or table == "off" or not tuner.measures:
        return keep(tuner, table)
    return keep(tuner, files.place(real_path(table), ".table"))


def _require_native(job: Job) -> None:
    """UnsupportedError with the first reason why the model is not one native segment."""
    if [segment["kind"] for segment in job.target.segments] != ["native"]:
        notes = job.notes
        why = [note for note in notes if "not matched" in note] or [*job.target.notes, *notes, "it has no layers"]
        raise UnsupportedError(f"not one native segment: {why[0]}")


def fingerprint(graph: gs.Graph) -> str:
    """Short hash of a graph's text: its structure, names and weights."""
    return hashlib.sha256(g.to_text(graph).encode()).hexdigest()[:16]
