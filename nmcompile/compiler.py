"""`compile`: from a model to a plan, top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.accuracy import Search, held_by, look_beyond, measured_loss
from nmcompile.backends.cpu.tuning import Tuner, keep
from nmcompile.backends.tensorrt.engine import Engine, Facts, Wanted, infos_json, make
from nmcompile.compare import Difference
from nmcompile.contract import Progress
from nmcompile.coverage import Coverage, coverage, timed
from nmcompile.errors import UnsupportedError
from nmcompile.fallback import Held, layer_noise
from nmcompile.holdout import Holdout
from nmcompile.lengths import Look
from nmcompile.options import Named, Options, Place
from nmcompile.outputs import Outputs, pending, real_path
from nmcompile.pipeline import Observer
from nmcompile.request import attention_note, pruning_note
from nmcompile.result import Result
from nmcompile.sizes import Model, model_bytes, size_note
from nmcompile.stages import Keep, Pruned, PrunePasses, canonicalise, prune, quantize
from nmcompile.targets import CpuProduct, Product, TensorrtTarget
from nmcompile.work import NO_DATA, Work, prepared

__all__ = ["DEFAULT_TUNING", "NO_DATA", "Model", "Options", "Progress", "Result", "compile", "model_bytes"]

DEFAULT_TUNING: str | None = None  # what tuning=None means; a test run sets "off" and never times


def compile(
    model: Model,
    output: Place | None = None,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    observers: Iterable[Observer] = (),
    **named: Unpack[Named],
) -> Result:
    """Compile an ONNX model to a plan.

    model: path, ModelProto or gs.Graph; never modified. output: the plan to write; None compiles without writing one.
    options: what is asked (nmcompile.options says what each does); any of them can be given by its own name instead:
    `compile("m.onnx", "m.plan", calibration="samples.npz", sparsity=0.8)`. observers: called after each pass that led
    to the plan. Raises NmcompileError; all files appear together at the end, and a failed compile leaves none, but for
    the graphs and the recipe of an engine that TensorRT refuses to build. An option without effect is a note of the
    result.
    """
    start = time.perf_counter()
    asked = (options or Options()).having(named)
    tuning = DEFAULT_TUNING if asked.target.tuning is None else asked.target.tuning
    work = prepared(model, output, asked, tuning, progress or (lambda *_: None), observers)
    canonical = canonicalise(work.source, work.runner)
    passes = work.passes(canonical)
    notes = work.notes(passes)
    pruned = prune(canonical, PrunePasses.of(passes), work.runner)
    with pending() as files:
        made = _made(work, pruned)
        notes += [*pruning_note(passes, pruned.changed, made.product.told),
                  *attention_note(asked.quantize.attention, made.product.ran), *made.notes]  # fmt: skip
        if asked.target.require == "native":
            _require_native(made.product)
        found = _cpu(work, made, files) if isinstance(made.product, CpuProduct) else _tensorrt(work, made, files)
        sizes, more = _written(work, found, files)
        result = _result(work, made, found, sizes, [*notes, *more], start)
        if asked.write.report is not None:
            place = files.place(real_path(asked.write.report), ".report")
            place.write_text(json.dumps(result.to_json(), indent=1) + "\n", "utf-8")
        files.publish()
    return result


@dataclass(frozen=True)
class _Made:
    """A product, what it took to stay within a limit, and the samples that the limit was held by."""

    product: Product
    parts: Holdout
    build: Callable[[Keep], Product]
    held: Held | None = None
    notes: tuple[str, ...] = ()


def _made(work: Work, pruned: Pruned) -> _Made:
    """Quantize and lower; where there is a limit, with as many layers in denser forms as it takes."""
    last: Product | None = None  # only the last one: each holds a model

    def build(keep: Keep, final: bool = False) -> Product:
        nonlocal last
        again = final and bool(work.runner.observers)  # they see what led to the plan, and only that
        if last is None or last.quantized.keep != keep or again:
            runner = work.runner if final else work.runner.unseen
            last = work.target.lower(quantize(pruned, work.scheme, runner, keep), runner)
        return last

    if work.limit is None:
        return _Made(build(Keep(), final=True), work.parts, build)
    search = Search(work.reference, pruned, build, work.target.multiple > 1, work.runner.progress)
    product, held, parts, notes = held_by(search, work.limit, work.options.control.max_drop or work.limit, work.parts)
    product = build(product.quantized.keep, final=True)
    return _Made(product, parts, build, held, tuple(notes))


# ---- what was made, measured and written ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What was measured on what was made."""

    product: Product
    loss: Mapping[str, Difference] = field(default_factory=dict)
    segments: tuple[Mapping[str, Any], ...] = ()
    coverage: Coverage | None = None
    look: Look | None = None
    engine: Engine | None = None


def _cpu(work: Work, made: _Made, files: Outputs) -> _Found:
    """Measure the plan, and write it."""
    product, measure, progress = made.product, work.options.control.measure, work.runner.progress
    assert isinstance(product, CpuProduct)
    if work.output is not None:
        product.write(files.place(real_path(work.output), ".plan"))
    feeds = next(iter(made.parts.measured), None) if measure else None
    covered = coverage(product.graph, product.lowered.blobs, feeds)
    if work.output is None or not measure:
        return _Found(product, coverage=covered)
    loss = measured_loss(work.reference, product.run, made.parts.measured, progress)
    mixed = any(segment["kind"] != "native" for segment in product.segments)
    segments = timed(product.segments, product.session, feeds) if feeds is not None and mixed else ()
    beyond = look_beyond(work.reference, product.run, work.data, made.parts, loss, progress)
    return _Found(product, loss, segments, covered, beyond)


