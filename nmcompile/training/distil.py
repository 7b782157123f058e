"""End-to-end distillation: feature maps and outputs follow the dense model's, masks follow a policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch

from nmcompile.errors import CalibrationError
from nmcompile.training.batches import Batches, Feeds
from nmcompile.training.labels import of_labels, scores_of, without
from nmcompile.training.losses import Bank, Distillation, Output, of_features, of_output
from nmcompile.training.pair import Pair
from nmcompile.training.policies import Policy
from nmcompile.training.ranks import ALONE, Ranks
from nmcompile.training.weighing import sensitivities

Tensor = torch.Tensor
Tell = Callable[[int, int, float], None]  # step, steps, loss on held-out samples
TRIALS = 4  # steps that are timed before a number of them is planned
EARLY = (64, 32, 16)  # parts of the steps after which is looked, beside those
RUINED = 1.25  # times the best loss: what the first steps break at a high rate is not mended in the rest
FELT = 8  # batches that weights of feature maps are found by
LOOKS, SEEING = 12, 0.15  # at the held-out samples: how often at most, and for which share of the time


@dataclass(frozen=True)
class EndToEnd:
    """lr: of AdamW, after a warm-up (a share of the steps) by cosine to zero. tokens: of a step, padding included.
    labels: the inputs that hold the samples' classes or answers. stage: what this is called in the history."""

    lr: float = 5e-4
    tokens: int = 1024
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    steps: int = 0  # 0: as many as the time allows
    loss: Distillation = field(default_factory=Distillation)
    labels: tuple[str, ...] = ()
    stage: str = "distil"


@dataclass
class Progress:
    """Where a training is: what a checkpoint holds beside weights, optimizer and policy. scale: of the learning rate,
    which rises anew from the step `since` on."""

    step: int = 0
    steps: int = 0
    best: float = math.inf
    scale: float = 1.0
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # those of the best state
    masks: dict[str, Tensor] = field(default_factory=dict)  # its masks, by layer


