"""What an optimizer remembers of a weight."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
Optimizer = torch.optim.Optimizer


def forget(optimizer: Optimizer, weight: Tensor, where: Tensor) -> None:
    """Momentum and second moments are zero there."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0)


def second_moment(optimizer: Optimizer | None, weight: Tensor) -> Tensor | None:
    """Adam's running mean of squared gradients, the diagonal of the Fisher information; None: it holds none."""
    found = None if optimizer is None else optimizer.state.get(weight, {}).get("exp_avg_sq")
    return found if isinstance(found, torch.Tensor) else None


def rates(optimizer: Optimizer) -> dict[int, float]:
    """The learning rate of each parameter, by its id."""
    return {id(weight): float(group["lr"]) for group in optimizer.param_groups for weight in group["params"]}
