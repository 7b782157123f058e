"""Is what nmcompile makes of a model what onnxruntime computes? One model, many inputs, and every form it takes.

    canonical   the graph after the passes that must keep what it computes, in onnxruntime
    float plan  that graph lowered as it is: no rounding hides a mask that was dropped
    onnx        the Q/DQ graph of `compile`, in onnxruntime
    plan        the plan of `compile`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from random_graph_feeds import USUAL, Feeds, Run, runs, samples
from random_graph_masks import Applied
from random_graph_model import Built, build
from random_graphs import Recipe

import nmcompile
from nmcompile import graph as g
from nmcompile.backends.cpu.session import Session
from nmcompile.errors import InputError, NmcompileError
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes
from nmcompile.targets import CpuTarget

Arrays = Mapping[str, np.ndarray]
HIDDEN = -1000.0  # what is added to the score of a hidden key is below

# The largest relative error of a vector (its last axis) against onnxruntime. Float forms differ by rounding alone; a key
# too many among 200 moves a vector by 1 %.
EXACT = 2e-3
# Of INT8, by the cosine of an output over the vectors of one sequence together: between the plan and its Q/DQ graph, and
# between that and the model, where sequences shorter than all samples leave the ranges that samples gave.
LEAST_AGREEMENT = 0.98
LEAST_COSINE = 0.9


@dataclass(frozen=True)
class Outcome:
    """What came of one graph. complaints: (form, what is wrong), none where it is right; guarded: inputs that the plan
    refuses with a reason; missing: what runs on onnxruntime, and why."""

    recipe: Recipe
    complaints: tuple[tuple[str, str], ...] = ()
    runs: int = 0
    guarded: int = 0
    refused: str = ""  # the reason of the first refusal
    native: bool = False  # one native segment
    attention: bool = False  # every attention is native
    embedding: bool = False  # the look-ups are
    missing: str = ""
    error: str = ""  # it did not compile

    @property
    def verdict(self) -> str:
        if self.error:
            return "error"
        if self.complaints:
            return "wrong"
        return "native" if self.native else "declined"


@dataclass
class _Tally:
    """Complaints so far, one for each form and output."""

    complaints: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, form: str, output: str, text: str) -> None:
        self.complaints.setdefault((form, output), text)


def check(recipe: Recipe, edit: Callable[[Built], Built] = lambda built: built) -> Outcome:
    """Compile the graph of a recipe and compare all forms with onnxruntime at every run of `runs`.

    edit: what stands for nmcompile's model where a test wants one that differs from the recipe's.
    """
    built = build(recipe)
    compiled = edit(built)
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            canonical, _ = Pipeline(canonical_passes()).run(g.load(compiled.model))
            result = nmcompile.compile(compiled.model, folder / "m.plan", calibration=samples(recipe), preset="fast",
                                       tuning="off", emit_onnx=folder / "m.onnx", measure=False)  # fmt: skip
            made = CpuTarget()
            made.finish(canonical)
            made.write(folder / "f.plan", {"nmcompile": nmcompile.__version__, "target": "cpu", "source": "",
                                           "passes": []})  # fmt: skip
            exact, plan = _open(folder / "f.plan"), _open(folder / "m.plan")
            forms = _Forms(g.runner(canonical), g.runner(g.load(folder / "m.onnx")), exact, plan)
        except Exception as error:  # whatever it is, the model is one that onnxruntime runs
            return Outcome(recipe, error=f"{type(error).__name__}: {error}")
        return _compared(recipe, built, forms, result.notes)


def _open(path: Path) -> Session:
    session = nmcompile.load(path, threads=1)
    assert isinstance(session, Session)
    return session


@dataclass(frozen=True)
class _Forms:
    canonical: Callable[[Arrays], Arrays]
    onnx: Callable[[Arrays], Arrays]
    exact: Session
    plan: Session


def _compared(recipe: Recipe, built: Built, forms: _Forms, notes: Sequence[str]) -> Outcome:
    graph = g.load(built.model)
    names = [info.name for info in g.outputs(graph)]
    inner = [name for applied in built.applied.values() for a in applied for name in (*a.keeps, *a.biases)]
    reference = g.runner(graph, list(dict.fromkeys([*names, *inner])))
    tally, done, guarded, refused = _Tally(), 0, 0, ""
    for run in runs(recipe):
        try:
            values = reference(run.feeds)
        except NmcompileError:  # the model does not take such inputs: positions beyond its table
            continue
        done += 1
        wanted = {name: values[name] for name in names}
        seen = {name: shown(values, applied, run) for name, applied in built.applied.items()}
        why = _held(tally, forms, run, wanted, seen)
        guarded += bool(why)
        refused = refused or why
    kinds = [step["step"] for segment in forms.plan.header["segments"] for step in segment.get("steps", ())]
    wanted_attentions = len(recipe.masks) + 2 * (recipe.decoder is not None)
    return Outcome(
        recipe, tuple((form, f"{output}: {text}") for (form, output), text in tally.complaints.items()), done, guarded,
        refused, [segment["kind"] for segment in forms.plan.header["segments"]] == ["native"],
        sum(kind.startswith("attention") for kind in kinds) >= wanted_attentions, "embed" in kinds,
        next((note for note in notes if "not matched" in note), next((n for n in notes if "onnxruntime" in n), "")),
    )  # fmt: skip


def _held(tally: _Tally, forms: _Forms, run: Run, wanted: Arrays, seen: Mapping[str, np.ndarray]) -> str:
    """Compare all forms on one run; the plan's reason where it refuses the inputs."""
    try:
        found = forms.plan.run(run.feeds)
        exact = forms.exact.run(run.feeds)
    except InputError as refusal:
        if run.masks in USUAL:
            tally.add("plan", "inputs", f"refused at {run}: {refusal}")
        return str(refusal)
    except Exception as error:
        tally.add("plan", "run", f"fails at {run}: {type(error).__name__}: {error}")
        return ""
    _rounded(tally, "plan", run, wanted, found, seen, LEAST_COSINE)
    _exact(tally, "float plan", run, wanted, exact, seen)
    try:
        _exact(tally, "canonical", run, wanted, forms.canonical(run.feeds), seen)
        rounded = forms.onnx(run.feeds)
        _rounded(tally, "onnx", run, wanted, rounded, seen, LEAST_COSINE)
        _rounded(tally, "plan and onnx", run, rounded, found, seen, LEAST_AGREEMENT)
    except NmcompileError as error:
        tally.add("graph", "run", f"fails at {run}: {error}")
    return ""


