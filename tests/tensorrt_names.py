"""The names of TensorRT's Python bindings by version, and classes that have these names and no others.

Touching a name that a version lacks raises AttributeError; names without behaviour are functions that do nothing.
"""

from __future__ import annotations

import enum
import functools
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tensorrt"
TABLES = {"8.6": "8.6.0", "10": "10.16.1", "11": "11.4.0"}  # profile -> version of the table


def table(profile: str) -> dict[str, Any]:
    """{"version", "classes": {class: [attribute]}, "enums": {enum: {member: value}}} of the real bindings."""
    content: dict[str, Any] = json.loads((DATA / f"trt_api_{TABLES[profile]}.json").read_text())
    return content


class Enum(enum.Enum):
    """As pybind11 has them: an int only when asked."""

    def __int__(self) -> int:
        return int(self.value)


class Table(type):
    """Holds a class to its row of the table."""

    _row: frozenset[str]

    def __getattribute__(cls, name: str) -> Any:
        if not name.startswith("_") and name not in cls._row:
            raise AttributeError
        return super().__getattribute__(name)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_") or name not in cls._row:
            raise AttributeError(f"tensorrt.{cls.__name__} of this version has no {name}")
        return lambda *_: None


class Strict(metaclass=Table):
    """An object held to its class's row; private names are ours."""

    _row = frozenset[str]()
    _fake: Any  # the module

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            self._check(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self._check(name)
            self._fake._note(type(self).__name__, f"{name} =", [value])
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._check(name)
        return functools.partial(self._fake._note, type(self).__name__, name)

    def _check(self, name: str) -> None:
        kind = type(self)
        if name not in kind._row:
            raise AttributeError(f"an object of tensorrt.{kind.__name__} of this version has no {name}")
