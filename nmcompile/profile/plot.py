"""Profiles as pictures: the rooflines with the steps as points, and where the time goes as a stacked bar.

Only here is matplotlib imported, and no window is ever opened.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile.errors import InputError, UnsupportedError
from nmcompile.profile.timing import Machine, Profile, Row, grouped

FORMATS = ("svg", "png")
NAMED = 9  # groups with a colour of their own; the others are drawn as one, in grey
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee9944", "#225555", "#997700")
GREYS = {"other steps": "#999999", "waiting": "#cccccc", "outside the steps": "#e5e5e5"}


def check(path: Path) -> None:
    """InputError for a file that is no picture, UnsupportedError without matplotlib."""
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise InputError(f"--plot {path}: the name must end in .svg or .png")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--plot draws with matplotlib, which is not installed; pip install 'nmcompile[plot]'"
        ) from None


def draw(profiles: Sequence[Profile], titles: Sequence[str], machine: Machine, kind: str) -> bytes:
    """A picture of all profiles, one below the other; kind "svg" or "png"."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2 * len(profiles)), layout="constrained")
    axes = figure.subplots(len(profiles), 2, squeeze=False, width_ratios=(2.2, 1))
    for (roof, bar), profile, title in zip(axes, profiles, titles, strict=True):
        rows = grouped(profile.rows)
        order = sorted(rows, key=lambda row: -row.seconds)
        colours = {id(row): colour for row, colour in zip(order[:NAMED], COLOURS, strict=False)}
        _roofline(roof, rows, colours, machine)
        _breakdown(bar, profile, order, colours)
        bar.set_title(title, fontsize=10, loc="left")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nmcompile", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _roofline(axes: Any, rows: Sequence[Row], colours: dict[int, str], machine: Machine) -> None:
    points = [row for row in rows if row.macs and row.bytes and row.seconds > 0]
    peak, bandwidth = machine.int8_peak / 1e9, machine.bandwidth / 1e9
    found = [row.macs / row.bytes for row in points]
    rates = [row.macs / row.seconds / 1e9 for row in points]
    peaks = {"int8": peak}
    if any(row.step.in_float for row in points):
        peaks["float"] = machine.float_peak() / 1e9
    ridge = peak / bandwidth  # multiply-adds per byte from which the peak is the limit
    left, right = min([*found, ridge]) / 3, max([*found, ridge]) * 3
    low, high = min([*rates, peak / 20]) / 2, max([*rates, peak]) * 2
    axes.plot([left, ridge], [left * bandwidth, peak], color="black", linewidth=1.5)
    for name, limit in peaks.items():
        style = "-" if name == "int8" else "--"
        axes.plot([limit / bandwidth, right], [limit, limit], color="black", linewidth=1.5, linestyle=style)
        axes.annotate(f"{name} peak {limit:.0f} G MAC/s", (right, limit), (-4, 4), textcoords="offset points",
                      ha="right", fontsize=8)  # fmt: skip
    middle = max(left, low / bandwidth) ** 0.5 * ridge**0.5
    axes.annotate(f"memory {bandwidth:.1f} GB/s", (middle, middle * bandwidth), (8, -4), textcoords="offset points",
                  va="top", fontsize=8)  # fmt: skip
    longest = max((row.seconds for row in points), default=1.0)
    for row, intensity, rate in zip(points, found, rates, strict=True):
        axes.scatter(intensity, rate, s=30 + 400 * row.seconds / longest, alpha=0.75, edgecolors="black",
                     linewidths=0.6, color=colours.get(id(row), GREYS["other steps"]))  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high), xlabel="multiply-adds per byte touched",
             ylabel="G MAC/s")  # fmt: skip
    axes.set_title("steps that multiply, area by time", fontsize=10, loc="left")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.6)


def _breakdown(axes: Any, profile: Profile, rows: Sequence[Row], colours: dict[int, str]) -> None:
    parts = [(f"{row.label} x{row.count}", row.seconds, colours[id(row)]) for row in rows[:NAMED]]
    rest = {"other steps": sum(row.seconds for row in rows[NAMED:]), "waiting": profile.waiting,
            "outside the steps": profile.outside}  # fmt: skip
    parts += [(name, spent, GREYS[name]) for name, spent in rest.items() if spent > 0]
    tops = np.cumsum([spent for _, spent, _ in parts])
    for (name, spent, colour), top in zip(parts, tops, strict=True):
        text = f"{name}: {spent * 1e3:.3g} ms, {spent / profile.seconds:.0%}"
        axes.bar(0, spent * 1e3, bottom=(top - spent) * 1e3, width=0.8, color=colour, edgecolor="white", label=text)
    axes.set(ylabel="ms", xlim=(-0.5, 0.5), xticks=[])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
