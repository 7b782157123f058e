"""How much the outputs feel an error of each feature map: what its part of the loss may be weighed by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from nmcompile.training.batches import Feeds
from nmcompile.training.losses import Output, pooled
from nmcompile.training.pair import Pair

Tensor = torch.Tensor
LEAST, MOST = 0.1, 10.0  # of the mean


def sensitivities(pair: Pair, batches: Iterable[Feeds], outputs: Sequence[Output], seed: int = 0) -> Tensor:
    """Of each of `pair.ends` [count], their mean 1: the energy that a relative error there, in no direction, has at the
    dense model's outputs, |J^T r|^2 |h|^2 / size for a random direction r (Hutchinson), over real tokens."""
    module, ends = pair.teacher, pair.ends
    first = module.part(ends[:1])
    rest = module.part((*ends[1:], *(output.name for output in outputs)), ends[:1])
    draws = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(ends), device=pair.device)
    for feeds in batches:
        mask = pair.mask(feeds)
        values = module.start(feeds)
        with torch.no_grad():
            module.run(first, values, ends[:1])
        values = module.start(feeds) | {ends[0]: values[ends[0]].detach().requires_grad_()}
        with torch.enable_grad():
            module.run(rest, values, (*ends, *(output.name for output in outputs)))
            felt = [_felt(output, values[output.name].float(), mask, draws) for output in outputs]
            maps = [values[name] for name in ends]
            gradients = torch.autograd.grad(torch.stack(felt).sum(), maps, allow_unused=True)
        total += torch.stack([_energy(gradient, x.detach(), mask) for gradient, x in zip(gradients, maps, strict=True)])
    if not bool(total.sum() > 0):
        return torch.ones_like(total)
    found = (total / total.mean()).clamp(LEAST, MOST)
    return found / found.mean()


def _felt(output: Output, values: Tensor, mask: Tensor | None, draws: torch.Generator) -> Tensor:
    """A random direction of what the loss reads of an output."""
    read = F.normalize(pooled(values, mask), dim=-1) if output.kind in ("embedding", "embeddings") else values
    return (read * torch.randn(read.shape, generator=draws).to(read)).sum()


def _energy(gradient: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
    """|gradient|^2 |x|^2 / elements."""
    if gradient is None:
        return x.new_zeros(())
    real = mask if mask is not None and mask.ndim == x.ndim else torch.ones_like(x[..., :1])
    count = real.sum() * x[0].numel() / real[0].numel()
    return (gradient * real).float().square().sum() * (x * real).float().square().sum() / count
