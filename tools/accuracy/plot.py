"""Accuracy against speed-up, one point per recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nmcompile.errors import UnsupportedError
from tools.accuracy.retrieval import Scores
from tools.accuracy.study import Row

Point = tuple[float, float, str]  # x, y, name


def draw(rows: Sequence[Row], base: Mapping[str, Scores], path: Path) -> None:
    """Write the picture, its format by the name's ending; the first row's plan is the speed of 1."""
    name = list(base)[-1]
    points = [(rows[0].ms / row.ms, 100 * row.scores[name].top1 / base[name].top1, row.name) for row in rows]
    scatter(points, f"speed-up over {rows[0].name} on the CPU plan",
            f"share of the float model's top-1 kept, % ({name})", path)  # fmt: skip


def scatter(points: Sequence[Point], x: str, y: str, path: Path) -> None:
    """Points with their names. UnsupportedError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("pictures need matplotlib: pip install 'nmcompile[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for across, up, name in points:
        axes.scatter(across, up, color="#2f6f9f", s=28)
        axes.annotate(name, (across, up), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
