"""What a fuzz target is, and what counts as a finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nmcompile.errors import NmcompileError

Attempt = Callable[[int, Path], str]


@dataclass(frozen=True)
class Target:
    """A reader under test.

    prepare: makes what all attempts start from in a folder (finds it there when it is not the first), and gives the
    attempt: a function of a seed and a folder. It builds the input of that seed, leaves it in the folder before it
    tries it, and names the outcome. Whatever it raises is a finding, as are its death and more than `seconds`.
    """

    name: str
    about: str
    prepare: Callable[[Path], Attempt]
    seconds: float = 20.0


def refused(error: NmcompileError) -> str:
    """The outcome of an input that was refused; an error that is not one line is a finding."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000, f"not one line: {text[:300]!r}"
    return type(error).__name__