class Trainer:
    """One end-to-end training of a pair, step by step."""

    def __init__(
        self, pair: Pair, batches: Batches, held: Sequence[Feeds], outputs: Sequence[Output], how: EndToEnd,
        policy: Callable[[int], Policy[Any]], ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.pair, self.batches, self.held, self.outputs, self.how = pair, batches, held, outputs, how
        self.progress, self.ranks, self.looks = Progress(), ranks, LOOKS
        self._policy_of = policy
        self._weights = {name: pair.student.initializers[name] for name in pair.trained}
        self.policy: Policy[Any] | None = None
        self.bank = Bank()
        self.history: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self.optimizer = torch.optim.AdamW(self._weights.values(), how.lr, how.betas, weight_decay=0.0, fused=True)

    def loss(self, feeds: Feeds, bank: Bank | None = None) -> Tensor:
        """What the student loses on a batch; bank: of a step."""
        pair, how = self.pair, self.how.loss
        inputs = without(feeds, self.how.labels)
        mask = pair.mask(inputs)
        with pair.precision():
            with torch.no_grad():
                wanted = pair.teacher(inputs)
            given = pair.student(inputs)
        total = how.features * of_features(given, wanted, pair.ends, mask, self._felt) if pair.ends else 0.0
        for output in self.outputs:
            total = total + how.outputs * of_output(output, given[output.name], wanted[output.name], mask, how, bank)
        if self.how.labels:
            for label, name in zip(self.how.labels, scores_of(self.outputs, self.how.labels), strict=True):
                total = total + how.labels * of_labels(given[name], feeds[label]) / len(self.how.labels)
        assert isinstance(total, Tensor)
        return total

    @cached_property
    def _felt(self) -> Tensor | None:
        """The weights of feature maps; None where all are alike. Of the dense model alone, so the same in a run that
        goes on and in other processes."""
        if self.how.loss.weighing == "uniform":
            return None
        first = (without(feeds, self.how.labels) for feeds in islice(self.batches.since(0), FELT))
        return sensitivities(self.pair, first, self.outputs)

    def measure(self) -> float:
        """The loss on held-out samples, in full precision of sums."""
        with torch.no_grad():
            return float(torch.stack([self.loss(feeds) for feeds in self.held]).mean())

    def plan(self, seconds: float) -> int:
        """How many steps fit into some seconds, by a few whose gradients are thrown away."""
        if self.how.steps:
            return self.how.steps
        spent = []
        for _, feeds in zip(range(TRIALS), self.batches, strict=False):
            start = time.perf_counter()
            self.loss(feeds).backward()
            self.optimizer.zero_grad()
            spent.append(time.perf_counter() - start)
        start = time.perf_counter()
        self.measure()
        look = time.perf_counter() - start
        self.looks = min(max(int(seconds * SEEING / look), 2), LOOKS)
        looks = look * (self.looks + len(EARLY))
        each = 1.1 * sum(spent[1:] or spent) / max(len(spent) - 1, 1)
        return max(int((seconds - sum(spent) - looks) / each), 0)

    def run(self, left: Callable[[], float], tell: Tell, save: Callable[[Trainer], None] | None = None) -> None:
        """Train until the planned steps or the seconds are over; the best state on held-out samples stays.
        CalibrationError where the loss becomes NaN."""
        progress = self.progress
        if self.policy is None:
            self.begin(int(self.ranks.agreed(self.plan(left()))))
        assert self.policy is not None
        if progress.steps < 1:
            return
        if progress.step == 0:
            self._look(tell)
        ranks = self.ranks
        stream = islice(self.batches.since(progress.step * ranks.count + ranks.rank), 0, None, ranks.count)
        begun = (progress.step, time.monotonic())
        every = max(progress.steps // self.looks, 1)
        early = {max(progress.steps // part, 2) for part in EARLY}
        while progress.step < progress.steps and ranks.agreed(left()) > 0:
            self._step(next(stream))
            if progress.step % every == 0 or progress.step in early or progress.step == progress.steps:
                self._look(tell)
                self._replan(ranks.agreed(left()), begun)
                if save is not None:
                    save(self)
        if not self.policy.frozen:
            self.policy.finish(self.optimizer)
            self._look(tell)
        self._restore()

    def begin(self, steps: int) -> None:
        """Fix the number of steps, which learning rates and masks follow."""
        self.progress.steps = steps
        self.policy = self._policy_of(max(steps, 1))
        for name in self.policy.layers:
            self.pair.student.effective[self.pair.weights[name]] = partial(self.policy.effective, name)

    def _step(self, feeds: Feeds) -> None:
        progress, policy = self.progress, self.policy
        assert policy is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.lr * progress.scale * rate(progress, self.how.warmup)
        loss = self.loss(feeds, self.bank)
        extra = policy.penalty()
        loss = loss if extra is None else loss + extra
        if not math.isfinite(self.ranks.mean(loss)):
            raise CalibrationError(f"the loss is not finite in step {progress.step + 1}; take a lower learning rate, "
                                   "or look for huge values in the data")  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        self.ranks.average(self._weights.values())
        policy.after_backward(progress.step)
        torch.nn.utils.clip_grad_norm_(self._weights.values(), self.how.clip)
        self.optimizer.step()
        policy.after_step(progress.step, self.optimizer)
        progress.step += 1

    def _look(self, tell: Tell) -> None:
        """Measure; remember the weights if no others were better with masks that no longer move."""
        progress, policy, found = self.progress, self.policy, self.ranks.agreed(self.measure())
        assert policy is not None
        tell(progress.step, progress.steps, found)
        entry = {"step": progress.step, "loss": found, "seconds": time.monotonic() - self._start}
        self.history.append({"stage": self.how.stage, **entry})
        if (policy.frozen or progress.step == 0) and found < progress.best:
            progress.best, progress.weights = found, self.now()
            progress.masks = {name: mask.clone() for name, mask in policy.masks.items()}
        elif found > RUINED * progress.best and self._comparable():
            self._step_back()

    def _comparable(self) -> bool:
        """Whether the best state has the masks of now."""
        policy, best = self.policy, self.progress.masks
        assert policy is not None
        return policy.frozen and all(torch.equal(mask, best[name]) for name, mask in policy.masks.items())

    def _step_back(self) -> None:
        """Go on from the best state at half the learning rate."""
        progress = self.progress
        self.set(progress.weights)
        self.optimizer.state.clear()
        progress.scale, progress.since = progress.scale / 2, progress.step
        self.history[-1]["rate"] = progress.scale

    def _replan(self, left: float, begun: tuple[int, float]) -> None:
        """As many steps more as the time allows at the pace so far, where no number was asked for."""
        done, progress = self.progress.step - begun[0], self.progress
        if self.how.steps or done < 1 or progress.step >= progress.steps:
            return
        each = self.ranks.agreed((time.monotonic() - begun[1]) / done)  # looks at held-out samples included
        progress.steps = progress.step + max(int(left / each), 1)

    def now(self) -> dict[str, Tensor]:
        """Copies of what is trained, by initializer."""
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    def set(self, weights: Mapping[str, Tensor]) -> None:
        """Put values in the place of what is trained."""
        with torch.no_grad():
            for name, values in weights.items():
                self._weights[name].copy_(values)

    def _restore(self) -> None:
        self.set(self.progress.weights)
        self.pair.student.effective.clear()


def rate(progress: Progress, warmup: float) -> float:
    """The learning rate's factor: up in a line, down by a cosine."""
    rise = max(int(progress.steps * warmup), 1)
    risen = min((progress.step - progress.since + 1) / rise, 1.0)
    gone = max(progress.step - rise, 0) / max(progress.steps - rise, 1)
    return risen * 0.5 * (1 + math.cos(math.pi * min(gone, 1.0)))
