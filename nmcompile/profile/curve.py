"""The course of a training as a picture: the loss on held-out samples over time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

STAGES = {"distil": ("float", "#4477aa"), "quantized": ("eight bits", "#cc6677")}


def draw(history: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """history: of nmcompile.train; kind "svg" or "png". The dashed line is the pruned model's loss."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    begun, first = 0.0, None
    for stage, (label, colour) in STAGES.items():
        looks = [entry for entry in history if entry["stage"] == stage]
        if not looks:
            continue
        minutes, losses = [begun + entry["seconds"] / 60 for entry in looks], [entry["loss"] for entry in looks]
        axes.plot(minutes, losses, marker="o", markersize=4, color=colour, label=label)
        begun, first = minutes[-1], losses[0] if first is None else first
    if first is not None:
        axes.axhline(first, linestyle="--", linewidth=1, color="#999999")
        axes.annotate("pruned", (begun, first), (0, 4), textcoords="offset points", ha="right", fontsize=8)
        axes.legend()
    axes.set(xlabel="minutes of training", ylabel="loss on held-out samples", ylim=(0, None))
    axes.grid(True, linewidth=0.3, alpha=0.6)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nmcompile", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
