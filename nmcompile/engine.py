"""From a pruned graph to a TensorRT engine: two graphs of the same weights, a recipe, and the faster of two engines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import nmcompile
from nmcompile import graph as g
from nmcompile.backends.tensorrt.build import build, description_path, installed_version, probe, read_description
from nmcompile.backends.tensorrt.profiles import Profile, profile
from nmcompile.backends.tensorrt.recipe import EngineOptions, Recipe, names_beside, recipe_path
from nmcompile.backends.tensorrt.shapes import Ranges
from nmcompile.compare import Difference
from nmcompile.errors import NmcompileError, NoDeviceError, UnsupportedError
from nmcompile.job import Job
from nmcompile.outputs import Outputs
from nmcompile.targets import TensorrtTarget

Loss = Mapping[str, Difference]
NAMES: tuple[str, ...] = ("sparse", "mixed", "dense")
NEWEST = "10"  # the profile where no TensorRT is at hand: strongly typed, which 11 reads too


@dataclass(frozen=True)
class Engine:
    """What became of an engine. built: it lies at the plan's path, with its description beside it; otherwise the recipe
    and its ONNX files lie there, and `why` says what this machine lacks. kept: the variant (sparse, dense, mixed), loss
    what its graph loses in onnxruntime."""

    built: bool
    recipe: Path | None
    why: str = ""
    kept: str = ""
    description: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = field(default_factory=dict)


def choose_profile(options: EngineOptions) -> Profile:
    """Of the version that was asked for, of the TensorRT that will build, or of the newest."""
    if options.version is not None:
        return profile(options.version)
    found = installed_version(options.python)
    return profile(NEWEST if found is None else _generation(found))


def _generation(version: str) -> str:
    """10.16.1 -> 10; of the eighth only 8.6 has a profile."""
    return ".".join(version.split(".")[: 2 if version.startswith("8.") else 1])


def lacking(options: EngineOptions, chosen: Profile) -> str:
    """Why no engine can be built here, "" if one can; asked before the long work starts. UnsupportedError: TensorRT is
    of another generation than the graph will be written for."""
    if not options.build:
        return "it was not asked for"
    try:
        facts = probe(options.python)
    except NoDeviceError as error:
        return str(error)
    if facts["tensorrt"] is None:
        return str(facts["tensorrt_error"])
    if _generation(facts["tensorrt"]) != chosen.name:
        raise UnsupportedError(f"the graph would be written for TensorRT {chosen.name}, {facts['tensorrt']} is here; "
                               f"give --trt-version {_generation(facts['tensorrt'])}, or --no-build")  # fmt: skip
    return ""


def derived(plan: Path) -> list[Path]:
    """Every file beside the plan that may be written with it."""
    models = list(names_beside(plan, NAMES).values())
    return [*models, *(Path(f"{path}.data") for path in models), recipe_path(plan), description_path(plan)]


class Variants:
    """The graphs of one engine in a folder, with what each of them loses and how its layers will run."""

    def __init__(self, job: Job, target: TensorrtTarget, folder: Path, plan: Path, floating: Sequence[str],
                 loss: Callable[[], Loss]) -> None:  # fmt: skip
        self.job, self.target, self.folder, self.plan, self.floating = job, target, folder, plan, floating
        self._loss = loss
        self.losses: dict[str, Loss] = {}
        self.models: dict[str, str] = {}
        self._facts: dict[str, Any] = {}
        self._back: dict[str, Sequence[str]] = {}

    def emit(self, name: str, dense: Sequence[str], same_as: str | None = None) -> None:
        """Write the graph whose layers `dense` have their dense weights; `same_as`: another variant's file serves."""
        self.job.quantize(dense, self.floating)
        self._back[name] = dense
        self.losses[name] = self._loss() if same_as is None else self.losses[same_as]
        path = names_beside(self.folder / self.plan.name, [name])[name]
        if same_as is None:
            g.save(self.target.graph, path)
        self.models[name] = path.name if same_as is None else self.models[same_as]
        self._facts[name] = {
            "layers": list(self.target.layers), "passes": self.job.header["passes"],
            "loss": {key: item.to_json() for key, item in self.losses[name].items()},
        }  # fmt: skip

    def recipe(self, shapes: Ranges, options: EngineOptions) -> Path:
        """Write the recipe of all variants so far, the sparse one first."""
        job, chosen = self.job, self.target.profile
        models = {name: self.models[name] for name in NAMES if name in self.models}
        digests = {file: _digest(self.folder / file) for file in dict.fromkeys(models.values())}
        facts = {"inputs": _infos(g.inputs(job.source)), "outputs": _infos(g.outputs(job.source)),
                 "assumes": assumed(job), "variants": self._facts, "sha256": digests,
                 **({"roles": job.roles} if job.roles else {})}  # fmt: skip
        path = recipe_path(self.folder / self.plan.name)
        Recipe(path, self.plan, chosen.name, chosen.strong, models, shapes, options, job.fingerprint,
               facts).write(nmcompile.__version__)  # fmt: skip
        return path

    def settle(self, name: str) -> None:
        """Bring the job to the variant that was kept."""
        self.job.quantize(self._back[name], self.floating)


