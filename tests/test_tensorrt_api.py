"""No version of TensorRT lacks a name that the worker uses there; the worker needs but Python 3.8 and tensorrt."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Script, load
from tensorrt_names import TABLES, table

from nmcompile.backends.tensorrt import cuda_driver, worker

SOURCE = Path(worker.__file__).read_text()
TREE = ast.parse(SOURCE)
NAMES = {  # what the worker calls its objects
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "error": "ParserError", "profile": "IOptimizationProfile", "timings": "ITimingCache", "runtime": "Runtime",
    "engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector", "tensor": "ITensor",
}  # fmt: skip
GUARDED = {"ParserError.node_name", "ParserError.node_operator"}  # asked for first
ERRORS = {"strerror", "kind"}  # of OSError and Failure, also called error


@pytest.mark.parametrize(("profile", "strong"), [("8.6", False), ("10", False), ("10", True), ("11", True)])
def test_a_whole_run_touches_nothing_that_a_version_lacks(
    profile: str, strong: bool, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake raises AttributeError for names outside the version's table, which would end in status 1."""
    for name in worker.VARIANTS:
        (tmp_path / f"m.{name}.onnx").touch()
    recipe = {
        "format": 1, "version": profile, "strong": strong, "plan": "m.plan", "workspace": 1 << 20, "level": 3,
        "models": {name: f"m.{name}.onnx" for name in worker.VARIANTS}, "timing_cache": "cache", "repeats": 2,
        "shapes": {"x": {"min": [1, 4], "opt": [2, 4], "max": [4, 4]}},
    }  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(recipe))
    monkeypatch.setitem(sys.modules, "tensorrt", load(Script(profile=profile, cuda=driver)))
    lines: list[Any] = []
    status = worker.main([str(tmp_path / "m.json"), "--cuda", driver], lines.append, worker.Files())
    assert status == 0 and lines[-1]["result"]["warnings"] == [], lines[-1]


@pytest.mark.parametrize("profile", list(TABLES))
def test_the_fake_has_its_versions_names_and_no_others(profile: str) -> None:
    fake, rows = load(Script(profile=profile)), table(profile)
    for name, row in rows["classes"].items():
        assert all(hasattr(getattr(fake, name), attribute) for attribute in row)
    for name, members in rows["enums"].items():
        assert {member: int(getattr(fake, name)[member]) for member in members} == members
    gone = {"8.6": "BuilderFlag.STRIP_PLAN", "10": "IBuilderConfig.max_workspace_size", "11": "BuilderFlag.INT8"}
    kind, name = gone[profile].split(".")
    assert not hasattr(getattr(fake, kind), name) and not hasattr(fake, "init_libnvinfer_plugins")
    with pytest.raises(AttributeError):
        fake.IBuilderConfig().max_workspace = 1
    with pytest.raises(AttributeError):
        fake.IBuilderConfig().platform_has_fast_int8()


def chains() -> Iterator[list[str]]:
    """a.b.c in the source, as ["a", "b", "c"]; self.a.b begins with a."""
    for node in ast.walk(TREE):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and parts:
            yield parts if inner.id in ("self", "tools") and len(parts) > 1 else [inner.id, *parts]


def test_names_of_the_module_are_in_every_version() -> None:
    used = {tuple(chain[1:3]) for chain in chains() if chain[0] == "trt"}
    assert ("MemoryPoolType", "WORKSPACE") in used and ("Builder",) in used and ("TensorIOMode", "INPUT") in used
    for profile in TABLES:
        rows = table(profile)
        for name, *rest in used - {("__version__",)}:
            assert name in rows["classes"] or name in rows["enums"], f"{profile} has no {name}"
            known = {*rows["classes"].get(name, ()), *rows["enums"].get(name, ())}
            assert not rest or rest[0] in known or rest[0].startswith("__"), f"{profile}: {name} has no {rest[0]}"


def test_attributes_of_objects_are_in_every_version() -> None:
    used = {f"{NAMES[chain[0]]}.{chain[1]}" for chain in chains() if chain[0] in NAMES} - GUARDED
    used = {name for name in used if not name.startswith("ParserError") or name.split(".")[1] not in ERRORS}
    assert {"OnnxParser.parse_from_file", "IExecutionContext.execute_async_v3", "ICudaEngine.num_io_tensors"} <= used
    for profile in TABLES:
        known = {f"{kind}.{name}" for kind, row in table(profile)["classes"].items() for name in row}
        assert used <= known, f"{profile} lacks {used - known}"
    assert all(f'"{name.split(".")[1]}"' in SOURCE or name == "ParserError.node_operator" for name in GUARDED)


def test_names_in_strings_are_in_some_version() -> None:
    """Flags, types and severities are asked for by name; each must exist somewhere."""
    texts = {node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used = {text for text in texts if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", text)}
    assert {"SPARSE_WEIGHTS", "STRONGLY_TYPED", "EXPLICIT_BATCH", "FP16", "INT8", "BF16"} <= used
    known = {name for profile in TABLES for members in table(profile)["enums"].values() for name in members}
    assert used <= known | set(table("10")["classes"]["ILogger"]), used - known


def test_the_worker_is_python_3_8_and_imports_little() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))
    driver = Path(cuda_driver.__file__).read_text("utf-8")
    beside = ast.parse(driver, feature_version=(3, 8))
    imported = {name.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    own = {"cuda_driver", "nmcompile.backends.tensorrt.cuda_driver"}
    imported |= {name.name for node in ast.walk(beside) if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in imported - own} <= sys.stdlib_module_names | {"tensorrt"}
    at_the_top = {name.name for node in TREE.body if isinstance(node, ast.Import) for name in node.names}
    assert "tensorrt" not in at_the_top, "a process without a driver may crash on it"
