"""From a pruned graph to a TensorRT engine: two graphs of the same weights, a recipe, and the faster of two engines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.tensorrt.build import build, description_path, installed_version, probe, read_description
from nmcompile.backends.tensorrt.profiles import Profile, profile
from nmcompile.backends.tensorrt.recipe import EngineOptions, Recipe, names_beside, recipe_path
from nmcompile.backends.tensorrt.shapes import Ranges
from nmcompile.compare import Difference
from nmcompile.errors import NmcompileError, NoDeviceError, UnsupportedError
from nmcompile.outputs import Outputs
from nmcompile.tensorinfo import TensorInfo

Loss = Mapping[str, Difference]
Infos = Sequence[Mapping[str, Any]]
Stated = Mapping[str, Mapping[str, str]]  # roles of inputs, as plans state them
NAMES: tuple[str, ...] = ("sparse", "mixed", "dense")
NEWEST = "10"  # the profile where no TensorRT is at hand: strongly typed, which 11 reads too


@dataclass(frozen=True)
class Engine:
    """What became of an engine. built: it lies at the plan's path, with its description beside it; otherwise the recipe
    and its ONNX files lie there, and `why` says what this machine lacks. kept: the variant (sparse, dense, mixed), loss
    what its graph loses in onnxruntime. back: the pruned layers that have their dense weights in it."""

    built: bool
    recipe: Path | None
    why: str = ""
    kept: str = ""
    back: Sequence[str] = ()
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


@dataclass(frozen=True)
class Facts:
    """Of one variant of an engine's graph, what its description repeats. assumes: what it assumes of its inputs."""

    layers: Sequence[Mapping[str, Any]]
    passes: Sequence[str]
    assumes: Sequence[Any]
    loss: Loss


@dataclass(frozen=True)
class Wanted:
    """An engine that is to be made.

    plan: where it goes; files: where all is written first. without: what this machine lacks to build it, "" nothing.
    source: fingerprint of the model, and its inputs and outputs as JSON; roles: of inputs whose names do not tell them.
    pruned: layers with fewer weights, whose dense ones `graph(names)` gives back.
    """

    plan: Path
    files: Outputs
    options: EngineOptions
    profile: Profile
    shapes: Ranges
    without: str
    source: tuple[str, Infos, Infos]
    pruned: Sequence[str]
    graph: Callable[[Sequence[str]], tuple[gs.Graph, Facts]]
    progress: Callable[[str, int, int], None]
    roles: Stated = field(default_factory=dict)


class Variants:
    """The graphs of one engine in a folder, with what each of them loses and how its layers will run."""

    def __init__(self, wanted: Wanted, folder: Path) -> None:
        self.wanted, self.folder = wanted, folder
        self.back: dict[str, Sequence[str]] = {}
        self.facts: dict[str, Facts] = {}
        self.models: dict[str, str] = {}

    def emit(self, name: str, back: Sequence[str] = (), same_as: str | None = None) -> None:
        """Write the graph whose layers `back` have their dense weights; `same_as`: another variant's file serves."""
        self.back[name] = back
        graph, self.facts[name] = self.wanted.graph(back)
        path = names_beside(self.folder / self.wanted.plan.name, [name])[name]
        if same_as is None:
            g.save(graph, path)
        self.models[name] = path.name if same_as is None else self.models[same_as]

    def recipe(self) -> Path:
        """Write the recipe of all variants so far, the sparse one first."""
        wanted, (fingerprint, inputs, outputs) = self.wanted, self.wanted.source
        models = {name: self.models[name] for name in NAMES if name in self.models}
        digests = {file: _digest(self.folder / file) for file in dict.fromkeys(models.values())}
        assumes = list(list(self.facts.values())[-1].assumes)
        variants = {name: {"layers": list(made.layers), "passes": list(made.passes),
                           "loss": {key: item.to_json() for key, item in made.loss.items()}}
                    for name, made in self.facts.items()}  # fmt: skip
        facts = {"inputs": inputs, "outputs": outputs, "assumes": assumes, "variants": variants, "sha256": digests,
                 **({"roles": wanted.roles} if wanted.roles else {})}  # fmt: skip
        path = recipe_path(self.folder / wanted.plan.name)
        Recipe(path, wanted.plan, wanted.profile.name, wanted.profile.strong, models, wanted.shapes, wanted.options,
               fingerprint, facts).write(nmcompile.__version__)  # fmt: skip
        return path

    @property
    def first(self) -> str:
        return "sparse" if "sparse" in self.facts else "dense"

    def elsewhere(self, why: str) -> Engine:
        """What there is where no engine could be built: graphs and recipe beside the plan."""
        kept = _for_elsewhere(self.wanted.files, self.folder, self.wanted.plan)
        return Engine(False, kept, why, self.first, back=self.back[self.first], loss=self.facts[self.first].loss)


def make(wanted: Wanted) -> Engine:
    """Write graphs and recipe, and build the engine unless `without` says what this machine lacks.

    The sparse engine is built beside a dense one of the same model, both are timed and the faster stays; layers that
    were found eligible but ran dense get their dense weights back, which costs no time. All is written where `files`
    says and moved beside the plan when that publishes; where the builder fails, graphs and recipe are kept.
    """
    files, plan, python = wanted.files, wanted.plan, wanted.options.python
    folder = files.folder(plan.parent)
    variants = _emitted(wanted, folder)
    recipe = variants.recipe()
    if wanted.without:
        return variants.elsewhere(wanted.without)
    built = folder / plan.name
    try:
        build(recipe, python, built, wanted.progress)
    except NoDeviceError as error:
        return variants.elsewhere(str(error))
    except NmcompileError as error:
        left = _for_elsewhere(files, folder, plan)
        files.publish()
        raise NmcompileError(f"{error} (the graphs are kept: nmcompile build-engine {left})") from None
    idle = _idle(_described(built), wanted.pruned)
    if _described(built)["kept"] == "sparse" and idle:
        variants.emit("mixed", idle)
        with suppress(NmcompileError):  # the sparse engine is there already
            build(variants.recipe(), python, built, wanted.progress)
    found = _described(built)
    kept = str(found["kept"])
    files.move(description_path(built), description_path(plan))
    files.move(built, plan)
    return Engine(True, None, kept=kept, back=variants.back[kept], description=found, loss=variants.facts[kept].loss)


def _emitted(wanted: Wanted, folder: Path) -> Variants:
    """The variants to begin with."""
    variants = Variants(wanted, folder)
    if wanted.pruned:
        variants.emit("dense", wanted.pruned)
        variants.emit("sparse")  # last: what is reported is the sparse one
    elif any(layer["pattern"] and layer["int8"] for layer in wanted.graph(())[1].layers):  # it came with its zeros
        variants.emit("sparse")
        variants.emit("dense", same_as="sparse")
    else:
        variants.emit("dense")
    return variants


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


def infos_json(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    """For recipes and descriptions."""
    return [{"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)} for info in infos]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(engine: Engine) -> dict[str, Any]:
    """For the report."""
    return {"built": engine.built, "recipe": None if engine.recipe is None else str(engine.recipe), "why": engine.why,
            "kept": engine.kept if engine.built else "", "description": dict(engine.description)}  # fmt: skip
