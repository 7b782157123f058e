"""What compression costs all-MiniLM-L6-v2 in retrieval: by pattern, share of zeros, solver and step of the recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import nmcompile
from nmcompile import ir as g
from nmcompile.errors import InputError
from nmcompile.recipes import PRESETS
from nmcompile.session import load_cpu
from tools.accuracy.retrieval import Feeds, Scores, Task
from tools.accuracy.texts import pairs, standard_library
from tools.stdlib_text import docstrings

CALIBRATION = 256  # docstrings of the standard library, none of which is asked for
PAIRS = 1000
OUTPUT = "last_hidden_state"


@dataclass(frozen=True)
class Recipe:
    """One row: what is compiled. `graph`: scored on the Q/DQ graph in onnxruntime, for what the engine has no kernel
    for; otherwise on the CPU plan. training: options of nmcompile.train, which comes first then."""

    name: str
    options: Mapping[str, Any]
    graph: bool = False
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """scores by set of texts; `zeros` of all pruned layers, seconds of compiling, milliseconds per text of the plan."""

    name: str
    scores: Mapping[str, Scores]
    zeros: float
    seconds: float
    ms: float


def blocks(pattern: str, sparsity: float, **options: object) -> dict[str, Any]:
    """Options for compile: the default recipe for a block, with other options of its pruning pass."""
    if not options:
        return {"pattern": pattern, "sparsity": sparsity}
    given = {"solver": "admm", "ranking": "sensitivity"} | options
    order = "" if given.pop("order", True) is False else f"permute-features(pattern={pattern}), "
    words = ", ".join(f"{key}={str(value).lower()}" for key, value in given.items())
    return {"passes": f"{order}block-prune(block={pattern}, sparsity={sparsity}, {words})"}


PATTERNS = (
    Recipe("dense INT8", {}),
    Recipe("dense INT8, --reduce-range", {"reduce_range": True}),
    Recipe("2:4", {"pattern": "2:4"}, graph=True),
    *(Recipe(f"{pattern}, 50 %", blocks(pattern, 0.5)) for pattern in ("1x4", "4x1", "2x4", "4x4")),
    Recipe("1x4, 60 %", blocks("1x4", 0.6)),
    Recipe("1x4, 70 %", blocks("1x4", 0.7)),
    Recipe("2x4, 80 %", blocks("2x4", 0.8)),
    Recipe("1x4, 50 %, --fast", {"preset": "fast", **blocks("1x4", 0.5)}),
)
_ROUGH = replace(PRESETS["default"], smooth=False)
_PLAINLY = replace(PRESETS["default"], clip="mse", alpha=0.6, bias=False)
_PLAIN = {"ranking": "uniform", "order": False}
ABLATION = (
    Recipe("magnitude", blocks("1x4", 0.5, solver="magnitude", **_PLAIN)),
    Recipe("Wanda", blocks("1x4", 0.5, solver="wanda", **_PLAIN)),
    Recipe("SparseGPT, on the dense model's inputs",
           blocks("1x4", 0.5, solver="obs", sequential=False, norms=False, bias=False, damping=0.01, **_PLAIN)),
    Recipe("ADMM and refit, on the dense model's inputs",
           blocks("1x4", 0.5, sequential=False, norms=False, bias=False, damping=0.01, **_PLAIN)),
    Recipe("+ damping by held-out error", blocks("1x4", 0.5, sequential=False, norms=False, bias=False, **_PLAIN)),
    Recipe("+ biases", blocks("1x4", 0.5, sequential=False, norms=False, **_PLAIN)),
    Recipe("+ sequential", blocks("1x4", 0.5, correction=0, norms=False, **_PLAIN)),
    Recipe("+ a quarter of what was lost in the target", blocks("1x4", 0.5, norms=False, **_PLAIN)),
    Recipe("(all of it instead)", blocks("1x4", 0.5, correction=1, norms=False, **_PLAIN)),
    Recipe("+ normalisations", blocks("1x4", 0.5, **_PLAIN)),
    Recipe("+ order of features", blocks("1x4", 0.5, ranking="uniform")),
    Recipe("+ shares by sensitivity: the default", blocks("1x4", 0.5)),
    Recipe("the default without SmoothQuant", {**blocks("1x4", 0.5), "preset": _ROUGH}),
    Recipe("the default with joint rounding", blocks("1x4", 0.5, rounding=True)),
    Recipe("dense INT8", {}),
    Recipe("dense INT8 without SmoothQuant", {"preset": _ROUGH}),
    Recipe("dense INT8: one exponent, ranges by squared error, no correction of biases", {"preset": _PLAINLY}),
)  # fmt: skip


def trained(pattern: str, sparsity: float | None, budgets: Sequence[str], **options: Any) -> list[Recipe]:
    """A pattern pruned in one shot, and trained for some times."""
    kind = pattern if sparsity is None else f"{pattern}, {100 * sparsity:g} %"
    graph, asked = ":" in pattern, {"pattern": pattern, "sparsity": sparsity}
    return [Recipe(f"{kind}, one shot", asked, graph),
            *(Recipe(f"{kind}, trained {budget}", {}, graph, {**asked, "budget": budget, **options})
              for budget in budgets)]  # fmt: skip


def training_ablation(pattern: str, sparsity: float, budget: str) -> list[Recipe]:
    """One pattern, trained for one time in each of the ways that there are; the default is one of them."""
    ways: dict[str, dict[str, Any]] = {
        "the default": {}, "--no-embeddings": {"embeddings": False}, "--tokens 2048": {"tokens": 2048},
        "--tokens 512": {"tokens": 512}, "--lr 3e-4": {"lr": 3e-4}, "--lr 2e-3": {"lr": 2e-3},
        f"--rungs {sparsity - 0.15:g}": {"rungs": (f"{sparsity - 0.15:g}",)}, "--local 0.25": {"local": 0.25},
        "--qat 0.15": {"qat": 0.15}, "--relations 1": {"relations": 1.0},
        "--weighing sensitivity": {"weighing": "sensitivity"},
        **{f"--masks {name}": {"masks": name} for name in ("gradual", "admm", "lasso", "srste")},
    }  # fmt: skip
    asked: dict[str, Any] = {"pattern": pattern, "sparsity": sparsity}
    trained = [Recipe(name, {}, False, {**asked, "budget": budget, **options}) for name, options in ways.items()]
    return [Recipe("one shot", asked), *trained]


class Study:
    """The model, its calibration, the sets of texts that are asked for, and `texts` to train on."""

    def __init__(
        self, model: Path, tokenizer: Path, packages: Sequence[str], sets: int = 1, threads: int = 2,
        texts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.threads, self.texts = model, tokenizer, threads, texts
        self.calibration = [{"text": text} for text in docstrings()[:CALIBRATION]]
        seen = {record["text"] for record in self.calibration}
        sources = {"stdlib": standard_library(), **({"packages": list(packages)} if packages else {})}
        self.tasks: dict[str, Task] = {}
        for name, modules in sources.items():
            found = [pair for pair in pairs(modules) if not any(pair[0] in text for text in seen)]
            if len(found) < PAIRS:
                raise InputError(f"{name}: {len(found)} pairs of paragraphs, {PAIRS} are needed; name more packages")
            for i in range(min(sets, len(found) // PAIRS)):
                label = name if i == 0 else f"{name} {i + 1}"
                self.tasks[label] = Task.of(found[PAIRS * i : PAIRS * (i + 1)], tokenizer)
        self.dense = {name: task.embeddings(self._onnx(model)) for name, task in self.tasks.items()}
        self.base = {name: self.tasks[name].scores(vectors, vectors) for name, vectors in self.dense.items()}

    def rows(self, recipes: Sequence[Recipe], folder: Path, tell: Callable[[str], None]) -> Iterator[Row]:
        """Compile and score one after another; plans are left in `folder`."""
        for recipe in recipes:
            tell(recipe.name)
            yield self._row(recipe, folder)

    def _row(self, recipe: Recipe, folder: Path) -> Row:
        plan, quantized = folder / "model.plan", folder / "model.onnx"
        start = time.perf_counter()
        source = self.model if recipe.training is None else self._trained(recipe.training, folder)
        result = nmcompile.compile(source, plan, calibration=self.calibration, tokenizer=self.tokenizer,
                                   emit_onnx=quantized, measure=False, **recipe.options)  # fmt: skip
        seconds = time.perf_counter() - start
        session = load_cpu(plan, threads=self.threads)
        names = [info.name for info in session.inputs]

        def planned(feeds: Feeds) -> np.ndarray:
            return np.asarray(session.run({name: feeds[name] for name in names})[OUTPUT])

        embed = self._onnx(quantized) if recipe.graph else planned
        found = {name: task.scores(task.embeddings(embed), self.dense[name]) for name, task in self.tasks.items()}
        return Row(recipe.name, found, zeros_of(result), seconds, self._ms(session))

    def _trained(self, options: Mapping[str, Any], folder: Path) -> Path:
        """The model trained on calibration's texts, to which its pruning is fitted, and the others."""
        texts = [*self.calibration, *({"text": text} for text in self.texts)]
        sparse = folder / "sparse.onnx"
        nmcompile.train(self.model, sparse, data=texts, tokenizer=self.tokenizer, **options)
        return sparse

    def _ms(self, session: nmcompile.Session) -> float:
        """Median over batches of the first set, milliseconds per text."""
        spent: list[float] = []
        for feeds in next(iter(self.tasks.values())).batches:
            given = {info.name: feeds[info.name] for info in session.inputs}
            start = time.perf_counter()
            session.run(given)
            spent.append((time.perf_counter() - start) / len(feeds["input_ids"]))
        return 1e3 * float(np.median(spent))

    def _onnx(self, path: Path) -> Callable[[Feeds], np.ndarray]:
        graph = g.load(path)
        run, names = g.runner(graph, [OUTPUT], optimise=False), [tensor.name for tensor in graph.inputs]
        return lambda feeds: run({name: feeds[name] for name in names})[OUTPUT]


