"""Training of a pruned graph: stage by stage, each kept only if held-out samples say that it is better.

dense, graph, masks, data -> train -> Trained: the graph with other weights, zeros where the masks are
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch

from nmcompile.calibrate import Data
from nmcompile.errors import PassError, UnsupportedError
from nmcompile.prune.plan import Goal
from nmcompile.torch import Module
from nmcompile.training import checkpoint
from nmcompile.training.batches import Batches, parted
from nmcompile.training.distil import EndToEnd, Trainer
from nmcompile.training.local import Local, train_blocks
from nmcompile.training.outputs import outputs_of, width_of
from nmcompile.training.pair import Pair
from nmcompile.training.policies import Layer, Policy, make
from nmcompile.training.recipe import Recipe

Tell = Callable[[str, int, int], None]  # (what, done, total)
MEASURED = 256  # samples held out at most
LOCAL_TOKENS = 65536  # whose activations block-local training holds


@dataclass(frozen=True)
class Masked:
    """What pruning decided of a layer: its goal, and its mask [N, K] of bool."""

    goal: Goal
    mask: np.ndarray


@dataclass(frozen=True)
class Trained:
    """masks: [N, K] by layer, as they are now. start, end: the loss on held-out samples. history: stages and steps with
    their loss and seconds."""

    graph: gs.Graph
    masks: Mapping[str, np.ndarray]
    start: float
    end: float
    history: tuple[Mapping[str, Any], ...]


def train(
    dense: gs.Graph, graph: gs.Graph, masked: Mapping[str, Masked], data: Data, recipe: Recipe,
    tell: Tell = lambda *_: None, checkpoints: Path | None = None,
) -> Trained:  # fmt: skip
    """Train a pruned graph to compute what the dense one does, on unlabelled samples; neither graph is changed.

    Both are canonical, with tensors of the same names. The result is never worse on held-out samples than what came,
    and its zeros are where its masks are. CalibrationError: too few samples, a loss that is not finite;
    UnsupportedError: an operator without a gradient, a device that is not there.
    """
    if not masked:
        raise PassError("nothing is pruned, so there is nothing to train; give --sparsity and --pattern")
    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    samples, held = parted(data, MEASURED)
    pair = Pair.of(dense, graph, list(masked), samples, recipe.device, recipe.half)
    trainer = _trainer(pair, samples, held, graph, masked, recipe)
    key = checkpoint.key_of(graph, data, recipe) if checkpoints is not None else ""
    spent = checkpoint.load(checkpoints, key, trainer) if checkpoints is not None else None
    begun = start - (spent or 0.0)

    def left() -> float:
        return recipe.budget - (time.monotonic() - begun)

    before = trainer.measure() if spent is None else trainer.history[0]["loss"]
    history: list[Mapping[str, Any]] = []
    if spent is None and recipe.local:
        history += _local(pair, trainer, masked, recipe, left, tell)
    loss = [before]

    def told(step: int, steps: int, found: float) -> None:
        loss.append(found)
        tell(f"training, held-out loss {found:.4g} (began at {before:.4g})", step, steps)

    def save(trainer: Trainer) -> None:
        if checkpoints is not None:
            checkpoint.save(checkpoints, key, trainer, time.monotonic() - begun)

    trainer.run(left, told, save)
    if trainer.policy is None or not trainer.progress.steps:
        raise PassError(f"a budget of {recipe.budget:g} s leaves no time for a step of training; give more")
    history += [{"stage": "distil", **entry} for entry in trainer.history]
    masks = {name: mask.cpu().numpy().T for name, mask in trainer.progress.masks.items()}
    return Trained(pair.student.graph(), masks, before, trainer.progress.best, tuple(history))


def check(recipe: Recipe, graph: gs.Graph | None = None) -> None:
    """NmcompileError for a device, masks or options of theirs that there are not, and for a graph with an operator that
    has no gradient; long before the training begins."""
    _check_device(recipe.device)
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


def _trainer(
    pair: Pair, samples: Data, held: Data, graph: gs.Graph, masked: Mapping[str, Masked], recipe: Recipe
) -> Trainer:
    how = EndToEnd(recipe.lr, recipe.tokens, steps=recipe.steps, loss=recipe.loss)
    once: dict[str, str] = {}  # a weight that several layers share has one mask
    for name in masked:
        once.setdefault(pair.weights[name], name)

    def policy(steps: int) -> Policy[Any]:
        layers = {name: Layer(pair.student.initializers[weight], masked[name].goal, _mask(pair, masked[name].mask))
                  for weight, name in once.items()}  # fmt: skip
        return make(recipe.masks, layers, steps, recipe.options)

    outputs = outputs_of(graph, width_of(graph, list(masked)))
    batches = Batches(samples, recipe.tokens, recipe.seed)
    measured = Batches(held, recipe.tokens, recipe.seed).epoch(0)
    return Trainer(pair, batches, measured, outputs, how, policy)


def _mask(pair: Pair, mask: np.ndarray) -> torch.Tensor:
    """[K, N], where the student is."""
    return torch.from_numpy(np.ascontiguousarray(mask.T)).to(pair.device)


def _local(
    pair: Pair, trainer: Trainer, masked: Mapping[str, Masked], recipe: Recipe, left: Callable[[], float], tell: Tell
) -> list[Mapping[str, Any]]:
    """Block-local training, undone where held-out samples do not like it."""
    count = max(LOCAL_TOKENS // recipe.tokens, 1)
    held = list(islice(trainer.batches, count))
    masks = {pair.weights[name]: _mask(pair, item.mask).float() for name, item in masked.items()}
    before, start = trainer.measure(), trainer.now()
    history: list[Mapping[str, Any]] = []

    def told(block: int, blocks: int, first: float, last: float) -> None:
        history.append({"stage": "local", "block": pair.blocks[block].end, "before": first, "after": last})
        tell(f"training blocks, error {first:.4g} -> {last:.4g}", block + 1, blocks)

    until = left() - recipe.budget * recipe.local
    train_blocks(pair, held, masks, Local(lr=recipe.lr / 3), told, lambda: left() - until)
    after = trainer.measure()
    history.append({"stage": "local", "before": before, "after": after})
    if not after < before:
        trainer.set(start)
    return history
