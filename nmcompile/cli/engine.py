"""The options of TensorRT engines, and what the summary says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmcompile.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from nmcompile.backends.tensorrt.recipe import EngineOptions
    from nmcompile.compiler import Result

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def options(command: click.decorators.FC) -> click.decorators.FC:
    """Adds the options to a command; `taken` takes their values out again."""
    for option in reversed((
        click.option("--trt-version", type=click.Choice(["8.6", "10", "11"]),
                     help="TensorRT: the version to write for. Default: the one that is installed, else 10."),
        click.option("--shapes", multiple=True, metavar="MIN,OPT,MAX",
                     help="TensorRT: sizes to build for, 1x8,8x128,32x384 for all inputs or NAME=... for one."),
        click.option("--int8-outputs", type=click.Choice(["sparse", "all", "none"]), default="sparse",
                     show_default=True, help="TensorRT: layers that hand on 8 bits, which sparse products need."),
        click.option("--weights", type=click.Choice(["float", "int8"]), default="float", show_default=True,
                     help="TensorRT: how the graph stores quantized weights."),
        click.option("--trt-python", metavar="PYTHON", help="TensorRT: the Python that has it. Default: this one."),
        click.option("--workspace", metavar="SIZE", help="TensorRT: memory a layer may use, for example 4G."),
        click.option("--builder-level", type=click.IntRange(0, 5), help="TensorRT: how long it searches, 0 to 5."),
        click.option("--timing-cache", type=click.Path(path_type=Path), metavar="FILE",
                     help="TensorRT: times of kernels, for later builds. Default: in the user's cache folder."),
        click.option("--no-build", is_flag=True, help="TensorRT: write graph and recipe only."),
    )):  # fmt: skip
        command = option(command)
    return command


def taken(values: dict[str, Any], target: str) -> EngineOptions | None:
    """The engine's options out of a command's values, which lose them; None for the CPU, which takes none."""
    from nmcompile.backends.tensorrt.recipe import EngineOptions

    found = EngineOptions(
        version=values.pop("trt_version"), shapes=tuple(values.pop("shapes")), outputs=values.pop("int8_outputs"),
        weights=values.pop("weights"), python=values.pop("trt_python"), workspace=_bytes(values.pop("workspace")),
        level=values.pop("builder_level"), timing_cache=values.pop("timing_cache"), build=not values.pop("no_build"),
    )  # fmt: skip
    if target == "tensorrt":
        return found
    if found != EngineOptions():
        raise UnsupportedError("--shapes, --weights, --no-build and the like are for --target tensorrt; leave them out")
    return None


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    unit = text[-1:].lower() if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in UNITS or not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise InputError(f"workspace {text!r} is not a size; write for example 512M or 4G")
    return int(number) * UNITS[unit]


def layers(result: Result) -> list[str]:
    """How many layers will run how, and why."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in result.layers:
        groups.setdefault((str(layer["verdict"]), str(layer["why"])), []).append(str(layer["name"]))
    return [f"{len(names)} x {verdict}" + (f": {why}" if why else "") for (verdict, why), names in groups.items()]


def summary(result: Result) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) about the engine."""
    engine = result.engine
    if engine is None:
        return
    if not engine.built:
        folder = engine.recipe.parent if engine.recipe is not None else ""
        yield "engine", [f"not built: {engine.why}", f"to build it elsewhere, take {engine.recipe} and the .onnx files "
                         f"beside it ({folder}) there: nmcompile build-engine {engine.recipe}"]  # fmt: skip
        return
    yield "engine", list(described(engine.description))


def described(facts: Any) -> Iterator[str]:
    """What a build found, from the engine's description."""
    gpu = facts["gpu"]
    yield f"TensorRT {facts['tensorrt']}, {gpu['name']}; kept: {facts['kept']}"
    for variant, found in facts["variants"].items():
        ms = found.get("ms", {}).get("median")
        line = f"{variant}: " + ("not timed" if ms is None else f"{ms:.3g} ms")
        if found.get("eligible"):
            line += f", {len(found['chosen'])} of {len(found['eligible'])} eligible layers run sparse"
        yield line
    for warning, count in Counter(facts.get("warnings", ())).items():
        yield warning + (f" ({count} times)" if count > 1 else "")
