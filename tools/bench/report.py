"""Results as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from .peers import OURS
from .rounds import Measurement


@dataclass(frozen=True)
class Row:
    """One model at one shape and share of zeros. `ratio`: the best peer's time over ours, median over the rounds.

    The best peer is the one of least median among those whose output agrees; `least` and `most` are over the rounds.
    """

    model: str
    shape: str
    share: float
    ours: float | None
    peers: dict[str, float]  # "openvino int8" -> median ms
    disagree: tuple[str, ...]
    best: str | None
    ratio: float | None
    least: float | None
    most: float | None


def rows(measurements: Sequence[Measurement], shares: Sequence[float]) -> list[Row]:
    """Peers that do not gain from zeros were measured without any, in the same rounds: they stand in every row."""
    return [_row(item, share) for item in measurements for share in shares]


def _row(item: Measurement, share: float) -> Row:
    found = [each for each in item.contenders if each.share == share or each.pattern is None]
    ours = next((each for each in found if each.peer == OURS), None)
    others = {f"{each.peer} {each.form}": each for each in found if each.peer != OURS}
    disagree = tuple(name for name, each in others.items() if not each.agrees)
    agreeing = {name: each for name, each in others.items() if each.agrees}
    best = min(agreeing, key=lambda name: median(agreeing[name].medians), default=None)
    ratios: list[float] = []
    if ours is not None and best is not None:
        ratios = [theirs / mine for theirs, mine in zip(agreeing[best].medians, ours.medians, strict=True)]
    return Row(
        item.model, item.shape, share, median(ours.medians) if ours else None,
        {name: median(each.medians) for name, each in others.items()}, disagree, best,
        median(ratios) if ratios else None, min(ratios, default=None), max(ratios, default=None),
    )  # fmt: skip


def markdown(found: Sequence[Row], measurements: Sequence[Measurement], machine: dict[str, Any]) -> str:
    """Times per model, shape and share; what loading takes; who was left out."""
    names = list(dict.fromkeys(name for row in found for name in row.peers))
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {machine['threads']} threads, medians in ms, "
        f"{machine['rounds']} rounds in alternation. Ratio: the best peer's time over ours, median over the rounds "
        "(least to most). Peers that zeros gain nothing run without them.",
        "",
        _line(["model", "shape", "zeros", "ours", *names, "best peer", "ratio"]),
        _line(["---"] * (6 + len(names))),
    ]
    for row in found:
        cells = [_ms(row.peers.get(name)) + (" (!)" if name in row.disagree else "") for name in names]
        ratio = f"{row.ratio:.2f} ({row.least:.2f} to {row.most:.2f})" if row.ratio is not None else "-"
        lines.append(
            _line([row.model, row.shape, f"{100 * row.share:g}%", _ms(row.ours), *cells, row.best or "-", ratio])
        )
    if any(row.disagree for row in found):
        lines += ["", "(!) The output does not agree with the float model's; it does not count as a best peer."]
    lines += [
        "",
        _line(["model", "shape", "contender", "blocks", "version", "candidate", "ms", "first answer s", "peak MB",
               "file MB", "cosine"]),
        _line(["---"] * 11),
    ]  # fmt: skip
    for item in measurements:
        for each in item.contenders:
            cells = [item.model, item.shape, each.label, (each.share and each.pattern) or "-", each.version,
                     each.candidate, _ms(median(each.medians)), f"{each.load_seconds:.2f}",
                     f"{each.peak_bytes / 1e6:.0f}", f"{each.file_bytes / 1e6:.0f}",
                     f"{each.cosine:.4f}" + ("" if each.agrees else " does not agree")]  # fmt: skip
            lines.append(_line(cells))
    reasons = {(name, why): None for item in measurements for name, why in item.left_out.items()}
    if reasons:
        lines += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in reasons)]
    lines += [
        "",
        "Per round: a reference task (numpy float32 768x768 by 768x128), and cores busy with other processes:",
        "",
    ]
    for item in measurements:
        rounds = zip(item.reference, item.others, strict=True)
        lines.append(
            f"- {item.model} {item.shape}: " + ", ".join(f"{time:.0f} us / {busy:.2f}" for time, busy in rounds)
        )
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 200 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def write(
    folder: Path, measurements: Sequence[Measurement], shares: Sequence[float], machine: dict[str, Any]
) -> list[Row]:
    """results.json and results.md in the folder; each is complete or absent."""
    found = rows(measurements, shares)
    _replace(folder / "results.json", json.dumps({
        "machine": machine, "table": [asdict(row) for row in found],
        "measurements": [asdict(item) for item in measurements],
    }, indent=1) + "\n")  # fmt: skip
    _replace(folder / "results.md", markdown(found, measurements, machine))
    return found


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def plot(folder: Path, found: Sequence[Row]) -> str | None:
    """results.png: a panel per model and shape, a group of bars per share. None, or why there is no plot."""
    try:
        matplotlib = import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot: Any = import_module("matplotlib.pyplot")
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    panels = list(dict.fromkeys((row.model, row.shape) for row in found))
    if not panels:
        return "no plot: nothing was measured"
    names = ["ours", *dict.fromkeys(name for row in found for name in row.peers)]
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure, axes = pyplot.subplots(height, width, figsize=(5.5 * width, 3.6 * height), squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        group = [row for row in found if (row.model, row.shape) == panel]
        for index, name in enumerate(names):
            bars = [(at, value) for at, row in enumerate(group)
                    if (value := row.ours if name == "ours" else row.peers.get(name)) is not None]  # fmt: skip
            places = [at + (index - (len(names) - 1) / 2) * 0.8 / len(names) for at, _ in bars]
            axis.bar(places, [value for _, value in bars], 0.8 / len(names), label=name, color=f"C{index}")
        axis.set_yscale("log")
        axis.set_xticks(range(len(group)), [f"{100 * row.share:g}%" for row in group])
        axis.set_title(f"{panel[0]} {panel[1]}")
        axis.set_xlabel("zeros")
        axis.set_ylabel("ms")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.savefig(folder / "results.png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return None


def machine() -> dict[str, Any]:
    """CPU model, cores, instruction sets that matter here, kernel, Python."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": facts.get("model name", platform.machine()),
        "family": [facts.get(name) for name in ("cpu family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)),
        "isa": " ".join(name for name in known if name in flags) or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
