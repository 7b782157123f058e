"""The compiler: one function per target that lists its passes top to bottom, and `compile`, which runs them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import graph as g
from nmcompile import sparsity as sp
from nmcompile.backends.cpu.lower import lower
from nmcompile.backends.cpu.tuning import by_cost_model, keep, open_tuner
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.calibrate.sources import Source
from nmcompile.compare import Comparison, Difference, real_tokens
from nmcompile.errors import NmcompileError, PassError, UnsupportedError
from nmcompile.files import write
from nmcompile.passes import (
    BlockPrune,
    CanonicaliseEmbeddings,
    CanonicaliseLinear,
    ExpandFused,
    FoldConstants,
    FuseAttention,
    FuseGelu,
    FuseLayerNorm,
    InsertQdq,
    MagnitudePrune,
    NMPrune,
    RaiseOpset,
    SimplifyShapes,
    SmoothActivations,
    WidenFloats,
)
from nmcompile.pipeline import Observer, Pass, Pipeline, Report
from nmcompile.plan import write_plan
from nmcompile.session import load
from nmcompile.spec import parse_spec, spec

Model: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | gs.Graph"
Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Preset:
    """How much time the compiler may spend: how activation ranges are clipped, on how many samples."""

    clip: str
    limit: int


PRESETS: Mapping[str, Preset] = {
    "default": Preset(clip="mse", limit=128),
    "fast": Preset(clip="min-max", limit=32),
}


# ---- the passes, target by target ------------------------------------------------------------------------------


def canonical_passes() -> list[Pass]:
    """From any exporter's graph to few operators; every one of them keeps what the graph computes."""
    return [
        RaiseOpset(),  # first: one version of each operator for all that follows
        ExpandFused(),  # before shapes are simplified: a fused node hides them
        WidenFloats(),
        FoldConstants(),  # transposed weights, masks of fixed size
        SimplifyShapes(),  # needs folded constants to see fixed sizes
        FoldConstants(),  # sizes that have just become constant
        CanonicaliseLinear(),
        FuseLayerNorm(),
        FuseGelu(),
        FuseAttention(),  # after linear: merged projections must be linear layers before they are taken apart
        CanonicaliseLinear(),  # the product after attention has lost the reshapes that hid it
        CanonicaliseEmbeddings(),
    ]


def cpu_passes(preset: Preset, pruning: Iterable[Pass], attention: str = "int8") -> list[Pass]:
    """The CPU recipe: canonical form, pruning, then quantization of what is left."""
    return [
        *canonical_passes(),
        *pruning,
        SmoothActivations(),  # of the pruned model: what is left of the weights takes the outliers
        # last: ranges are those of the smoothed model
        InsertQdq(activations="uint8", clip=preset.clip, attention=attention),
    ]


def tensorrt_passes(preset: Preset, pruning: Iterable[Pass], attention: str = "int8") -> list[Pass]:
    """The TensorRT recipe: symmetric int8 activations."""
    quantize = InsertQdq(activations="int8", clip=preset.clip, attention=attention)
    return [*canonical_passes(), *pruning, SmoothActivations(), quantize]


DEFAULT_TUNING: str | None = None  # what compile(tuning=None) means; a test run sets "off" and never times

TARGETS = {"cpu": cpu_passes, "tensorrt": tensorrt_passes}


def pruning_passes(pattern: str | None, sparsity: float | None, criterion: str = "magnitude") -> list[Pass]:
    """The pass for a pattern ("2x4", "2:4", "unstructured") and a share of zeros; none when neither is given."""
    if pattern is None and sparsity is None:
        return []
    kind = sp.parse_pattern(pattern or "2x4")
    if isinstance(kind, sp.NM):
        if sparsity is not None and abs(sparsity - (1 - kind.n / kind.m)) > 1e-6:
            raise PassError(f"pattern {kind} always has {1 - kind.n / kind.m:.3g} zeros; leave --sparsity out")
        return [NMPrune(pattern=str(kind), criterion=criterion)]
    share = 0.8 if sparsity is None else sparsity
    if not 0 <= share < 1:
        raise PassError(f"sparsity {share} is not a share of zeros between 0 and 1, for example 0.8")
    if isinstance(kind, sp.Block):
        return [BlockPrune(sparsity=share, block=str(kind), criterion=criterion)]
    return [MagnitudePrune(sparsity=share, criterion=criterion)]


