"""`train`: from a dense model and unlabelled samples to a sparse model in ONNX that computes nearly the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Data, check_ids, open_data
from nmcompile.calibrate.sources import Source
from nmcompile.contract import Progress
from nmcompile.errors import GraphError, PassError
from nmcompile.outputs import pending, real_path
from nmcompile.passes.train import Fields, fields
from nmcompile.recipes import PRESETS, pruning_passes, training_passes
from nmcompile.request import MAX_LENGTH, check_paths
from nmcompile.sizes import Model
from nmcompile.source_form import in_source_form
from nmcompile.stages import PrunePasses, Runner, canonicalise, prune
from nmcompile.tensorinfo import TensorInfo

if TYPE_CHECKING:
    from nmcompile.torch import Module

Place = str | os.PathLike[str]
ALL = 1 << 40  # samples
CALIBRATION = 256  # samples that pruning is fitted to


@dataclass(frozen=True)
class Training:
    """What `train` did. output: the sparse model. loss_pruned, loss_trained: on held-out samples, by the distillation
    loss. sparsity: realised zeros by layer. history: stages and steps, each with its loss and seconds. graph: in
    canonical form. model: what is written, the graph that came where its initializers can hold the weights."""

    output: Path | None
    loss_pruned: float
    loss_trained: float
    sparsity: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    seconds: float
    samples: int
    graph: gs.Graph = field(repr=False, compare=False)
    model: gs.Graph = field(repr=False, compare=False)

    @property
    def zeros(self) -> float:
        """The mean of the layers' shares."""
        return sum(self.sparsity.values()) / max(len(self.sparsity), 1)


class Asked(Fields, total=False):
    """What `train` takes by name beside its data: how to read them, what is pruned, and where to write what."""

    tokenizer: Place | None
    max_length: int | None
    sparsity: float | None
    pattern: str | None
    solver: str | None
    history: Place | None
    resume: Place | None


def train(
    model: Model, output: Place | None = None, *, data: Source | Data, progress: Progress | None = None,
    **asked: Unpack[Asked],
) -> Training:  # fmt: skip
    """Prune a model and distil the dense one into what is left; write it as ONNX.

    model: path, ModelProto or gs.Graph; never modified. data: samples of the model's inputs, unlabelled, as many as
    there are (texts with tokenizer=..., feeds, .npz); every sixteenth is held out. labels: the field of the samples
    that holds their class, a number (of answers: start,end; where the model scores tokens: a number for each, -100 for
    none); then what the model gets wrong counts too. sparsity and pattern as in `compile`. budget="60m" (of pruning
    and training together), masks="fixed" and others are those of nmcompile.passes.Train. history: a file of JSON
    lines. resume: a folder of checkpoints; called again with the same arguments, an interrupted training goes on from
    there. The file that is written is the model with other weights, zeros where the masks are; where these cannot be
    put back into its initializers, it is in canonical form, with the same inputs and outputs, and `notes` say why.
    Raises NmcompileError for what the user can mend; then nothing is written.
    """
    start, tell, history = time.perf_counter(), progress or (lambda *_: None), asked.get("history")
    check_paths({"-o": output, "--history": history},
                {"the model": model, "--data": data, "--tokenizer": asked.get("tokenizer")}, engine=False)  # fmt: skip
    passes = _passes(asked)
    tell("reading the model", 0, 1)
    given = g.admit(model)
    samples = _samples(given, data, asked)
    inputs = samples.without(fields(asked.get("labels") or ""))
    source = g.separate_dims(given, inputs)
    resume, few = asked.get("resume"), replace(inputs, rows=inputs.rows[:CALIBRATION])
    runner = Runner(Calibration(few, tell, None if resume is None else Path(resume), samples), progress=tell)
    pruned = prune(canonicalise(source, runner), passes, runner)
    report = pruned.ran[-1].report
    records = {} if report.records is None else report.records.layers
    told = report.detail.get("training")
    if not isinstance(told, Mapping):
        raise PassError(f"nothing was trained: {next(iter(report.notes), 'no layer was pruned')}")
    found = Training(
        None if output is None else Path(output), told["loss pruned"], told["loss trained"],
        {name: record.sparsity for name, record in records.items()}, tuple(told["history"]),
        report.notes, time.perf_counter() - start, samples.samples, pruned.graph, pruned.graph,
    )  # fmt: skip
    if first():
        found = _in_source_form(found, given, lambda graph: canonicalise(g.separate_dims(graph, inputs), runner).graph)
        _write(found, history)
    return found


