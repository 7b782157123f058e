"""Accuracy against speed-up, one point per recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nmcompile.errors import UnsupportedError
from tools.accuracy.retrieval import Scores
from tools.accuracy.study import Row


def draw(rows: Sequence[Row], base: Mapping[str, Scores], path: Path) -> None:
    """Write the picture, its format by the name's ending; the first row's plan is the speed of 1."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("pictures need matplotlib: pip install 'nmcompile[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    name = list(base)[-1]
    for row in rows:
        speed, kept = rows[0].ms / row.ms, 100 * row.scores[name].top1 / base[name].top1
        axes.scatter(speed, kept, color="#2f6f9f", s=28)
        axes.annotate(row.name, (speed, kept), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel(f"speed-up over {rows[0].name} on the CPU plan")
    axes.set_ylabel(f"share of the float model's top-1 kept, % ({name})")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