# ---- compile ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `compile` did: the plan's path, each pass with its report and seconds, the layers, and what was lost.

    `loss` compares the plan with the model it came from in onnxruntime, output by output, on samples that calibration
    did not see (where there were enough to hold some out); empty when there was no plan. `synthetic` says that these
    samples were made up.
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
            "sizes": dict(self.sizes),
        }  # fmt: skip


def compile(
    model: Model,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    preset: str = "default",
    passes: str | Iterable[Pass] | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    criterion: str = "magnitude",
    calibration: Source | Data | None = None,
    tokenizer: str | Path | None = None,
    max_length: int = 128,
    attention: str = "int8",
    tuning: str | os.PathLike[str] | None = None,
    emit_onnx: str | os.PathLike[str] | None = None,
    verify: bool = False,
    require: str | None = None,
    report: str | os.PathLike[str] | None = None,
    measure: bool = True,
    progress: Progress | None = None,
    observers: Iterable[Observer] = (),
) -> Result:
    """Compile an ONNX model to a plan.

    model: path, ModelProto or gs.Graph; never modified. output: the plan to write; None compiles without writing one.
    passes: a spec string or passes that stand in for `sparsity`, `pattern` and `criterion`, run between canonical form
    and quantization. calibration: .npz, folder, .jsonl, iterable of feeds, or a Data; without it ranges come from
    made-up samples. attention "float": queries, keys, values and softmax stay float. tuning: each layer runs on the
    kernel that is fastest by times measured on this machine, kept for the next compile (None), by a table that is read
    from a file, or measured and written to it where it does not exist, or by the shipped cost model ("off"), which
    chooses alike on every machine. require "native": an error unless the whole model runs on the engine. measure: run
    the plan on held-out samples against the model. Raises NmcompileError; a failed compile leaves no file behind.
    """
    start = time.perf_counter()
    chosen = _check_options(target, preset, require, output)
    table = DEFAULT_TUNING if tuning is None else tuning
    for path in (output, emit_onnx, report, None if table == "off" else table):
        _check_path(path, model)
    tuner = open_tuner(table)
    tell = progress or (lambda *_: None)
    tell("reading the model", 0, 1)
    source = g.load(model)
    if calibration is None:
        max_length = longest(source, max_length)
    data = calibration if isinstance(calibration, Data) else open_data(
        calibration, g.inputs(source), tokenizer=tokenizer, max_length=max_length, limit=chosen.limit)  # fmt: skip
    seen, held_out = split(data)
    if passes is not None and (sparsity is not None or pattern is not None):
        raise PassError("give either passes or sparsity and pattern, not both")
    extra = pruning_passes(pattern, sparsity, criterion) if passes is None else _passes(passes)
    recipe = TARGETS[target](chosen, extra, attention)
    log: list[tuple[str, Report, float]] = []

    def record(pass_: Pass, graph: gs.Graph, result: Report, seconds: float) -> None:
        log.append((spec(pass_), result, seconds))
        tell(f"pass {pass_.name}", len(log), len(recipe))

    collector = Calibration(seen, progress=lambda done, total: tell("calibrating", done, total))
    pipeline = Pipeline(recipe, observers=[record, *observers], verify=verify, calibration=collector)
    graph, reports = pipeline.run(source)
    g.infer_shapes(graph)
    tell("choosing kernels", 0, 1)
    lowered = lower(graph, tuner or by_cost_model)
    notes = [note for result in reports for note in result.notes] + list(lowered.notes)
    if data.synthetic:
        notes.insert(0, "no calibration data: activation ranges come from made-up inputs and are not to be trusted; "
                        "give samples of the model's real inputs with --calibration")  # fmt: skip
    if require == "native" and not lowered.native:
        why = [note for note in notes if "not matched" in note] or [*lowered.notes, *notes, "it has no layers"]
        raise UnsupportedError(f"not one native segment: {why[0]}")
    sizes: dict[str, int] = {}
    loss: Mapping[str, Difference] = {}
    with ExitStack() as unfinished:  # what it holds is removed unless everything was written
        partial = None if output is None else Path(output).with_name(f".{Path(output).name}.partial")
        if partial is not None:
            unfinished.callback(partial.unlink, missing_ok=True)
            tell("writing the plan", 0, 1)
            header = {"nmcompile": nmcompile.__version__, "target": target, "source": fingerprint(source),
                      "passes": [name for name, _, _ in log], **lowered.header}  # fmt: skip
            write_plan(partial, header, lowered.arrays, lowered.blobs)
            sizes["plan"] = partial.stat().st_size
            if measure:
                loss = _loss(source, partial, held_out, tell)
        if emit_onnx is not None:
            g.save(graph, Path(emit_onnx))
            sizes["qdq_onnx"] = Path(emit_onnx).stat().st_size
        notes += [] if tuner is None else keep(tuner, table)
        result = Result(
            plan=None if output is None else Path(output),
            passes=tuple(log),
            layers=lowered.layers,
            segments=lowered.segments,
            notes=tuple(notes),
            loss=loss,
            synthetic=data.synthetic,
            held_out=held_out is not seen,
            seconds=time.perf_counter() - start,
            sizes=sizes,
        )
        if report is not None:
            write(Path(report), json.dumps(result.to_json(), indent=1) + "\n")
        if partial is not None and output is not None:
            os.replace(partial, output)
    return result


