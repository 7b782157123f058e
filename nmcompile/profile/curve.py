"""The course of a training as a picture: the loss on held-out samples over time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw(history: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """history: of nmcompile.train; kind "svg" or "png". The dashed line is the pruned model's loss."""
    import matplotlib
    from matplotlib.figure import Figure

    looks = [entry for entry in history if entry["stage"] == "distil"]
    minutes, losses = [entry["seconds"] / 60 for entry in looks], [entry["loss"] for entry in looks]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, losses, marker="o", markersize=4, color="#4477aa")
    axes.axhline(losses[0], linestyle="--", linewidth=1, color="#999999")
    axes.set(xlabel="minutes of training", ylabel="loss on held-out samples", ylim=(0, None))
    axes.annotate("pruned", (minutes[-1], losses[0]), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.grid(True, linewidth=0.3, alpha=0.6)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nmcompile", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