def shown(values: Arrays, applied: Sequence[Applied], run: Run) -> np.ndarray:
    """bool [batch, tokens] of the first sequence: tokens that a query of some layer sees as keys. A plan gives zeros for
    the others."""
    batch, tokens = run.feeds["input_ids"].shape
    found = np.zeros((batch, run.past + tokens), bool)
    for layer in applied:
        keep: np.ndarray = np.ones((batch, 1, 1, 1), bool)
        for name in layer.keeps:
            keep = keep & values[name]
        bias: np.ndarray = np.zeros((batch, 1, 1, 1), np.float64)
        for name in layer.biases:
            bias = bias + values[name].astype(np.float64)
        found |= (keep & (bias > HIDDEN)).any(axis=(1, 2))
    return found[:, run.past :]


def _vectors(wanted: np.ndarray, found: np.ndarray, real: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as [vectors, features], and the sequence of each; without hidden rows and what is no number in the model."""
    rows = np.broadcast_to(np.arange(len(wanted)).reshape(-1, *[1] * (wanted.ndim - 2)), wanted.shape[:-1])
    use = np.isfinite(wanted).all(axis=-1)
    if real is not None:
        use &= real
    return wanted[use].astype(np.float64), found[use].astype(np.float64), rows[use]


def _fits(tally: _Tally, form: str, run: Run, name: str, wanted: np.ndarray, found: Arrays) -> bool:
    if name not in found or found[name].shape != wanted.shape:
        shape = list(found[name].shape) if name in found else "nothing"
        tally.add(form, name, f"at {run}: {shape} instead of {list(wanted.shape)}")
        return False
    return True


def _exact(tally: _Tally, form: str, run: Run, wanted: Arrays, found: Arrays, seen: Mapping[str, np.ndarray]) -> None:
    for name, values in wanted.items():
        if not _fits(tally, form, run, name, values, found):
            continue
        a, b, _ = _vectors(values, found[name], seen.get(name))
        if not len(a):
            continue
        norms = np.linalg.norm(a, axis=1)
        error = np.linalg.norm(a - b, axis=1) / np.maximum(norms, 0.1 * np.sqrt(np.mean(norms**2)) + 1e-12)
        if not error.max() <= EXACT:
            tally.add(form, name, f"off by {error.max():.2g} at {run}")


def _rounded(
    tally: _Tally, form: str, run: Run, wanted: Arrays, found: Arrays, seen: Mapping[str, np.ndarray], least: float
) -> None:
    for name, values in wanted.items():
        if not _fits(tally, form, run, name, values, found):
            continue
        a, b, rows = _vectors(values, found[name], seen.get(name))
        for row in np.unique(rows):
            one, other = a[rows == row].ravel(), b[rows == row].ravel()
            cosine = float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-12))
            if not cosine >= least:
                tally.add(form, name, f"cosine {cosine:.3f} at {run}")
