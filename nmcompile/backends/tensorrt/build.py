"""Builds engines in a process of their own: TensorRT may live in another environment, and may crash."""

from __future__ import annotations

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
from nmcompile.errors import NmcompileError, NoDeviceError
from nmcompile.files import cache_folder, write

Progress = Callable[[str, int, int], None]
LACKING = ("no-gpu", "no-tensorrt")  # kinds of errors that another machine does not have
FORMAT = 1


def installed_version() -> str | None:
    """The version of TensorRT in this environment, without importing it."""
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def probe(python: str | None) -> dict[str, Any]:
    """GPU and TensorRT of an interpreter (None: this one), as the worker sees them. NoDeviceError: one is lacking."""
    return _ask([python or sys.executable, worker.__file__, "--probe"], lambda *_: None)


def build(recipe: Path, python: str | None = None, plan: Path | None = None, tell: Progress | None = None) -> Path:
    """Build the engine of a recipe and write it with its description; the plan's path.

    NoDeviceError: no GPU or no TensorRT here. NmcompileError: what the builder says, in one line.
    """
    command = [python or sys.executable, worker.__file__, str(recipe)]
    if plan is not None:
        command += ["-o", str(plan)]
    with suppress(OSError):  # builds without it take longer, no more
        cache_folder().mkdir(parents=True, exist_ok=True)
        command += ["--timing-cache", str(cache_folder() / "tensorrt.timing")]
    result = _ask(command, tell or (lambda *_: None))
    engine = Path(result["engine"])
    try:
        given = json.loads(recipe.read_text())
        describe(engine, given, result)
    except BaseException:
        engine.unlink(missing_ok=True)
        raise
    return engine


def description_path(engine: Path) -> Path:
    """Where the description of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def describe(engine: Path, recipe: dict[str, Any], result: dict[str, Any]) -> None:
    """Write model.plan.json beside the engine: what is known of it beyond its bytes."""
    content = {
        "format": FORMAT, "target": "tensorrt", "nmcompile": recipe.get("nmcompile"), "source": recipe.get("source"),
        "profile": recipe.get("version"), "shapes": recipe.get("shapes"), **recipe.get("facts", {}),
        "tensorrt": result["tensorrt"], "gpu": result["gpu"], "kept": result["kept"], "variants": result["variants"],
        "warnings": result.get("warnings", []),
    }  # fmt: skip
    write(description_path(engine), json.dumps(content, indent=1) + "\n")


def read_description(engine: Path) -> dict[str, Any] | None:
    """What is known of an engine; None where there is no description of one."""
    try:
        content = json.loads(description_path(engine).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and content.get("target") == "tensorrt"
    return content if known else None


def _ask(command: list[str], tell: Progress) -> dict[str, Any]:
    """The worker's result. Its error messages go to a file, of which the last line serves if it dies without a word."""
    with TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(os.environ))
        except OSError as error:
            raise NmcompileError(f"cannot run {command[0]}: {error.strerror or error}; "
                                 "name a Python that has tensorrt with --trt-python") from None  # fmt: skip
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
