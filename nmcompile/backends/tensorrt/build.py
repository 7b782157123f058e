"""Builds engines in a process of their own: TensorRT may live in another environment, and may crash."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nmcompile.backends.tensorrt import worker
from nmcompile.errors import NmcompileError, NoDeviceError, PlanError
from nmcompile.files import cache_folder, write
from nmcompile.regular_file import open_regular

Progress = Callable[[str, int, int], None]
LACKING = ("no-gpu", "no-tensorrt")  # kinds of errors that another machine does not have
FORMAT = 1
MAX_DESCRIPTION_BYTES = 16 << 20  # a longer one is cut, and then none
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean")


def installed_version(python: str | None = None) -> str | None:
    """The version of TensorRT in the environment of an interpreter (None: this one), without importing it.

    NmcompileError: the interpreter does not run.
    """
    if python is None:
        return next((found for found in map(_installed, PACKAGES) if found is not None), None)
    code = ("import importlib.metadata as m\n"
            f"print(next((d.version for n in {PACKAGES!r} for d in m.distributions() if d.metadata['Name'] == n), ''))")
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_python(python, error) from None
    return done.stdout.strip() or None


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _no_python(python: str, error: Exception) -> NmcompileError:
    why = getattr(error, "strerror", None) or type(error).__name__
    return NmcompileError(f"cannot run {python}: {why}; name a Python that has tensorrt with --trt-python")


def probe(python: str | None) -> dict[str, Any]:
    """GPU and TensorRT of an interpreter (None: this one), as the worker sees them. NoDeviceError: there is no GPU."""
    return _ask([python or sys.executable, worker.__file__, "--probe"], lambda *_: None)


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe. NmcompileError: it is none, or a graph beside it is not the one it was written with."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise NmcompileError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    models = content.get("models") if isinstance(content, dict) else None
    facts = content.get("facts", {}) if isinstance(content, dict) else None
    if not isinstance(models, dict) or not isinstance(facts, dict):
        raise NmcompileError(f"{path} is not a recipe of nmcompile; write one with --target tensorrt --no-build")
    for name, digest in facts.get("sha256", {}).items():
        file = path.parent / name
        if not file.is_file():
            raise NmcompileError(f"there is no {file}, which the recipe {path} builds from; bring it along")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise NmcompileError(f"{file} is not the graph that the recipe {path} was written with; compile again")
    return dict(content)


def build(recipe: Path, python: str | None = None, plan: Path | None = None, tell: Progress | None = None) -> Path:
    """Build the engine of a recipe and write it with its description; the plan's path.

    NoDeviceError: no GPU or no TensorRT here. NmcompileError: what is wrong with the recipe, or what the builder says.
    """
    content = read_recipe(recipe)
    engine = plan or recipe.parent / str(content.get("plan", "model.plan"))
    partial = engine.with_name(f".{engine.name}.{os.getpid()}.built")
    command = [python or sys.executable, worker.__file__, str(recipe), "-o", str(partial)]
    with suppress(OSError):  # builds without it take longer, no more
        cache_folder().mkdir(parents=True, exist_ok=True)
        command += ["--timing-cache", str(cache_folder() / "tensorrt.timing")]
    try:
        result = _ask(command, tell or (lambda *_: None))
        write(description_path(engine), json.dumps(_description(content, result), indent=1) + "\n")
        os.replace(partial, engine)
    except OSError as error:
        raise NmcompileError(f"cannot write {engine}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return engine


def description_path(engine: Path) -> Path:
    """Where the description of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def _description(recipe: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What is known of an engine beyond its bytes: of the recipe's variants, the facts of the one that was kept."""
    facts = recipe.get("facts", {})
    by_variant = facts.get("variants", {})
    variants = {name: {**found, "loss": by_variant.get(name, {}).get("loss", {})}
                for name, found in result["variants"].items()}  # fmt: skip
    return {
        "format": FORMAT, "target": "tensorrt", "nmcompile": recipe.get("nmcompile"), "source": recipe.get("source"),
        "profile": recipe.get("version"), "shapes": recipe.get("shapes"), "inputs": facts.get("inputs", []),
        "outputs": facts.get("outputs", []), "assumes": facts.get("assumes", []),
        "tensorrt": result["tensorrt"], "gpu": result["gpu"],
        "kept": result["kept"], **by_variant.get(result["kept"], {}), "variants": variants,
        "timed": {"batch": result.get("batch"), "shapes": result.get("shapes")},
        "warnings": result.get("warnings", []), **({"roles": facts["roles"]} if "roles" in facts else {}),
    }  # fmt: skip


def read_description(engine: Path) -> dict[str, Any] | None:
    """What is known of an engine; None where there is no description of one. PlanError: it is damaged."""
    path = description_path(engine)
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(MAX_DESCRIPTION_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("target") != "tensorrt":
        return None
    try:
        names = {str(item["name"]) for item in (*content["inputs"], *content["outputs"])}
        sizes = [ranges[key] for ranges in (content["shapes"] or {}).values() for key in ("min", "opt", "max")]
        whole = (
            str(content["gpu"]["name"]) and all(isinstance(size, int) for size in content["gpu"]["sm"])
            and all(isinstance(size, int) for shape in sizes for size in shape)
            and set(content["shapes"] or {}) <= names and isinstance(content["variants"], dict)
            and isinstance(content["tensorrt"], str) and isinstance(content["kept"], str)
            and all(isinstance(layer[key], (str, int)) for layer in content.get("layers", ())
                    for key in ("name", "outputs", "inputs", "verdict", "why"))
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise PlanError(f"{path} is damaged; build the engine again")
    return content


def _ask(command: list[str], tell: Progress) -> dict[str, Any]:
    """The worker's result. Its error messages go to a file, of which the last line serves if it dies without a word."""
    with TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
        except OSError as error:
            raise _no_python(command[0], error) from None
        answer: dict[str, Any] = {}
        with process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said = json.loads(line) if line.startswith("{") else {}
                    if "progress" in said:
                        tell(*said["progress"])
                    answer = said if "result" in said or "error" in said else answer
            except BaseException:
                process.terminate()  # it removes what it has half written
                process.wait()
                raise
        if "error" in answer:
            kind = NoDeviceError if answer.get("kind") in LACKING else NmcompileError
            raise kind(str(answer["error"]))
        if "result" not in answer:
            log.seek(0)
            lines = log.read().strip().splitlines()
            code = process.returncode
            why = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise NmcompileError(f"the builder's process {why}{': ' + lines[-1][:200] if lines else ''}")
    result: dict[str, Any] = answer["result"]
    return result
