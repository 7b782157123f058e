"""Is what nmcompile makes of a model what onnxruntime computes? One model, many inputs, and every form it takes.

    canonical   the graph after the passes that must keep what it computes, in onnxruntime
    float plan  that graph lowered as it is: no rounding hides a mask that was dropped
    open        the Q/DQ graph of `compile` with its activations unrounded, in onnxruntime: sequences unlike all samples
                leave the ranges that samples gave, which is no fault
    onnx        that graph as it is
    plan        the plan of `compile`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_graphsurgeon as gs
from random_graph_feeds import USUAL, Run, runs, samples
from random_graph_masks import Applied
from random_graph_model import Built, build
from random_graphs import Recipe

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.cpu.lower import lower
from nmcompile.backends.cpu.session import Session
from nmcompile.errors import CalibrationError, InputError, NmcompileError
from nmcompile.pipeline import Pipeline
from nmcompile.plan import write_plan
from nmcompile.recipes import canonical_passes

Arrays = Mapping[str, np.ndarray]
HIDDEN = -1000.0  # what is added to the score of a hidden key is below

# The largest relative error of a vector (its last axis) against onnxruntime. Float forms differ by rounding alone; a
# key too many among 200 moves a vector by 1 %.
EXACT = 2e-3
# Of INT8, by the cosine of an output over the vectors of one sequence together: between the plan and its Q/DQ graph,
# between that without rounded activations and the model; and between these and the model on inputs like the samples.
LEAST_AGREEMENT = 0.98
LEAST_COSINE = 0.9
SAMPLED = 6  # tokens: the shortest sample


@dataclass(frozen=True)
class Outcome:
    """What came of one graph. complaints: (form, what is wrong), none where it is right; barred: a usual input that
    the plan refuses; guarded: unusual ones that it refuses, with a reason; missing: what runs on onnxruntime, and why.
    """

    recipe: Recipe
    complaints: tuple[tuple[str, str], ...] = ()
    runs: int = 0
    barred: str = ""
    guarded: int = 0
    refusal: str = ""  # the reason of the first
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
        if self.barred:
            return "refused"
        return "native" if self.native else "declined"


@dataclass
class _Tally:
    """What was found so far: complaints, one for each form and output, and refusals."""

    complaints: dict[tuple[str, str], str] = field(default_factory=dict)
    barred: str = ""
    refusals: list[str] = field(default_factory=list)

    def add(self, form: str, output: str, text: str) -> None:
        self.complaints.setdefault((form, output), text)


def check(recipe: Recipe, instead: Recipe | None = None) -> Outcome:
    """Compile the graph of a recipe and compare all forms with onnxruntime at every run of `runs`.

    instead: what is compiled in its place, so that the check has something to find.
    """
    built = build(recipe)
    model = built.model if instead is None else build(instead).model
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            canonical, _ = Pipeline(canonical_passes()).run(g.load(model))
            result = nmcompile.compile(model, folder / "m.plan", calibration=samples(recipe), preset="fast",
                                       tuning="off", emit_onnx=folder / "m.onnx", measure=False)  # fmt: skip
            g.infer_shapes(canonical)
            made = lower(canonical)
            header = {"nmcompile": nmcompile.__version__, "target": "cpu", "source": "", "passes": [], **made.header}
            write_plan(folder / "f.plan", header, made.arrays, made.blobs)
            exact, plan = _open(folder / "f.plan"), _open(folder / "m.plan")
            emitted = g.load(folder / "m.onnx")
            forms = _Forms(g.runner(canonical), g.runner(emitted), g.runner(_unrounded(emitted)), exact, plan)
        except CalibrationError as error:
            if "NaN" in str(error):  # the model's own: it makes them of the samples
                return Outcome(recipe, missing=str(error))
            return Outcome(recipe, error=str(error))
        except Exception as error:  # whatever it is, the model is one that onnxruntime runs
            return Outcome(recipe, error=f"{type(error).__name__}: {error}")
        return _compared(recipe, built, forms, result.notes)


def _unrounded(graph: gs.Graph) -> gs.Graph:
    """A copy in which every activation passes by its quantize/dequantize pair."""
    graph = g.copy(graph)
    for node in graph.nodes:
        pair = g.read_pair(node.outputs[0]) if node.op == "DequantizeLinear" else None
        if pair is not None and not isinstance(pair.x, gs.Constant):
            g.rewire(graph, node.outputs[0], pair.x)
    g.cleanup(graph)
    return graph


def _open(path: Path) -> Session:
    session = nmcompile.load(path, threads=1)
    assert isinstance(session, Session)
    return session


@dataclass(frozen=True)
class _Forms:
    canonical: Callable[[Arrays], Arrays]
    onnx: Callable[[Arrays], Arrays]
    open: Callable[[Arrays], Arrays]
    exact: Session
    plan: Session


def _compared(recipe: Recipe, built: Built, forms: _Forms, notes: Sequence[str]) -> Outcome:
    graph = g.load(built.model)
    names = [info.name for info in g.outputs(graph)]
    inner = [name for applied in built.applied.values() for a in applied for name in a.names]
    reference = g.runner(graph, list(dict.fromkeys([*names, *inner])))
    tally, done = _Tally(), 0
    for run in runs(recipe):
        try:
            values = reference(run.feeds)
        except NmcompileError:  # the model does not take such inputs: positions beyond its table
            continue
        done += 1
        wanted = {name: values[name] for name in names}
        seen = {name: shown(values, applied, run) for name, applied in built.applied.items()}
        _hold(tally, forms, run, wanted, seen)
    kinds = [step["step"] for segment in forms.plan.header["segments"] for step in segment.get("steps", ())]
    attentions = len(recipe.masks) + 2 * (recipe.decoder is not None)
    return Outcome(
        recipe,
        complaints=tuple((form, f"{output}: {text}") for (form, output), text in tally.complaints.items()),
        runs=done,
        barred=tally.barred,
        guarded=len(tally.refusals),
        refusal=next(iter(tally.refusals), ""),
        native=[segment["kind"] for segment in forms.plan.header["segments"]] == ["native"],
        attention=sum(kind.startswith("attention") for kind in kinds) >= attentions,
        embedding="embed" in kinds,
        missing=next((n for n in notes if "not matched" in n), next((n for n in notes if "onnxruntime" in n), "")),
    )


def _hold(tally: _Tally, forms: _Forms, run: Run, wanted: Arrays, seen: Mapping[str, np.ndarray]) -> None:
    """Compare all forms on one run; where the plan refuses the inputs, the graphs promise nothing about them either."""
    try:
        found = forms.plan.run(run.feeds)
        exact = forms.exact.run(run.feeds)
    except InputError as refusal:
        if run.masks in USUAL:
            tally.barred = tally.barred or f"refused at {run}: {refusal}"
        else:
            tally.refusals.append(str(refusal))
        return
    except Exception as error:
        tally.add("plan", "run", f"fails at {run}: {type(error).__name__}: {error}")
        return
    like_samples = run.masks in USUAL and run.feeds["input_ids"].shape[1] >= SAMPLED
    if like_samples:
        _rounded(tally, "plan", run, wanted, wanted, found, seen, LEAST_COSINE)
    _exact(tally, "float plan", run, wanted, exact, seen)
    try:
        _exact(tally, "canonical", run, wanted, forms.canonical(run.feeds), seen)
        rounded = forms.onnx(run.feeds)
        if like_samples:
            _rounded(tally, "onnx", run, wanted, wanted, rounded, seen, LEAST_COSINE)
        _rounded(tally, "open", run, wanted, wanted, forms.open(run.feeds), seen, LEAST_AGREEMENT)
        _rounded(tally, "plan and onnx", run, wanted, rounded, found, seen, LEAST_AGREEMENT)
    except NmcompileError as error:
        tally.add("graph", "run", f"fails at {run}: {error}")


def shown(values: Arrays, applied: Sequence[Applied], run: Run) -> np.ndarray:
    """bool [batch, tokens] of the first sequence: tokens that a query of some layer sees as keys. A plan gives zeros
    for the others."""
    batch, tokens = run.feeds["input_ids"].shape
    found = np.zeros((batch, run.past + tokens), bool)
    for layer in applied:
        keep: np.ndarray = np.ones((batch, 1, 1, 1), bool)
        for name in layer.keeps:
            keep = keep & values[name]
        bias: np.ndarray = np.zeros((batch, 1, 1, 1), np.float64)
        for name in layer.biases:
            bias = bias + values[name].astype(np.float64)
        for name in layer.counts:
            given = values[name]
            real = np.arange(run.past + tokens) < given[:, None] if given.ndim == 1 else given > 0
            keep = keep & real[:, None, None, :]
        found |= (keep & (bias > HIDDEN)).any(axis=(1, 2))
    return found[:, run.past :]


def _compared_rows(wanted: np.ndarray, real: np.ndarray | None) -> np.ndarray:
    """Which vectors are compared: not the hidden ones, nor those that are no numbers in the model."""
    use = np.asarray(np.isfinite(wanted).all(axis=-1))
    return use if real is None else use & real


def _fits(tally: _Tally, form: str, run: Run, name: str, wanted: np.ndarray, found: Arrays) -> bool:
    if name not in found or found[name].shape != wanted.shape:
        shape = list(found[name].shape) if name in found else "nothing"
        tally.add(form, name, f"at {run}: {shape} instead of {list(wanted.shape)}")
        return False
    return True


def _exact(tally: _Tally, form: str, run: Run, wanted: Arrays, found: Arrays, seen: Mapping[str, np.ndarray]) -> None:
    """Vector by vector: |found - wanted| / |wanted|."""
    for name, values in wanted.items():
        if not _fits(tally, form, run, name, values, found):
            continue
        use = _compared_rows(values, seen.get(name))
        if not use.any():
            continue
        a, b = (x[use].astype(np.float64) for x in (values, found[name]))
        norms = np.linalg.norm(a, axis=1)
        error = np.linalg.norm(a - b, axis=1) / np.maximum(norms, 0.1 * np.sqrt(np.mean(norms**2)) + 1e-12)
        if not error.max() <= EXACT:
            tally.add(form, name, f"off by {error.max():.2g} at {run}")


def _rounded(
    tally: _Tally, form: str, run: Run, model: Arrays, wanted: Arrays, found: Arrays,
    seen: Mapping[str, np.ndarray], least: float,
) -> None:  # fmt: skip
    """Sequence by sequence, by cosine; `model` tells which vectors count."""
    for name, values in wanted.items():
        if not _fits(tally, form, run, name, values, found):
            continue
        use = _compared_rows(model[name], seen.get(name))
        for one, other, rows in zip(values, found[name], use, strict=True):
            a, b = (x[rows].astype(np.float64).ravel() for x in (one, other))
            cosine = float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)) if len(a) else 1.0
            if not cosine >= least:
                tally.add(form, name, f"cosine {cosine:.3f} at {run}")
