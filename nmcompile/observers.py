"""Observers for Pipeline: plain callables that watch passes run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.errors import NmcompileError
from nmcompile.files import write
from nmcompile.pipeline import Observer, Pass, Report
from nmcompile.spec import spec


def dump_text(folder: str | os.PathLike[str]) -> Observer:
    """Writes the graph after each pass to `folder` as `03-fuse-gelu.txt`; the folder is made. See
    graph.to_text."""
    count = 0

    def dump(pass_: Pass, graph: gs.Graph, report: Report, seconds: float) -> None:
        nonlocal count
        count += 1
        path = Path(folder) / f"{count:02d}-{pass_.name}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, f"{spec(pass_)}: {report.changed} changed\n\n{g.to_text(graph)}")
        except OSError as error:
            raise NmcompileError(
                f"{path} cannot be written: {error.strerror or error}; choose another folder"
            ) from None

    return dump


@dataclass
class Timing:
    """Keeps (pass, number of changes, seconds) of each pass; `str()` is a table."""

    rows: list[tuple[str, int, float]] = field(default_factory=list)

    def __call__(self, pass_: Pass, graph: gs.Graph, report: Report, seconds: float) -> None:
        self.rows.append((spec(pass_), report.changed, seconds))

    def __str__(self) -> str:
        return "\n".join(f"{seconds:8.3f} s {changed:6d} changed  {name}" for name, changed, seconds in self.rows)