def _in_source_form(found: Training, source: gs.Graph, canonical: Callable[[gs.Graph], gs.Graph]) -> Training:
    """To be written as the graph that came; in canonical form, with a note, where that cannot hold the weights."""
    try:
        return replace(found, model=in_source_form(source, found.graph, canonical))
    except GraphError as error:
        note = f"written in nmcompile's canonical form, opset {found.graph.opset}: {error}"
        return replace(found, notes=(*found.notes, note))


def first() -> bool:
    """Whether this process writes and tells: of several that torchrun has started, the first alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK") == "0"


def _samples(source: gs.Graph, data: Source | Data, asked: Asked) -> Data:
    """All samples, checked; NmcompileError for those that do not fit the model."""
    tokenizer, infos = asked.get("tokenizer"), input_roles.inputs(source)
    named = fields(asked.get("labels") or "")
    rows = infos[0].shape[0] if infos and infos[0].shape else "batch"
    of_samples = sum(len(tensor.shape or ()) == 2 for tensor in source.outputs)  # scores of them: a number is a label
    tokens = next((info.shape[1:] for info in infos if len(info.shape) == 2), ()) if of_samples < len(named) else ()
    for label in named:
        if label in {info.name for info in infos}:
            raise PassError(f"'{label}' is an input of the model; give the labels another name in the data")
        infos = (*infos, TensorInfo(label, np.dtype(np.int64), (rows, *tokens)))
    samples = data if isinstance(data, Data) else open_data(
        data, infos, tokenizer=None if tokenizer is None else Path(tokenizer),
        max_length=asked.get("max_length") or MAX_LENGTH, limit=ALL)  # fmt: skip
    check_ids(samples)
    return samples


def _passes(asked: Asked) -> PrunePasses:
    """The passes that pruning takes, the last of them trains; PassError where nothing would be pruned."""
    preset = PRESETS["default"]
    solver = asked.get("solver") or preset.solver
    usual = pruning_passes(asked.get("pattern") or "2x4", asked.get("sparsity"), solver, preset.options)
    if not usual:
        raise PassError("nothing would be pruned, so there is nothing to train; give --sparsity, for example 0.8")
    fields = {key: value for key, value in asked.items() if key in Fields.__annotations__ and value is not None}
    before, trains = training_passes(usual, cast("Fields", fields))
    trains.check()
    return PrunePasses.of([*before, trains])


def _write(found: Training, history: Place | None) -> None:
    """The model and the history, all or nothing."""
    with pending() as files:
        if found.output is not None:
            path = real_path(found.output)
            folder = files.folder(path.parent)
            g.save(found.model, folder / path.name)
            for name in (f"{path.name}.data", path.name):  # the file that names the other one last
                if name in os.listdir(folder):
                    files.move(folder / name, path.with_name(name))
        if history is not None:
            lines = "".join(json.dumps(entry) + "\n" for entry in found.history)
            files.place(real_path(history), ".history").write_text(lines, "utf-8")
        files.publish()


def torch_module(model: Model, keep: tuple[str, ...] = ()) -> Module:
    """A model in any form as a torch module, in canonical form; keep: names of tensors to be had beside the outputs.
    UnsupportedError without torch, and for an operator that has no gradient."""
    from nmcompile.pipeline import Pipeline
    from nmcompile.recipes import canonical_passes
    from nmcompile.torch import Module

    graph, _ = Pipeline(canonical_passes()).run(g.admit(model))
    return Module(graph, keep)
