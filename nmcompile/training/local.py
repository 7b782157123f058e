"""Block-local distillation: each block learns to give, on what the compressed model feeds it, what the dense one has.

Through the non-linearity and the residual (arXiv 2510.14444: a region with a non-linear part is what matters); needs no
output, no label, and the memory of one block's backward pass. Blocks are trained in order, so that each sees the inputs
that the trained ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nmcompile.torch.steps import Step
from nmcompile.training.batches import Feeds
from nmcompile.training.blocks import Block
from nmcompile.training.losses import normalised
from nmcompile.training.pair import Pair

Tensor = torch.Tensor
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Local:
    """lr: of Adam, cosine to zero. epochs: over the tokens held. tokens: how many are held (activations of each stay in
    memory). The rest as usual for reconstruction (EBFT's betas)."""

    lr: float = 3e-4
    epochs: int = 8
    tokens: int = 65536
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass
class _Held:
    """One batch: its feeds, mask of tokens, and the stream behind the block before, of both models."""

    feeds: Feeds
    mask: Tensor | None
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]


def train_blocks(
    pair: Pair, batches: Sequence[Feeds], masks: Masks, how: Local, tell: Callable[[int, int, float, float], None],
    left: Callable[[], float] = lambda: float("inf"),
) -> None:  # fmt: skip
    """Train the blocks of the pair's student in place. masks: by initializer, what may not be zero. tell: block,
    blocks, loss before and after, of each. left: seconds; a block begins only while some are left."""
    held = [_Held(feeds, pair.mask(feeds), {}, {}) for feeds in batches]
    for index, block in enumerate(pair.blocks):
        if left() <= 0:
            return
        share = left() / (len(pair.blocks) - index)
        before, after = _train(pair, block, held, masks, how, share, left)
        tell(index, len(pair.blocks), before, after)


def _train(
    pair: Pair, block: Block, held: list[_Held], masks: Masks, how: Local, share: float, left: Callable[[], float]
) -> tuple[float, float]:
    """One block; (loss before, loss after)."""
    given = [block.start] if block.start else []
    mine, theirs = pair.student.part([block.end], given), pair.teacher.part([block.end], given)
    with torch.no_grad():
        for item in held:
            item.teacher[block.end] = _run(pair, theirs, item.feeds, item.teacher, block, teacher=True)
    names = [name for name in dict.fromkeys(_reads(mine)) if name in pair.trained]
    weights = [pair.student.initializers[name] for name in names]
    before = _measure(pair, mine, held, block)
    kept = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, how.lr, how.betas)
    until, rng = left() - share, np.random.default_rng(0)
    steps = how.epochs * len(held)
    for step in range(steps):
        if step % len(held) == 0:
            order = rng.permutation(len(held))
        if left() < until:
            break
        for group in optimizer.param_groups:
            group["lr"] = how.lr * 0.5 * (1 + float(np.cos(np.pi * step / steps)))
        item = held[order[step % len(held)]]
        loss = normalised(_run(pair, mine, item.feeds, item.student, block), item.teacher[block.end], item.mask)
        optimizer.zero_grad()
        loss.backward()
        for name, weight in zip(names, weights, strict=True):
            if name in masks and weight.grad is not None:
                weight.grad.mul_(masks[name])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, weight in zip(names, weights, strict=True):
                if name in masks:
                    weight.mul_(masks[name])
    after = _measure(pair, mine, held, block)
    if not after < before:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
    with torch.no_grad():
        for item in held:
            item.student = {block.end: _run(pair, mine, item.feeds, item.student, block)}
            item.teacher = {block.end: item.teacher[block.end]}
    return before, min(before, after)


def _run(
    pair: Pair, steps: Sequence[Step], feeds: Feeds, stream: Mapping[str, Tensor], block: Block, teacher: bool = False
) -> Tensor:
    """What a block gives on a stream."""
    module = pair.teacher if teacher else pair.student
    values = module.start(feeds)
    values |= {name: value for name, value in stream.items() if name == block.start}
    with pair.precision():
        module.run(steps, values, [block.end])
    return values[block.end].float()


def _measure(pair: Pair, steps: Sequence[Step], held: Sequence[_Held], block: Block) -> float:
    """The mean loss of a block."""
    with torch.no_grad():
        losses = [normalised(_run(pair, steps, item.feeds, item.student, block), item.teacher[block.end], item.mask)
                  for item in held]  # fmt: skip
    return float(torch.stack(losses).mean())


def _reads(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        yield from (name for name in step.inputs if name)