def zeros_of(result: nmcompile.Result) -> float:
    """Of the weights of all layers but heads and poolers that the engine runs."""
    sizes = [(layer["outputs"] * layer["inputs"], layer["density"]) for layer in result.layers]
    return float(1 - sum(size * density for size, density in sizes) / max(sum(size for size, _ in sizes), 1))


def markdown(rows: Sequence[Row], base: Mapping[str, Scores]) -> str:
    """The rows as a table, each figure beside its share of the dense float model's."""
    sets = list(base)
    figures = [f"{name}: {what}" for name in sets for what in ("top-1", "MRR", "cosine")]
    head = ["recipe", "zeros", *figures, "ms per text", "compiled in s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in (Row("float", base, 0.0, 0.0, float("nan")), *rows):
        cells = [row.name, f"{row.zeros:.0%}"]
        for name in sets:
            scores = row.scores[name]
            cells += [f"{scores.top1:.3f} ({scores.top1 / base[name].top1:.1%})",
                      f"{scores.mrr:.3f} ({scores.mrr / base[name].mrr:.1%})", f"{scores.cosine:.4f}"]  # fmt: skip
        cells += ["-", "-"] if row.name == "float" else [f"{row.ms:.2f}", f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[Row], base: Mapping[str, Scores]) -> str:
    """The figures, to keep."""
    content = {"float": {name: asdict(scores) for name, scores in base.items()}, "rows": [asdict(row) for row in rows],
               "onnxruntime": ort.__version__, "nmcompile": nmcompile.__version__}  # fmt: skip
    return json.dumps(content, indent=1) + "\n"
