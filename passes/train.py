"""Train: prune, then distil the dense model into what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import Context, Report
from nmcompile.errors import PassError, UnsupportedError
from nmcompile.prune import Goal, PrunePlan, PruningPass, goal, parse_rules, prune
from nmcompile.prune.records import NormRecord, Records, joined, packed

if TYPE_CHECKING:
    from nmcompile.training import Recipe, Trained


class Fields(TypedDict, total=False):
    """The options of training by name, as those of `Train`."""

    budget: str
    masks: str
    masks_options: tuple[str, ...]
    lr: float
    tokens: int
    steps: int
    rungs: tuple[str, ...]
    local: float
    embeddings: bool
    qat: float
    target: str
    relations: float
    temperature: float
    weighing: str
    labels: str
    label_weight: float
    device: str
    seed: int


NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Train(PruningPass):
    """Prune as `prune` does, then train what is left to compute what the dense model does, on unlabelled samples.

    MatMul(x, W)  ->  MatMul(x, V * keep)      V by distillation of feature maps and outputs

    Needs torch. budget: of pruning and training together, 90s, 10m or 1.5h. masks: how zeros move while training
    goes on: fixed, gradual, admm, lasso, srste (nmcompile.training.policies), with its options as
    masks_options=NAME:VALUE. lr (0: by the width), tokens of a step, steps (0: as many as the budget allows), rungs
    (lower sparsities to prune to and to train at first, a seventh of the budget each), local (the share of the
    budget that trains block by block first), embeddings (whether their tables are trained beside weights, biases
    and normalisations), qat (the share that trains with eight bits last, those of `target`), relations,
    temperature, weighing (of feature maps: uniform, sensitivity), labels and their weight, device, seed: see
    nmcompile.training.recipe.Recipe. It ends with the best state on held-out samples, which may be the pruned one.
    """

    solver: str = "admm"
    pattern: str = "2x4"
    sparsity: float | None = None
    layers: tuple[str, ...] = ()
    multiple: int = 1
    budget: str = "10m"
    masks: str = "fixed"
    masks_options: tuple[str, ...] = ()
    lr: float = 0.0
    tokens: int = 1024
    steps: int = 0
    rungs: tuple[str, ...] = ()
    local: float = 0.0
    embeddings: bool = True
    qat: float = 0.0
    target: str = "cpu"
    relations: float = 0.6
    temperature: float = 2.0
    weighing: str = "uniform"
    labels: str = ""
    label_weight: float = 0.5
    device: str = "cpu"
    seed: int = 0

    @property
    def plan(self) -> PrunePlan:
        return self._plan(self.sparsity)

    def check(self) -> None:
        """NmcompileError for options that cannot be, or not on this machine, before the long part."""
        for sparsity in (*self._rungs, self.sparsity):
            self._plan(sparsity)
        _training().check(self.recipe)

    @property
    def recipe(self) -> Recipe:
        """The options as a recipe; PassError for what cannot be."""
        training = _training()
        recipe: Recipe = training.Recipe(
            training.seconds(self.budget), self.masks, _options(self.masks_options), self.lr, self.tokens, self.steps,
            self.local, self.embeddings, self.qat, self.target, fields(self.labels),
            training.Distillation(relations=self.relations, temperature=self.temperature, labels=self.label_weight,
                                  weighing=self.weighing),
            self.device, seed=self.seed,
        )  # fmt: skip
        return recipe

    def run(self, graph: gs.Graph, context: Context) -> Report:
        training, recipe = _training(), self.recipe
        training.check(recipe, graph)
        clock, dense = training.Clock(recipe), g.copy(graph)
        rungs = [(self._plan(sparsity), training.rung(recipe)) for sparsity in self._rungs]
        steps = recipe.steps - sum(early.steps for _, early in rungs)  # what the last is left with
        weights = sum(math.prod(layer.shape) for layer in g.linear_layers(graph))
        fitted = replace(context, fitted_to=training.for_fitting(context.training, weights))
        passed: list[Report] = []
        history: list[Mapping[str, Any]] = []
        for number, (plan, stage) in enumerate([*rungs, (self.plan, replace(recipe, steps=max(steps, 0)))]):
            report = prune(graph, plan, fitted)
            records = report.records
            if records is None or not records.layers:
                return report
            masked = {name: training.Masked(Goal(record.pattern, record.sparsity), record.mask)
                      for name, record in records.layers.items()}  # fmt: skip
            folder = context.checkpoints if number == len(rungs) or context.checkpoints is None else (
                context.checkpoints / f"rung-{number}")  # fmt: skip
            found = training.train(dense, graph, masked, context.training, clock.left(stage), context.progress, folder)
            history += [{**entry, "rung": number} for entry in found.history] if rungs else found.history
            passed.append(_trained(graph, report, records, found))
        detail = {**passed[-1].detail, "training": {"loss pruned": found.start, "loss trained": found.end,
                                                    "history": history}}  # fmt: skip
        notes = dict.fromkeys(note for report in passed for note in report.notes)
        return replace(passed[-1], detail=detail, records=joined(each.records for each in passed), notes=tuple(notes))

    def _plan(self, sparsity: float | None) -> PrunePlan:
        rules = parse_rules(self.layers, sparsity)
        return self.planned(goal(self.pattern, sparsity), rules, self.multiple)

    @property
    def _rungs(self) -> list[float]:
        """PassError for sparsities that do not rise to the goal."""
        try:
            sparsities = [float(text) for text in self.rungs]
        except ValueError:
            sparsities = [-1.0]
        last = self.sparsity or 0.0
        if sparsities and not all(low < high for low, high in pairwise([0.0, *sparsities, last])):
            raise PassError(f"rungs={','.join(self.rungs)} do not rise to the sparsity of {last:g}; before 0.8 give "
                            "for example 0.5,0.65")  # fmt: skip
        return sparsities


def _trained(graph: gs.Graph, report: Report, records: Records, found: Trained) -> Report:
    """The report of pruning after training, whose constants are put into the graph."""
    norms = _taken_over(graph, found.graph, records.norms)
    layers = {name: replace(record, bits=packed(found.masks[name]) if name in found.masks else record.bits,
                            changed=True) for name, record in records.layers.items()}  # fmt: skip
    return replace(report, records=Records(layers, norms), notes=(*report.notes, *found.notes))


def fields(text: str) -> tuple[str, ...]:
    """The names in a text A,B."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _training() -> Any:
    """The package that needs torch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UnsupportedError("training needs torch, which is not installed: pip install 'nmcompile[train]'") from None
    from nmcompile import training

    return training


def _options(texts: tuple[str, ...]) -> dict[str, object]:
    """NAME:VALUE as numbers where they are."""
    found: dict[str, object] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon:
            raise PassError(f"masks_options={text} is not NAME:VALUE, for example start:0.5")
        try:
            found[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            found[name] = value
    return found


def _taken_over(graph: gs.Graph, trained: gs.Graph, fitted: Mapping[str, NormRecord]) -> dict[str, NormRecord]:
    """Put the trained constants into the graph, in place; what normalisations had before, those fitted by pruning
    included."""
    now = {tensor.name: np.asarray(tensor.values) for node in trained.nodes for tensor in node.inputs
           if isinstance(tensor, gs.Constant)}  # fmt: skip
    norms: dict[str, NormRecord] = {}
    for node in graph.nodes:
        operands = [tensor for tensor in node.inputs[1:3] if isinstance(tensor, gs.Constant)]
        if node.op in NORMS and len(operands) == 2:
            gain, bias = (np.asarray(tensor.values) for tensor in operands)
            norms[node.name] = NormRecord((gain, bias), (operands[0].name, operands[1].name))
    for node in graph.nodes:
        for tensor in node.inputs:
            if not isinstance(tensor, gs.Constant) or tensor.name not in now:
                continue
            if not np.array_equal(now[tensor.name], np.asarray(tensor.values)):
                tensor.values = now[tensor.name]
                g.changed(tensor, tensor)
    return {**norms, **fitted}
