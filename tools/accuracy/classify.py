"""A classifier in float, in eight bits, pruned in one shot and trained: accuracy on the test split beside the speed.

Every row is what a user gets: a plan in the engine (n:m: the Q/DQ graph in onnxruntime, as the engine has no kernel for
it), calibrated on texts of the train split. Speeds are of one run in which all plans and the float model take turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nmcompile
from nmcompile.bench import bench, ratios
from nmcompile.errors import InputError
from tools.accuracy.classifier import Embedder, accuracy
from tools.accuracy.labelled import Split
from tools.accuracy.plot import scatter
from tools.accuracy.study import zeros_of

CALIBRATION = 256
LENGTH = 128


@dataclass(frozen=True)
class Row:
    """accuracy: of the test split. zeros: of all layers that are compressed. seconds: of training and compiling. speed:
    over onnxruntime fp32 at each shape, None where the plan is not what was scored; (median, least, most) of rounds."""

    name: str
    accuracy: float
    zeros: float
    seconds: float
    speed: tuple[tuple[float, float, float], ...] | None


@dataclass(frozen=True)
class Setting:
    """The classifier, what reads its texts, its data, and where and how it is measured."""

    model: Path
    tokenizer: Path
    split: Split
    labels: tuple[str, ...]
    folder: Path
    threads: int = 2
    shapes: tuple[tuple[int, int], ...] = ((1, LENGTH), (8, LENGTH))
    timed: float = 3.0  # seconds per model and shape

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The train split, in its order, classes as numbers."""
        return [{"text": text, "label": self.labels.index(label)} for text, label in self.split[0]]

    def score(self, path: Path) -> float:
        """Share of the test split that is right."""
        return accuracy(Embedder.of(path, self.tokenizer, self.threads, LENGTH), self.labels, self.split[1])


def rows(
    setting: Setting, pattern: str, sparsity: float | None, budgets: Sequence[str], training: Mapping[str, Any],
    tell: Callable[[str], None], texts: Sequence[str] = (),
) -> list[Row]:  # fmt: skip
    """Float, dense INT8, one shot, and one row per budget. texts: more of them, without labels, to train on."""
    if texts and training.get("labels"):
        raise InputError("texts without labels cannot be trained on with labels; leave out --labels or --data")
    samples = setting.samples
    zeros: dict[str, Any] = {"pattern": pattern} | ({} if sparsity is None else {"sparsity": sparsity})
    kind = pattern if sparsity is None else f"{pattern}, {100 * sparsity:g} %"
    made: list[tuple[str, Path, Path, float, float]] = []

    def compiled(name: str, source: Path, begun: float, **options: Any) -> None:
        tell(name)
        plan, graph = (setting.folder / f"{len(made)}{ending}" for ending in (".plan", ".onnx"))
        result = nmcompile.compile(source, plan, calibration=samples[:CALIBRATION], tokenizer=setting.tokenizer,
                                   emit_onnx=graph, measure=False, **options)  # fmt: skip
        made.append((name, plan, graph, zeros_of(result), time.perf_counter() - begun))

    compiled("dense INT8", setting.model, time.perf_counter())
    compiled(f"{kind}, one shot", setting.model, time.perf_counter(), **zeros)
    for budget in budgets:
        begun, sparse = time.perf_counter(), setting.folder / f"sparse-{budget}.onnx"
        name = f"{kind}, trained {budget}"
        tell(f"{name}: training")
        data: list[dict[str, Any]] = list(samples) if training.get("labels") else [
            *({"text": sample["text"]} for sample in samples), *({"text": text} for text in texts)]  # fmt: skip
        nmcompile.train(setting.model, sparse, data=data, tokenizer=setting.tokenizer, max_length=LENGTH,
                        budget=budget, **zeros, **training)  # fmt: skip
        compiled(name, sparse, begun)
    tell("timing")
    graphs = ":" in pattern
    timed = bench([*(plan for _, plan, *_ in made), setting.model], threads=setting.threads, shapes=setting.shapes,
                  seconds=setting.timed)  # fmt: skip
    ones = tuple((1.0, 1.0, 1.0) for _ in setting.shapes)
    found = [Row("float in onnxruntime", setting.score(setting.model), 0.0, 0.0, ones)]
    for (name, plan, graph, share, seconds), contender in zip(made, timed[:-1], strict=True):
        scored = graph if graphs and name != "dense INT8" else plan
        speed = None if scored is graph else tuple(ratios(contender, timed[-1]))
        found.append(Row(name, setting.score(scored), share, seconds, speed))
    return found


def markdown(found: Sequence[Row], shapes: Sequence[tuple[int, int]]) -> str:
    """The rows as a table; points are percent lost of the float model's accuracy."""
    head = ["model", "zeros", "accuracy", "points lost", *(f"speed at {b}x{t}" for b, t in shapes), "made in s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        speeds = ["-"] * len(shapes) if row.speed is None else [
            f"{median:.2f} ({least:.2f} to {most:.2f})" for median, least, most in row.speed]  # fmt: skip
        cells = [row.name, f"{row.zeros:.0%}", f"{row.accuracy:.2%}", f"{100 * (found[0].accuracy - row.accuracy):.2f}",
                 *speeds, f"{row.seconds:.0f}" if row.seconds else "-"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(found: Sequence[Row]) -> str:
    """The figures, to keep."""
    return json.dumps([asdict(row) for row in found], indent=1) + "\n"


def draw(found: Sequence[Row], path: Path, shape: str) -> None:
    """Accuracy against the speed-up over onnxruntime at the first shape."""
    points = [(row.speed[0][0], 100 * row.accuracy, row.name) for row in found if row.speed is not None]
    scatter(points, f"speed-up over onnxruntime fp32 at {shape}", "accuracy on the test split, %", path)
