"""Training of a pruned graph: stage by stage, each kept only if held-out samples say that it is better.

dense, graph, masks, data -> train -> Trained: the graph with other weights, zeros where the masks are
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch

from nmcompile.calibrate import Calibration, Data
from nmcompile.errors import PassError, UnsupportedError
from nmcompile.prune.plan import Goal
from nmcompile.torch import Module
from nmcompile.training import checkpoint
from nmcompile.training.batches import Batches, parted
from nmcompile.training.distil import EndToEnd, Trainer
from nmcompile.training.labels import IGNORED, check_labels, without
from nmcompile.training.local import Local, train_blocks
from nmcompile.training.outputs import outputs_of, width_of
from nmcompile.training.pair import Pair
from nmcompile.training.policies import Layer, Policy, make
from nmcompile.training.quantized import behind_pairs
from nmcompile.training.ranks import Ranks
from nmcompile.training.recipe import Recipe

Tell = Callable[[str, int, int], None]  # (what, done, total)
MEASURED, MEASURED_TOKENS = 256, 12_288  # samples held out at most, and their tokens
LOCAL_TOKENS = 65536  # whose activations block-local training holds
CALIBRATION = 256  # samples that ranges are taken from
TAIL = 0.1  # of the learning rate, where a training ends with eight bits


@dataclass(frozen=True)
class Masked:
    """What pruning decided of a layer: its goal, and its mask [N, K] of bool."""

    goal: Goal
    mask: np.ndarray


@dataclass(frozen=True)
class Trained:
    """masks: [N, K] by layer, as they are now. start, end: the loss on held-out samples. history: stages and steps with
    their loss and seconds. notes: remarks."""

    graph: gs.Graph
    masks: Mapping[str, np.ndarray]
    start: float
    end: float
    history: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()


def train(
    dense: gs.Graph, graph: gs.Graph, masked: Mapping[str, Masked], data: Data, recipe: Recipe,
    tell: Tell = lambda *_: None, checkpoints: Path | None = None,
) -> Trained:  # fmt: skip
    """Train a pruned graph to compute what the dense one does, on samples of its inputs; neither graph is changed.

    Both are canonical, with tensors of the same names. The result is never worse on held-out samples than what came,
    and its zeros are where its masks are. CalibrationError: too few samples, labels that do not fit, a loss that is not
    finite; UnsupportedError: an operator without a gradient, a device that is not there.
    """
    if not masked:
        raise PassError("nothing is pruned, so there is nothing to train; give --sparsity and --pattern")
    torch.manual_seed(recipe.seed)
    key = checkpoint.key_of(graph, data, recipe) if checkpoints is not None else ""
    run = _Run(time.monotonic(), graph, data, recipe, tell, checkpoints, key)
    pair = Pair.of(dense, graph, list(masked), run.samples, run.ranks.device, recipe.half,
                   recipe.embeddings)  # fmt: skip
    masked = run.agree(pair, masked)
    trainer = run.trainer(pair, masked, "distil")
    start = end = trainer.measure()
    history: list[dict[str, Any]] = []
    masks: Mapping[str, torch.Tensor] = {}
    notes: list[str] = []
    if recipe.qat < 1:
        run.go(trainer, masked, recipe.budget * (1 - recipe.qat))
        _check_steps(trainer, recipe)
        history, masks, end = trainer.history, trainer.progress.masks, trainer.progress.best
    if recipe.qat:
        few = replace(run.samples, rows=run.samples.rows[:CALIBRATION]).without(recipe.labels)
        behind = behind_pairs(pair, Calibration(few), recipe.scheme)
        now = {name: replace(item, mask=masks[name].cpu().numpy().T) if name in masks else item
               for name, item in masked.items()}  # fmt: skip
        tail = run.trainer(behind.pair, now, "quantized")
        run.go(tail, now, recipe.budget)
        if not tail.progress.steps:
            notes = ["no time was left to train with eight bits; give more budget, or a larger share for it"]
        if recipe.qat == 1:
            _check_steps(tail, recipe)
        history = [*history, *tail.history]
        if tail.progress.steps and tail.progress.best < tail.history[0]["loss"]:
            behind.take_back()
            masks, end = tail.progress.masks, trainer.measure()
    final = {name: mask.cpu().numpy().T for name, mask in masks.items()}
    return Trained(pair.student.graph(), final, start, end, tuple(history), tuple(notes))


def _check_steps(trainer: Trainer, recipe: Recipe) -> None:
    if not trainer.progress.steps:
        raise PassError(f"a budget of {recipe.budget:g} s leaves no time for a step of training; give more")


def check(recipe: Recipe, graph: gs.Graph | None = None) -> None:
    """NmcompileError for a device, other processes, masks or options of theirs that there are not, and for a graph with
    an operator that has no gradient; long before the training begins."""
    _check_device(recipe.device)
    Ranks.joined(recipe.device)
    make(recipe.masks, {}, 1, recipe.options)
    if graph is not None:
        Module(graph)


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device} is not there: torch finds no CUDA GPU; leave --device out for the CPU")
    try:
        torch.device(device)
    except RuntimeError:
        raise UnsupportedError(f"device {device!r} is not known; write cpu or cuda") from None


class _Run:
    """What the stages of one training share: samples, outputs, time, checkpoints."""

    def __init__(
        self, begun: float, graph: gs.Graph, data: Data, recipe: Recipe, tell: Tell, checkpoints: Path | None, key: str
    ) -> None:
        self.begun, self.graph, self.recipe, self.tell = begun, graph, recipe, tell
        self.checkpoints, self.key, self.ranks = checkpoints, key, Ranks.joined(recipe.device)
        data = replace(data, fills=dict.fromkeys(recipe.labels, IGNORED))
        self.samples, held = parted(data, MEASURED, MEASURED_TOKENS)
        self.held = Batches(held, recipe.tokens, recipe.seed).epoch(0)

    def agree(self, pair: Pair, masked: Mapping[str, Masked]) -> Mapping[str, Masked]:
        """What the first process has pruned, for all: weights in place, and masks."""
        self.ranks.share(pair.student.parameters())
        if self.ranks.count == 1:
            return masked
        masks = {name: torch.from_numpy(np.ascontiguousarray(item.mask, np.uint8)).to(pair.device)
                 for name, item in masked.items()}  # fmt: skip
        self.ranks.share(masks.values())
        return {name: replace(item, mask=masks[name].cpu().numpy().astype(bool)) for name, item in masked.items()}

    def trainer(self, pair: Pair, masked: Mapping[str, Masked], stage: str) -> Trainer:
        """Of one end-to-end stage."""
        recipe, quantized = self.recipe, stage == "quantized"
        width = width_of(self.graph, list(masked))
        outputs = outputs_of(self.graph, width)
        if recipe.labels:
            check_labels(self.samples, recipe.labels, self.graph, outputs)
        late = quantized and recipe.qat < 1  # a tail: masks are found, weights nearly
        masks, options = ("fixed", {}) if late else (recipe.masks, recipe.options)
        share = recipe.qat if quantized else 1 - recipe.qat
        kept = sum(np.count_nonzero(item.mask) for item in masked.values())
        sparsity = 1 - kept / sum(item.mask.size for item in masked.values())
        how = EndToEnd(recipe.rate(width, sparsity) * (TAIL if late else 1.0), recipe.tokens,
                       steps=math.ceil(recipe.steps * share),
                       loss=recipe.loss, labels=recipe.labels, stage=stage)  # fmt: skip
        once: dict[str, str] = {}  # a weight that several layers share has one mask
        for name in masked:
            once.setdefault(pair.weights[name], name)

        def policy(steps: int) -> Policy[Any]:
            layers = {name: Layer(pair.student.initializers[weight], masked[name].goal, _mask(pair, masked[name].mask))
                      for weight, name in once.items()}  # fmt: skip
            return make(masks, layers, steps, options)

        return Trainer(pair, Batches(self.samples, recipe.tokens, recipe.seed), self.held, outputs, how, policy,
                       self.ranks)  # fmt: skip

    def go(self, trainer: Trainer, masked: Mapping[str, Masked], until: float) -> None:
        """Run a stage until so many seconds of the budget are over, from its checkpoint on where there is one."""
        spent = None
        if self.checkpoints is not None:
            spent = checkpoint.load(self.checkpoints, self.key, trainer)
        if spent is not None:
            self.begun = min(self.begun, time.monotonic() - spent)

        def left() -> float:
            return until - (time.monotonic() - self.begun)

        stage = trainer.how.stage
        if spent is None and self.recipe.local and stage == "distil":
            trainer.history += _local(trainer, masked, self.recipe, left, self.tell)
            self.ranks.share(trainer.pair.student.parameters())
        what = "training" if stage == "distil" else "training with eight bits"
        first = next((entry["loss"] for entry in trainer.history if "loss" in entry), None)  # of a run that goes on
        begun = "" if first is None else f"(began at {first:.4g})"

        def told(step: int, steps: int, found: float) -> None:
            nonlocal begun
            begun = begun or f"(began at {found:.4g})"
            self.tell(f"{what}, held-out loss {found:.4g} {begun}", step, steps)

        def save(trainer: Trainer) -> None:
            if self.checkpoints is not None and self.ranks.first:
                checkpoint.save(self.checkpoints, self.key, trainer, time.monotonic() - self.begun)

        trainer.run(left, told, save)


def _mask(pair: Pair, mask: np.ndarray) -> torch.Tensor:
    """[K, N], where the student is."""
    return torch.from_numpy(np.ascontiguousarray(mask.T)).to(pair.device)


def _local(
    trainer: Trainer, masked: Mapping[str, Masked], recipe: Recipe, left: Callable[[], float], tell: Tell
) -> list[dict[str, Any]]:
    """Block-local training, undone where held-out samples do not like it."""
    pair = trainer.pair
    count = max(LOCAL_TOKENS // recipe.tokens, 1)
    held = [without(feeds, recipe.labels) for feeds in islice(trainer.batches, count)]
    masks = {pair.weights[name]: _mask(pair, item.mask).float() for name, item in masked.items()}
    before, start = trainer.measure(), trainer.now()
    history: list[dict[str, Any]] = []

    def told(block: int, blocks: int, first: float, last: float) -> None:
        history.append({"stage": "local", "block": pair.blocks[block].end, "before": first, "after": last})
        tell(f"training blocks, error {first:.4g} -> {last:.4g}", block + 1, blocks)

    until = left() - recipe.budget * recipe.local
    train_blocks(pair, held, masks, Local(lr=trainer.how.lr / 3), told, lambda: left() - until)
    after = trainer.measure()
    history.append({"stage": "local", "before": before, "after": after})
    if not after < before:
        trainer.set(start)
    return history