def _check_options(target: str, preset: str, require: str | None, output: object) -> Preset:
    if target not in TARGETS:
        raise UnsupportedError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    if target == "tensorrt" and output is not None:
        raise UnsupportedError(
            "target tensorrt is not built yet; --emit-onnx writes its Q/DQ graph, --target cpu a plan"
        )
    if preset not in PRESETS:
        raise UnsupportedError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    if require not in (None, "native"):
        raise UnsupportedError(f"require {require!r} is not known; the only requirement is native")
    return PRESETS[preset]


def _passes(passes: str | Iterable[Pass]) -> list[Pass]:
    return parse_spec(passes) if isinstance(passes, str) else list(passes)


def split(data: Data) -> tuple[Data, Data]:
    """(for calibration, for measuring the loss): every eighth sample is held out, all serve both when there are few."""
    rows = data.rows
    if data.synthetic or len(rows) < 8:
        return data, data
    held = tuple(row for i, row in enumerate(rows) if i % 8 == 7)
    return replace(data, rows=tuple(row for i, row in enumerate(rows) if i % 8 != 7)), replace(data, rows=held)


def longest(graph: gs.Graph, length: int) -> int:
    """The greatest number of tokens up to `length` that the model takes (its position table may hold fewer)."""
    infos = g.inputs(graph)
    if not any(len(info.shape) > 1 and isinstance(info.shape[1], str) for info in infos):
        return length
    while length > 8:
        dims = {dim: length for info in infos for dim in info.shape[1:] if isinstance(dim, str)}
        feeds = g.random_feeds(infos, dims=dims)
        for name, values in feeds.items():
            if values.ndim == 2 and values.dtype.kind in "iu" and values.max() > 1:
                feeds[name] = np.full_like(values, 2)  # no padding token, which RoBERTa's positions do not count
        try:
            g.run(graph, feeds)
            return length
        except NmcompileError:
            length //= 2
    return length


def fingerprint(graph: gs.Graph) -> str:
    """Short hash of a graph's text: its structure, names and weights."""
    return hashlib.sha256(g.to_text(graph).encode()).hexdigest()[:16]


def _loss(source: gs.Graph, plan: Path, data: Data, tell: Progress) -> Mapping[str, Difference]:
    """The plan against the model it came from, on held-out samples."""
    comparison = Comparison(g.outputs(source))
    reference = g.runner(source, [info.name for info in g.outputs(source)], optimise=True)
    session = load(plan)
    done = 0
    for feeds in data:
        comparison.add(reference(feeds), session.run(feeds), real_tokens(feeds))
        done += len(next(iter(feeds.values())))
        tell("measuring the loss", done, data.samples)
    return comparison.differences()


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


