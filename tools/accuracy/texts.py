"""Pairs of paragraphs that belong together: the first two of docstrings, of the standard library or of packages."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.stdlib_text import SKIPPED

LEAST, MOST = 30, 600  # characters of a paragraph


def standard_library() -> list[str]:
    """Names of the modules whose docstrings are read."""
    return [name for name in sorted(sys.stdlib_module_names - SKIPPED) if not name.startswith("_")]


def pairs(packages: Iterable[str], seed: int = 0) -> list[tuple[str, str]]:
    """(first paragraph, second paragraph) of docstrings of public classes, functions and methods, each once, shuffled.

    Packages are read with their sub-modules; what cannot be imported is passed over.
    """
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages say of attributes that are looked at
        for text in (text for name in packages for text in _docstrings(name)):
            parts = [" ".join(part.split()) for part in text.split("\n\n")]
            if len(parts) > 1 and all(LEAST <= len(part) <= MOST for part in parts[:2]) and ">>>" not in parts[1]:
                found.setdefault(parts[0], parts[1])
    seconds = set()
    unique = []
    for first, second in sorted(found.items()):
        if second not in seconds:  # two firsts with one second could not be told apart
            seconds.add(second)
            unique.append((first, second))
    random.Random(seed).shuffle(unique)
    return unique


def _docstrings(package: str) -> Iterator[str]:
    for module in _modules(package):
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or not str(getattr(value, "__module__", "")).startswith(package.split(".")[0]):
                continue
            if inspect.isclass(value):
                members = [member for name, member in sorted(vars(value).items()) if not name.startswith("_")]
                yield from _texts([value, *members])
            elif inspect.isroutine(value):
                yield from _texts([value])


def _texts(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        text = getattr(value, "__doc__", None)
        if isinstance(text, str) and not isinstance(value, (str, bytes, int, float)):
            yield inspect.cleandoc(text)


def _modules(package: str) -> Iterator[types.ModuleType]:
    names = [package]
    root = _imported(package)
    if root is not None and hasattr(root, "__path__"):
        names += [info.name for info in pkgutil.iter_modules(root.__path__, f"{package}.")
                  if not info.name.rsplit(".", 1)[-1].startswith("_")]  # fmt: skip
    for name in names:
        module = _imported(name)
        if module is not None:
            yield module


def _imported(name: str) -> types.ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except BaseException:  # modules of other platforms, and those that exit on import
        return None


def texts_of(path: Path) -> list[str]:
    """The texts of a file of JSON lines {"text": ...}."""
    return [str(json.loads(line)["text"]) for line in path.read_text("utf-8").splitlines()]
