"""Real English text that every Python has: docstrings of the standard library, for calibration and evaluation."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
import warnings

# Importing these opens windows, browsers or prints.
SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter", "lib2to3", "msilib", "winreg"}


def docstrings(seed: int = 0) -> list[str]:
    """Docstrings of public classes and functions, longer than 40 characters, each once, shuffled by `seed`."""
    found: list[str] = []
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # modules of other platforms
            continue
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or getattr(value, "__module__", "") != name:
                continue
            text = inspect.getdoc(value) if inspect.isclass(value) or inspect.isroutine(value) else None
            if text and len(text) > 40:
                found.append(text)
    texts = list(dict.fromkeys(found))
    random.Random(seed).shuffle(texts)
    return texts
