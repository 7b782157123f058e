"""What is asked of a compile: refused where it can never mean anything, and said where it will have no effect."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nmcompile.backends.tensorrt.engine import derived
from nmcompile.calibrate import Data
from nmcompile.contract import Pass, Report
from nmcompile.errors import NmcompileError, PassError, UnsupportedError
from nmcompile.files import check_outputs
from nmcompile.options import DataOptions, Options, Place, PruneOptions
from nmcompile.outputs import real_path
from nmcompile.prune import PruningPass
from nmcompile.recipes import PRESETS, Preset, pruning_passes, reduced, training_passes
from nmcompile.sizes import Model, external_files
from nmcompile.spec import parse_spec
from nmcompile.targets import Target

TARGETS = ("cpu", "tensorrt")
SEARCHED = 1 << 20  # bytes of a file of samples
MAX_LENGTH = 128  # tokens of a sample, unless it is given


def passes_for(
    options: PruneOptions, preset: Preset, sparsity: float | None, target: Target, made_up: bool
) -> list[Pass]:
    """The passes between canonical form and quantization. `sparsity`: that of the options, or what a size needs.
    made_up: the samples are, and nothing is fitted to them."""
    if options.passes is not None:
        return parse_spec(options.passes) if isinstance(options.passes, str) else list(options.passes)
    usual = "magnitude" if made_up else preset.solver
    solver = options.solver or usual
    # to name the solver that a preset takes is to take the preset
    extra = preset.options if solver == preset.solver else {}
    pattern = _gpu_pattern(options.pattern, options.size) if target.name == "tensorrt" else options.pattern
    passes = pruning_passes(pattern, sparsity, solver, extra, target.multiple)
    if options.train is None:
        return passes
    if not passes or made_up:
        raise PassError("train takes zeros to train, and samples: give --sparsity or --pattern, and --calibration")
    before, trains = training_passes(passes, {"budget": options.train})
    trains.check()
    return [*before, trains]


def _gpu_pattern(pattern: str | None, size: str | None) -> str:
    """The zeros that TensorRT has products for, unless none are wanted."""
    if size is not None or pattern not in (None, "2:4", "dense"):
        raise UnsupportedError(f"TensorRT runs 2:4 zeros only, not {pattern or f'size {size}'}; leave it out")
    return pattern or "2:4"


def check_options(options: Options) -> Preset:
    """The preset; UnsupportedError for a choice that there is not, or not for this target."""
    target, preset, require = options.target.target, options.preset, options.target.require
    if target not in TARGETS:
        raise UnsupportedError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    if isinstance(preset, str) and preset not in PRESETS:
        raise UnsupportedError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    if require not in (None, "native"):
        raise UnsupportedError(f"require {require!r} is not known; the only requirement is native")
    if target == "cpu" and options.target.engine:
        raise UnsupportedError("options of an engine are for target tensorrt; leave them out for the CPU")
    if require == "native" and target != "cpu":
        raise UnsupportedError("native is a requirement on plans for the CPU; leave it out for target tensorrt")
    chosen = PRESETS[preset] if isinstance(preset, str) else preset
    return reduced(chosen, target) if options.quantize.reduce_range else chosen


def check_files(options: Options, model: Model, output: Place | None, tuning: Place | None) -> None:
    """Refuse at once what could not be written at the end. tuning: a table that may be written."""
    check_paths({"-o": output, "--emit-onnx": options.write.emit_onnx, "--report": options.write.report,
                 "--tuning": None if tuning == "off" else tuning},
                {"the model": model, **external_files(model), "--calibration": options.data.calibration,
                 "--tokenizer": options.data.tokenizer}, engine=options.target.target == "tensorrt")  # fmt: skip


def check_paths(
    written: Mapping[str, str | os.PathLike[str] | None], read: Mapping[str, object], engine: bool
) -> None:
    """Refuse at once what could not be written at the end. engine: files are written beside "-o" too."""
    outputs = {name: Path(path) for name, path in written.items() if path is not None}
    sources = {name: Path(path) for name, path in read.items() if isinstance(path, (str, os.PathLike))}
    check_outputs(outputs, sources)
    if "--emit-onnx" in outputs:
        emitted = outputs["--emit-onnx"]
        beside = real_path(emitted).with_name(f"{real_path(emitted).name}.data")
        for name, path in (*outputs.items(), *sources.items()):
            if real_path(path).absolute() == beside.absolute():
                raise NmcompileError(f"{name} is {path}, where the weights of {emitted} go; give another name")
    if engine and "-o" in outputs:
        plan = outputs.pop("-o")
        _check_derived(plan, *outputs.values(), *sources.values())
        check_outputs({f"{path.name}, which is written beside the plan": path for path in derived(plan)})


def _check_derived(output: Path, *others: Path) -> None:
    """Refuse where a file that lies beside an engine is another one that is read or written."""
    taken = {other.resolve() for other in others}
    for path in derived(output):
        if path.resolve() in taken:
            raise NmcompileError(f"{path} is written beside {output}; give another name to one of them")


# ---- what has no effect ------------------------------------------------------------------------------------------


def without_effect(options: Options, passes: Sequence[Pass], data: Data) -> list[str]:
    """A note for each option that changes nothing about this compile."""
    return [*_idle_pruning(options.prune, passes), *_idle_data(options.data, data),
            *(["tuning has no effect: it is for plans for the CPU"]
              if options.target.tuning is not None and options.target.target != "cpu" else [])]  # fmt: skip


def _idle_pruning(asked: PruneOptions, passes: Sequence[Pass]) -> list[str]:
    prunes = [pass_ for pass_ in passes if isinstance(pass_, PruningPass)]
    notes = []
    if asked.solver is not None and asked.passes is not None:
        notes.append(f"solver {asked.solver} has no effect: the passes that were given name their own")
    elif asked.solver is not None and not prunes:
        notes.append(f"solver {asked.solver} has no effect: nothing is pruned; give --sparsity or --pattern")
    if asked.sparsity == 0 and asked.pattern != "dense":
        notes.append("nothing is pruned: the share of zeros that was asked for is 0")
    elif asked.size is not None and not prunes:
        notes.append(f"nothing is pruned for size {asked.size}: the plan is as small without zeros")
    if asked.checkpoints is not None and not any(_fits(pass_) for pass_ in prunes):
        notes.append(f"checkpoints {asked.checkpoints} has no effect: only pruning by obs or admm is kept there")
    return notes


def _idle_data(asked: DataOptions, data: Data) -> list[str]:
    source, tokenizer, max_length = asked.calibration, asked.tokenizer, asked.max_length
    notes = []
    texts = _texts(source)
    if tokenizer is not None and texts is False:
        notes.append(f"tokenizer {tokenizer} has no effect: the calibration data hold no texts")
    if max_length is not None and (isinstance(source, Data) or _arrays(source)):
        notes.append(f"max-length {max_length} has no effect: it cuts texts and lists of tokens, and the calibration "
                     "data are arrays")  # fmt: skip
    elif max_length is not None and data.synthetic and not _free(data):
        notes.append(f"max-length {max_length} has no effect: the model's inputs have one length")
    return notes


def _fits(pass_: PruningPass) -> bool:
    return pass_.fits and pass_.plan.zeros


def _free(data: Data) -> bool:
    return any(isinstance(dim, str) for info in data.inputs for dim in info.shape[1:])


def _arrays(source: object) -> bool:
    """Whether a source holds arrays, which nothing cuts."""
    return isinstance(source, (str, os.PathLike)) and (Path(source).suffix == ".npz" or Path(source).is_dir())


def _texts(source: object) -> bool | None:
    """Whether calibration data hold texts; None where that cannot be told without reading them."""
    if source is None or isinstance(source, Data) or _arrays(source):
        return False
    if not isinstance(source, (str, os.PathLike)):
        return any("text" in item for item in source if isinstance(item, Mapping)) if isinstance(source, list) else None
    with Path(source).open("rb") as stream:
        return b'"text"' in stream.read(SEARCHED)


def pruning_note(passes: Iterable[Pass], changed: Sequence[str], told: Iterable[str]) -> list[str]:
    """What to say where pruning was asked for and has changed no layer, unless the passes have told so."""
    asked = any(isinstance(pass_, PruningPass) for pass_ in passes)
    if not asked or changed or any(note.startswith("nothing was pruned") for note in told):
        return []
    return ["nothing was pruned: every linear layer is kept dense, for the reasons that are told"]


def attention_note(asked: str | None, log: Iterable[tuple[str, Report, float]]) -> list[str]:
    """What to say where a form of attention was asked for and none was found, from the passes that ran."""
    found = [str(report.detail.get("matched", "")) for name, report, _ in log if name.startswith("fuse-attention")]
    if asked is None or any(not text.startswith("0/") for text in found if text):
        return []
    return [f"attention {asked} has no effect: no attention was found in the model that it could apply to"]