def _tensorrt(work: Work, made: _Made, files: Outputs) -> _Found:
    """Write graphs and recipe, build the engine where that is possible, and measure the graph in onnxruntime."""
    progress, keep = work.runner.progress, made.product.quantized.keep
    losses: dict[Keep, Mapping[str, Difference]] = {}

    def product_of(back: Iterable[str]) -> Product:
        dense = made.product.quantized.pruned.together((*keep.dense, *back))
        return made.build(Keep(dense, keep.floating))

    def loss_of(product: Product) -> Mapping[str, Difference]:
        kept = product.quantized.keep
        if kept not in losses:
            losses[kept] = measured_loss(work.reference, product.run, made.parts.measured, progress) if (
                work.options.control.measure) else {}  # fmt: skip
        return losses[kept]

    def graph(back: Iterable[str]) -> tuple[gs.Graph, Facts]:
        product = product_of(back)
        assumes = [report.detail["assumes"] for _, report, _ in product.ran if "assumes" in report.detail]
        passes = [name for name, _, _ in product.ran]
        facts = Facts(product.layers, passes, assumes[-1] if assumes else [], loss_of(product))  # type: ignore[arg-type]
        return product.graph, facts

    engine, product = None, made.product
    if work.output is not None:
        engine = make(_wanted(work, product, files, graph))
        product = product_of(engine.back)
    loss = loss_of(product)
    beyond = look_beyond(work.reference, product.run, work.data, made.parts, loss, progress) if (
        work.options.control.measure) else None  # fmt: skip
    return _Found(product, loss, look=beyond, engine=engine)


def _wanted(
    work: Work, product: Product, files: Outputs, graph: Callable[[Iterable[str]], tuple[gs.Graph, Facts]]
) -> Wanted:
    assert isinstance(work.target, TensorrtTarget) and work.output is not None
    pruned = product.quantized.pruned
    source = (pruned.canonical.fingerprint, infos_json(g.inputs(work.source)), infos_json(g.outputs(work.source)))
    left = [name for name in pruned.changed if name not in product.quantized.keep.dense]
    return Wanted(real_path(work.output), files, work.engine, work.target.profile, work.shapes, work.without, source,
                  left, graph, work.runner.progress, pruned.canonical.roles)  # fmt: skip


def _written(work: Work, found: _Found, files: Outputs) -> tuple[dict[str, int], list[str]]:
    """(sizes of what was written, notes) after the graph as ONNX and the table of times went to their places."""
    product, sizes, notes = found.product, {}, []
    emit, tuner, size = work.options.write.emit_onnx, work.tuner, work.options.prune.size
    if emit is not None:
        sizes["qdq_onnx"] = _emit(files, product, real_path(emit))
        notes += product.emitted
    if tuner is not None:
        notes += _keep(files, tuner, work.tuning)
    if work.output is not None and (found.engine is None or found.engine.built):
        sizes["plan"] = files.size(real_path(work.output))
        notes += size_note(size, sizes["plan"], model_bytes(work.model)) if size is not None else []
    return sizes, notes


def _keep(files: Outputs, tuner: Tuner, table: Place | None) -> list[str]:
    """Store the times that were measured, in a file only where one was asked for that there was not."""
    if table is None or table == "off" or not tuner.measures:
        return keep(tuner, table)
    return keep(tuner, files.place(real_path(table), ".table"))


def _emit(files: Outputs, product: Product, path: Path) -> int:
    """Write the quantized graph as ONNX, a large one's weights beside it; its size."""
    folder = files.folder(path.parent)
    place = folder / path.name
    g.save(product.graph, place)
    for name in (f"{path.name}.data", path.name):  # the file that names the other one last
        if name in os.listdir(folder):
            files.move(folder / name, path.with_name(name))
    return place.stat().st_size


def _result(
    work: Work, made: _Made, found: _Found, sizes: Mapping[str, int], notes: list[str], start: float
) -> Result:
    product, quantized = found.product, found.product.quantized
    told = [*notes, *(() if found.look is None else found.look.notes), *product.told]
    measured = work.options.control.measure
    work.reference.release()  # before both graphs run side by side
    return Result(
        plan=work.output if "plan" in sizes else None,
        passes=product.ran,
        layers=tuple(product.layers),
        segments=found.segments or tuple(product.segments),
        notes=tuple(dict.fromkeys(told)),
        loss=found.loss,
        synthetic=work.data.synthetic,
        held_out=made.parts.held_out,
        chosen_by=work.limit is not None and not made.parts.apart,
        seconds=time.perf_counter() - start,
        sizes=sizes,
        noise=layer_noise(quantized.pruned.dense, quantized.graph, made.parts.measured) if measured else {},
        held=made.held,
        coverage=found.coverage,
        lengths=found.look,
        engine=found.engine,
        findings=tuple(map(str, product.findings)),
    )


def _require_native(product: Product) -> None:
    """UnsupportedError with the first reason why the model is not one native segment."""
    if [segment["kind"] for segment in product.segments] != ["native"]:
        why = [note for note in product.told if "not matched" in note] or [*product.notes, *product.told,
                                                                          "it has no layers"]  # fmt: skip
        raise UnsupportedError(f"not one native segment: {why[0]}")
