"""From a pruned graph to a TensorRT engine: two graphs of the same weights, a recipe, and the faster of two engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nmcompile
from nmcompile import graph as g
from nmcompile.backends.tensorrt.build import build, description_path, installed_version, probe, read_description
from nmcompile.backends.tensorrt.profiles import Profile, profile
from nmcompile.backends.tensorrt.recipe import EngineOptions, Recipe, names_beside, recipe_path
from nmcompile.backends.tensorrt.shapes import Ranges
from nmcompile.compare import Difference
from nmcompile.errors import NoDeviceError
from nmcompile.job import Job
from nmcompile.targets import TensorrtTarget

Loss = Mapping[str, Difference]
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
    found = installed_version() if options.python is None else None
    if options.python is not None:
        try:
            found = probe(options.python).get("tensorrt")
        except NoDeviceError:
            found = None
    if found is None:
        return profile(NEWEST)
    return profile("8.6" if found.startswith("8.") else found.split(".")[0])


def make(
    job: Job,
    target: TensorrtTarget,
    options: EngineOptions,
    plan: Path,
    shapes: Ranges,
    dense: Sequence[str],
    floating: Sequence[str],
    loss: Callable[[], Loss],
    unfinished: ExitStack,
) -> Engine:
    """Write graphs and recipe, and build the engine where TensorRT and a GPU are.

    `dense` and `floating`: layers that an accuracy limit has taken back. loss(): what the graph that the target holds
    loses. The sparse engine is built beside a dense one of the same model, both are timed and the faster stays; layers
    that were found eligible but not chosen for sparse products get their dense weights back, which costs no time.
    Leaves the job as the engine that was kept; removes what it wrote if it fails.
    """
    changed = [name for name in job.changed if name not in dense]
    files = names_beside(plan, ("sparse", "dense", "mixed"))
    path = recipe_path(plan)
    for file in (*files.values(), path, plan, description_path(plan)):
        if not file.exists():
            unfinished.callback(file.unlink, missing_ok=True)
    losses: dict[str, Loss] = {}

    def emit(variant: str, names: Sequence[str]) -> None:
        job.quantize(names, floating)
        losses[variant] = loss()
        g.save(target.graph, files[variant])

    def write(models: Mapping[str, str]) -> None:
        facts = {"inputs": _infos(g.inputs(job.source)), "outputs": _infos(g.outputs(job.source)),
                 "layers": list(target.layers), "passes": job.header["passes"],
                 "loss": {variant: {name: item.to_json() for name, item in found.items()}
                          for variant, found in losses.items()}}  # fmt: skip
        Recipe(path, plan, target.profile.name, target.profile.strong, models, shapes, options, job.fingerprint,
               facts).write(nmcompile.__version__)  # fmt: skip

    emit("dense", [*dense, *changed])
    models = {"dense": files["dense"].name}
    if changed:  # last: what is reported is the sparse one
        emit("sparse", dense)
        models = {"sparse": files["sparse"].name, **models}
    write(models)
    if not options.build:
        return Engine(False, path, "it was not asked for", loss=list(losses.values())[-1])
    try:
        build(path, options.python, plan, job.tell)
    except NoDeviceError as error:
        return Engine(False, path, str(error), loss=list(losses.values())[-1])
    found = _described(plan)
    idle = _idle(found, changed)
    if found["kept"] == "sparse" and idle:
        emit("mixed", [*dense, *idle])
        write({"mixed": files["mixed"].name, "sparse": files["sparse"].name})
        build(path, options.python, plan, job.tell)
        found = _described(plan)
    kept = str(found["kept"])
    back = {"dense": [*dense, *changed], "sparse": list(dense), "mixed": [*dense, *idle]}[kept]
    if kept != list(losses)[-1]:
        job.quantize(back, floating)
    for file in (*files.values(), path):
        file.unlink(missing_ok=True)
    return Engine(True, None, kept=kept, description=found, loss=losses[kept])


def _described(plan: Path) -> dict[str, Any]:
    found = read_description(plan)
    assert found is not None, "an engine is built with its description"
    return found


def _idle(found: Mapping[str, Any], changed: Sequence[str]) -> list[str]:
    """Pruned layers that TensorRT found eligible for sparse products and ran dense, by the names that it prints."""
    sparse = found["variants"].get("sparse", {})
    eligible, chosen = "\n".join(sparse.get("eligible", ())), "\n".join(sparse.get("chosen", ()))
    return [name for name in changed if name in eligible and name not in chosen]


def _infos(infos: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)} for info in infos]


def to_json(engine: Engine) -> dict[str, Any]:
    """For the report."""
    return {"built": engine.built, "recipe": None if engine.recipe is None else str(engine.recipe), "why": engine.why,
            "kept": engine.kept, "description": dict(engine.description)}  # fmt: skip