def assumed(job: Job) -> list[Any]:
    """What the graphs assume of their inputs, as SimplifyMasks has found."""
    found = [report.detail["assumes"] for _, report, _ in job.log if "assumes" in report.detail]
    return cast("list[Any]", found[-1]) if found else []


def make(
    job: Job,
    target: TensorrtTarget,
    options: EngineOptions,
    plan: Path,
    shapes: Ranges,
    held: Mapping[str, Any],
    loss: Callable[[], Loss],
    without: str,
    files: Outputs,
) -> Engine:
    """Write graphs and recipe, and build the engine unless `without` says what this machine lacks.

    held: the layers that an accuracy limit has taken back ("dense", "float"). loss(): what the graph that the target
    holds loses. The sparse engine is built beside a dense one of the same model, both are timed and the faster stays;
    layers that were found eligible but ran dense get their dense weights back, which costs no time. All is written
    where `files` says and moved beside the plan when that publishes; where the builder fails, graphs and recipe are
    kept.
    """
    folder = files.folder(plan.parent)
    dense, floating = held.get("dense", ()), held.get("float", ())
    variants = Variants(job, target, folder, plan, floating, loss)
    changed = [name for name in job.changed if name not in job.closed(dense)]
    if changed:
        variants.emit("dense", [*dense, *changed])
        variants.emit("sparse", dense)  # last: what is reported is the sparse one
    elif any(layer["pattern"] and layer["int8"] for layer in target.layers):  # it came with its zeros
        variants.emit("sparse", dense)
        variants.emit("dense", dense, same_as="sparse")
    else:
        variants.emit("dense", dense)
    first = "sparse" if "sparse" in variants.models else "dense"
    recipe = variants.recipe(shapes, options)
    if without:
        return Engine(False, _for_elsewhere(files, folder, plan), without, loss=variants.losses[first])
    built = folder / plan.name
    try:
        build(recipe, options.python, built, job.tell)
    except NoDeviceError as error:
        return Engine(False, _for_elsewhere(files, folder, plan), str(error), loss=variants.losses[first])
    except NmcompileError as error:
        kept = _for_elsewhere(files, folder, plan)
        files.publish()
        raise NmcompileError(f"{error} (the graphs are kept: nmcompile build-engine {kept})") from None
    idle = _idle(_described(built), changed)
    if _described(built)["kept"] == "sparse" and idle:
        variants.emit("mixed", [*dense, *idle])
        with suppress(NmcompileError):  # the sparse engine is there already
            build(variants.recipe(shapes, options), options.python, built, job.tell)
    found = _described(built)
    variants.settle(str(found["kept"]))
    files.move(description_path(built), description_path(plan))
    files.move(built, plan)
    return Engine(True, None, kept=str(found["kept"]), description=found, loss=variants.losses[str(found["kept"])])


def _for_elsewhere(files: Outputs, folder: Path, plan: Path) -> Path:
    """Let graphs and recipe be moved beside the plan, the recipe last: it names the others by their hash."""
    for path in derived(plan):
        if (folder / path.name).exists() and path != recipe_path(plan):
            files.move(folder / path.name, path)
    files.move(folder / recipe_path(plan).name, recipe_path(plan))
    return recipe_path(plan)


def _described(plan: Path) -> dict[str, Any]:
    found = read_description(plan)
    assert found is not None, "an engine is built with its description"
    return found


def _idle(found: Mapping[str, Any], changed: Sequence[str]) -> list[str]:
    """Pruned layers that TensorRT found eligible for sparse products and ran dense, by the names that it prints."""
    sparse = found["variants"].get("sparse", {})

    def named(name: str, key: str) -> bool:
        whole = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.]|_\d)")
        return any(whole.search(text) or f"{name}_myl" in text for text in sparse.get(key, ()))

    return [name for name in changed if named(name, "eligible") and not named(name, "chosen")]


def _infos(infos: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)} for info in infos]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(engine: Engine) -> dict[str, Any]:
    """For the report."""
    return {"built": engine.built, "recipe": None if engine.recipe is None else str(engine.recipe), "why": engine.why,
            "kept": engine.kept, "description": dict(engine.description)}  # fmt: skip
