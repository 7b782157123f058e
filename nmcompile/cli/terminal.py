"""What the commands share in talking to people: numbers, tables, warnings, progress."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from nmcompile.errors import NmcompileError
from nmcompile.files import check_outputs

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from nmcompile.compare import Difference

PATIENCE = 1.0  # seconds before progress is shown
PLAIN_EVERY = 5.0  # seconds between lines where there is no terminal


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns in plain text; `right` names the columns to align at their end, by index ("12")."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if str(i) in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes as people write them: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}".replace(".0%", "%")


def decibel(value: float) -> str:
    return "exact" if value == math.inf else "not a number" if math.isnan(value) else f"{value:.1f} dB"


def cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5f}"


def differences(found: Mapping[str, Difference]) -> str:
    """A table of how far outputs are apart."""
    rows = [
        [name, cosine(d.cosine), decibel(d.sqnr), percent(d.top1), f"{d.max_error:.3g}", f"{d.mean_error:.3g}"]
        for name, d in found.items()
    ]
    return table(["output", "cosine", "SQNR", "top-1", "max error", "mean error"], rows, right="12345")


def warn(text: str) -> None:
    """A loud line on stderr."""
    click.secho(f"warning: {text}", fg="yellow", bold=True, err=True)


def say_json(content: object) -> None:
    click.echo(json.dumps(content, indent=1))


def check_writable(path: Path | None, *read: Path | None) -> None:
    """Refuse before the work starts what could not be written after it, or would overwrite what is read."""
    if path is None:
        return
    check_outputs({"the output": path})
    for other in read:
        if other is not None and path.exists() and other.exists() and path.samefile(other):
            raise NmcompileError(f"{path} would overwrite {other}, which is read; give another name")


class Progress:
    """A callback (what, done, total) that shows a bar on stderr once a second has passed; lines where stderr is no
    terminal."""

    def __init__(self) -> None:
        self._start = self._told = time.monotonic()
        self._lock = threading.Lock()
        self._state = ("", 0, 0)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._shown = False
        self._timer = threading.Timer(PATIENCE, self._open)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            self._shown = True  # a timer that has just fired opens nothing

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._state = (what, done, total)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, description=what, completed=done, total=total or None)
                return
            now = time.monotonic()
            due = now - self._told > PLAIN_EVERY or (not self._shown and now - self._start > PATIENCE)
            if due and not sys.stderr.isatty():
                click.echo(f"{what} {done}/{total}" if total else what, err=True)
                self._told, self._shown = now, True

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns: tuple[Any, ...] = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        bar = Progress(*columns, *times, console=Console(stderr=True), transient=True)
        with self._lock:
            if self._shown:
                return
            what, done, total = self._state
            self._task = bar.add_task(what, completed=done, total=total or None)
            bar.start()
            self._bar = bar
