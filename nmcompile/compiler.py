"""The compiler: one function per target that lists its passes top to bottom, and `compile`, which runs them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import uses_external_data

from nmcompile import graph as g
from nmcompile import sparsity as sp
from nmcompile.backends.cpu.tuning import keep, open_tuner
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.backends.tensorrt.shapes import parse_shapes
from nmcompile.calibrate import Calibration, Data, check_ids, longest, open_data, split
from nmcompile.calibrate.sources import Source
from nmcompile.compare import Comparison, Difference, real_tokens
from nmcompile.control import Noise, hold, layer_noise, worst_first
from nmcompile.engine import Engine, choose_profile, derived, lacking, make, to_json
from nmcompile.errors import CalibrationError, NmcompileError, PassError, UnsupportedError
from nmcompile.files import write
from nmcompile.job import Job
from nmcompile.metrics import Limit, parse_limit
from nmcompile.pipeline import Observer, Pass, Report
from nmcompile.recipes import PRESETS, Preset, pruning_passes, reduced
from nmcompile.spec import parse_spec
from nmcompile.targets import CpuTarget, Run, TensorrtTarget

Model: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | gs.Graph"
Progress = Callable[[str, int, int], None]  # (what, done, total)


TARGETS = ("cpu", "tensorrt")
NO_DATA = ("no calibration data: activation ranges come from made-up inputs and are not to be trusted; "
           "give samples of the model's real inputs with --calibration")  # fmt: skip
DEFAULT_TUNING: str | None = None  # what compile(tuning=None) means; a test run sets "off" and never times


# ---- compile ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `compile` did: the plan's path, each pass with its report and seconds, the layers, and what was lost.

    `loss` compares the plan with the model it came from in onnxruntime, output by output, on samples that calibration
    did not see (where there were enough to hold some out); empty when there was no plan. `synthetic` says that these
    samples were made up. `noise` is that of each layer's output against the dense model. `held` says how a limit on
    the loss was held: metric, limit, drop, and the layers that went back to dense or float. `engine`: what became of a
    TensorRT engine. `findings`: every rule of TensorRT's that its graph breaks, node by node.
    """

    plan: Path | None
    passes: tuple[tuple[str, Report, float], ...]
    layers: tuple[Mapping[str, Any], ...]
    segments: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    loss: Mapping[str, Difference]
    synthetic: bool
    held_out: bool
    seconds: float
    sizes: Mapping[str, int] = field(default_factory=dict)
    noise: Mapping[str, Noise] = field(default_factory=dict)
    held: Mapping[str, Any] = field(default_factory=dict)
    engine: Engine | None = None
    findings: tuple[str, ...] = ()

    @property
    def measured_on(self) -> str:
        """What samples the loss was measured on."""
        if self.synthetic:
            return "synthetic samples"
        return "held-out samples" if self.held_out else "the calibration samples, too few to hold any out"

    @property
    def native(self) -> bool:
        """One native segment and nothing else."""
        return len(self.segments) == 1 and self.segments[0]["kind"] == "native"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON: the content of `--report`."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "seconds": round(self.seconds, 3),
            "passes": [{"pass": name, "changed": report.changed, "seconds": round(seconds, 3), "detail": report.detail,
                        "notes": list(report.notes)} for name, report, seconds in self.passes],
            "segments": list(self.segments),
            "layers": list(self.layers),
            "notes": list(self.notes),
            "loss": {name: difference.to_json() for name, difference in self.loss.items()},
            "loss_on": self.measured_on,
            "held": dict(self.held),
            "sqnr_db": {name: round(noise.sqnr, 2) for name, noise in self.noise.items()},
            "sizes": dict(self.sizes),
            **({} if self.engine is None else {"engine": to_json(self.engine)}),
            **({"findings": list(self.findings)} if self.findings else {}),
        }  # fmt: skip


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
    max_length: int = 128,
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
    require "native": an error unless the whole model runs on the engine. measure: run the plan on held-out samples
    against the model. max_drop: "cosine=0.01" and the like (nmcompile.metrics): layers go back to dense and to float,
    worst first, until it holds on held-out samples. checkpoints: a folder from which an interrupted pruning goes on.
    Raises NmcompileError; a failed compile leaves no file behind, but for the graphs and the recipe of an engine that
    TensorRT refuses to build.
    """
    start = time.perf_counter()
    chosen = _check_options(target, preset, require, engine)
    chosen = reduced(chosen, target) if reduce_range else chosen
    options = engine or EngineOptions()
    table = DEFAULT_TUNING if tuning is None else tuning
    for path in (output, emit_onnx, report, None if table == "off" else table):
        _check_path(path, model)
    made = CpuTarget(open_tuner(table)) if target == "cpu" else TensorrtTarget(
        choose_profile(options), options.outputs, options.weights)  # fmt: skip
    without = ""
    if isinstance(made, TensorrtTarget) and output is not None:
        _check_derived(Path(output), model, calibration, tokenizer, emit_onnx, report)
        without = lacking(options, made.profile)
    tell = progress or (lambda *_: None)
    tell("reading the model", 0, 1)
    source = g.admit(model)
    shapes = parse_shapes(options.shapes, g.inputs(source)) if target == "tensorrt" and output is not None else {}
    if calibration is None:
        if target == "tensorrt":
            raise CalibrationError("target tensorrt needs calibration data; give samples of the model's real inputs "
                                   "with --calibration")  # fmt: skip
        max_length = longest(source, max_length)
    data = calibration if isinstance(calibration, Data) else open_data(
        calibration, g.inputs(source), tokenizer=tokenizer, max_length=max_length,
        limit=chosen.made_up if calibration is None else chosen.limit)  # fmt: skip
    source = source if data.synthetic else g.separate_dims(source, data)
    check_ids(source, data)
    seen, held_out = split(data)
    if passes is not None and not (sparsity is None and pattern is None and size is None):
        raise PassError("give either passes or sparsity, pattern and size, not both")
    if size is not None and sparsity is not None:
        raise PassError("give either a size or a sparsity, not both")
    if size is not None:
        sparsity = sparsity_for(size, model, pattern)
    if passes is not None:
        extra = parse_spec(passes) if isinstance(passes, str) else list(passes)
    else:
        by = solver or ("magnitude" if data.synthetic else chosen.solver)
        pattern = _gpu_pattern(pattern, size) if target == "tensorrt" else pattern
        extra = pruning_passes(pattern, sparsity, by, chosen.options if solver is None and not data.synthetic else {},
                               made.multiple)  # fmt: skip
    limit = parse_limit(max_drop, list(held_out)) if isinstance(max_drop, str) else max_drop
    if limit is not None and output is None:
        raise PassError("a limit on the loss needs a plan to measure; give an output")
    calibration_run = Calibration(seen, tell, None if checkpoints is None else Path(checkpoints))
    job = Job(source, made, chosen, attention or made.attention, extra, calibration_run, verify, tuple(observers), tell,
              fingerprint(source))  # fmt: skip
    job.prepare()
    with ExitStack() as unfinished:  # what it holds is removed unless everything was written
        scratch = None if output is None else Path(output).with_name(f".{Path(output).name}.partial")
        if scratch is not None:
            unfinished.callback(scratch.unlink, missing_ok=True)
        held: Mapping[str, Any] = {}
        if limit is None or scratch is None:
            job.quantize()
        else:
            held = _held(job, limit, scratch, held_out)
        if require == "native":
            _require_native(job)

        def lost() -> Mapping[str, Difference]:
            if not measure:
                return {}
            return _loss(source, made.opened(scratch or Path(), job.header), held_out, tell)

        sizes: dict[str, int] = {}
        loss: Mapping[str, Difference] = {}
        built: Engine | None = None
        if isinstance(made, TensorrtTarget) and output is not None:
            built = make(job, made, options, Path(output), shapes, held.get("dense", ()), held.get("float", ()), lost,
                         without)  # fmt: skip
            loss = built.loss
        elif isinstance(made, CpuTarget) and scratch is not None and not measure:
            made.write(scratch, job.header)
        elif scratch is not None or isinstance(made, TensorrtTarget):
            loss = lost()  # of the plan, which this writes
        if emit_onnx is not None:
            g.save(made.graph if isinstance(made, TensorrtTarget) else job.graph, Path(emit_onnx))
            sizes["qdq_onnx"] = Path(emit_onnx).stat().st_size
        notes = [NO_DATA] * data.synthetic + (made.emitted(job.graph) if emit_onnx is not None else []) + job.notes
        if isinstance(made, CpuTarget) and made.tuner is not None:
            notes += keep(made.tuner, table)
        if scratch is not None and scratch.exists():
            os.replace(scratch, output)  # type: ignore[arg-type]
        written = None if output is None or (built is not None and not built.built) else Path(output)
        if written is not None:
            sizes["plan"] = written.stat().st_size
        result = Result(
            plan=written,
            passes=job.log,
            layers=tuple(made.layers),
            segments=tuple(made.segments),
            notes=tuple(notes),
            loss=loss,
            synthetic=data.synthetic,
            held_out=held_out is not seen,
            seconds=time.perf_counter() - start,
            sizes=sizes,
            noise=layer_noise(job.dense, job.graph, held_out) if measure else {},
            held=held,
            engine=built,
            findings=tuple(map(str, made.findings)) if isinstance(made, TensorrtTarget) else (),
        )
        if report is not None:
            write(Path(report), json.dumps(result.to_json(), indent=1) + "\n")
        unfinished.pop_all()
    return result


def _require_native(job: Job) -> None:
    """UnsupportedError with the first reason why the model is not one native segment."""
    if [segment["kind"] for segment in job.target.segments] != ["native"]:
        notes = job.notes
        why = [note for note in notes if "not matched" in note] or [*job.target.notes, *notes, "it has no layers"]
        raise UnsupportedError(f"not one native segment: {why[0]}")


def _held(job: Job, limit: Limit, scratch: Path, data: Data) -> dict[str, Any]:
    """Quantize so that what runs stays within the limit; what it took."""
    names = [info.name for info in g.outputs(job.source)]
    reference = g.runner(job.source, names, optimise=True)

    def attempt(dense: Sequence[str], floating: Sequence[str]) -> float:
        job.quantize(dense, floating)
        return limit.score(reference, job.target.opened(scratch, job.header))

    def candidates() -> tuple[list[str], list[str]]:
        noise = layer_noise(job.dense, job.graph, data)
        quantized = [layer.name for layer in g.linear_layers(job.graph) if layer.quantized]
        return worst_first(noise, job.changed), worst_first(noise, quantized)

    found = hold(limit, attempt, candidates, job.tell)
    return {"metric": limit.name, "limit": limit.value, "drop": found.drop,
            "dense": job.closed(found.dense), "float": list(found.floating)}  # fmt: skip


def sparsity_for(size: str, model: Model, pattern: str | None) -> float:
    """The share of zeros at which a plan has a size, "0.25x" of the model's file: two plans are tried, and the size is
    linear in what is left. PassError when that is no size, or no share of zeros reaches it."""
    match = re.fullmatch(r"(0?\.[0-9]+|1|1\.0*)x", size.strip())
    if match is None:
        raise PassError(f"size {size!r} is not a share of the model's file; write for example 0.25x")
    if isinstance(sp.parse_pattern(pattern or "2x4"), sp.NM):
        raise PassError(f"pattern {pattern} always has the same size; leave --size out")
    wanted, whole, found = float(match[1]), model_bytes(model), {}
    with TemporaryDirectory() as folder:
        for share in (0.5, 0.9):
            plan = Path(folder) / "m.plan"
            compile(model, plan, sparsity=share, pattern=pattern, solver="magnitude", preset="fast", tuning="off",
                    measure=False, calibration=None)  # fmt: skip
            found[share] = plan.stat().st_size / whole
    slope = (found[0.9] - found[0.5]) / 0.4
    share = 0.5 + (wanted - found[0.5]) / slope if slope < 0 else 1.0
    if share >= 0.99:
        raise PassError(f"size {size}: with 90 % zeros the plan still has {found[0.9]:.3g} of the model's size; "
                        "take a larger size")  # fmt: skip
    return max(share, 0.0)


def model_bytes(model: Model) -> int:
    """Size of a model's file with its external data; of its weights where it is no file."""
    if not isinstance(model, (str, os.PathLike)):
        graph = g.load(model)
        seen = {id(t.values): np.asarray(t.values).nbytes for t in graph.tensors().values()
                if isinstance(t, gs.Constant)}  # fmt: skip
        return sum(seen.values())
    path = Path(model)
    total: int = path.stat().st_size
    if total > 100_000_000:  # weights are inside
        return total
    graph = onnx.load(str(path), load_external_data=False).graph
    files = {entry.value for tensor in graph.initializer if uses_external_data(tensor)
             for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    return total + sum((path.parent / name).stat().st_size for name in map(str, files))


def _check_options(target: str, preset: str | Preset, require: str | None, engine: EngineOptions | None) -> Preset:
    if target not in TARGETS:
        raise UnsupportedError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    if isinstance(preset, str) and preset not in PRESETS:
        raise UnsupportedError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    if require not in (None, "native"):
        raise UnsupportedError(f"require {require!r} is not known; the only requirement is native")
    if target == "cpu" and engine:
        raise UnsupportedError("options of an engine are for target tensorrt; leave them out for the CPU")
    if require == "native" and target != "cpu":
        raise UnsupportedError("native is a requirement on plans for the CPU; leave it out for target tensorrt")
    return PRESETS[preset] if isinstance(preset, str) else preset


def fingerprint(graph: gs.Graph) -> str:
    """Short hash of a graph's text: its structure, names and weights."""
    return hashlib.sha256(g.to_text(graph).encode()).hexdigest()[:16]


def _loss(source: gs.Graph, run: Run, data: Data, tell: Progress) -> Mapping[str, Difference]:
    """What runs against the model it came from, on held-out samples."""
    comparison = Comparison(g.outputs(source))
    reference = g.runner(source, [info.name for info in g.outputs(source)], optimise=True)
    done = 0
    for feeds in data:
        comparison.add(reference(feeds), run(feeds), real_tokens(feeds))
        done += len(next(iter(feeds.values())))
        tell("measuring the loss", done, data.samples)
    return comparison.differences()


def _gpu_pattern(pattern: str | None, size: str | None) -> str:
    """The zeros that TensorRT has products for, unless none are wanted."""
    if size is not None or pattern not in (None, "2:4", "dense"):
        raise UnsupportedError(f"TensorRT runs 2:4 zeros only, not {pattern or f'size {size}'}; leave it out")
    return pattern or "2:4"


def _check_derived(output: Path, *others: object) -> None:
    """Refuse where a file that lies beside an engine is another one that is read or written."""
    taken = {Path(other).resolve() for other in others if isinstance(other, (str, os.PathLike))}
    for path in derived(output):
        if path.resolve() in taken:
            raise NmcompileError(f"{path} is written beside {output}; give another name to one of them")


def _check_path(path: str | os.PathLike[str] | None, model: Model) -> None:
    """Refuse early what could not be written at the end."""
    if path is None:
        return
    if isinstance(model, (str, os.PathLike)) and Path(path).resolve() == Path(model).resolve():
        raise NmcompileError(f"{path} is the model itself; give another name for what is written")
    folder = Path(path).resolve().parent
    if Path(path).exists() and not Path(path).is_dir() and not Path(path).is_file():
        raise NmcompileError(f"{path} is not a regular file; give the name of a file to write")
    if Path(path).is_dir():
        raise NmcompileError(f"{path} is a folder; give the name of a file to write")
    if not folder.is_dir():
        raise NmcompileError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise NmcompileError(f"cannot write {path}: the folder {folder} is not writable; choose another")


