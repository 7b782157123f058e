"""What a policy of masks is asked in each step of training, and what they all share.

    loss = task(...) ; extra = policy.penalty() ; loss = loss if extra is None else loss + extra
    loss.backward()
    policy.after_backward(step)        # then clip: the norm is that of gradients that count
    optimizer.step()
    policy.after_step(step, optimizer)

The forward pass multiplies by policy.effective(name, weight). Make a policy before weights and optimizer of a
checkpoint are loaded, then load its own state. Weights are [K, N] as in ONNX; masks of nmcompile.sparsity are of
their transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from nmcompile.errors import PassError
from nmcompile.prune.plan import Goal
from nmcompile.training import projection
from nmcompile.training.policies.optimizer_state import forget

Tensor = torch.Tensor
Optimizer = torch.optim.Optimizer
Options = TypeVar("Options")


@dataclass(frozen=True)
class Layer:
    """What a policy acts on. weight: Parameter [K, N], given once however many layers read it. goal: the zeros it
    ends with. mask: bool [K, N], what is kept at the start; all of it for a dense start."""

    weight: torch.nn.Parameter
    goal: Goal
    mask: Tensor


class Policy(ABC, Generic[Options]):
    """Decides which weights are zero while training goes on.

    steps: of the whole training, numbered from 0. Masks may move until `until` steps are done; from then on they are
    frozen: what is zero gets no gradient and stays zero, momentum and decay included. `held` is what a resumed run
    must have: tensors by kind and layer.
    """

    def __init__(self, layers: Mapping[str, Layer], steps: int, options: Options) -> None:
        if steps < 1:
            raise PassError(f"{steps} steps of training are none; ask for at least 1")
        self.layers, self.steps, self.options = dict(layers), steps, options
        owners: dict[int, str] = {}
        for name, layer in self.layers.items():
            if layer.weight.ndim != 2 or layer.mask.shape != layer.weight.shape:
                raise PassError(f"layer {name}: a mask {list(layer.mask.shape)} does not fit a weight "
                                f"{list(layer.weight.shape)}; give [inputs, outputs] for both")  # fmt: skip
            first = owners.setdefault(id(layer.weight), name)
            if first != name:
                raise PassError(f"layers {first} and {name} share one weight; give it once, its mask is of the weight")
        self.held: dict[str, dict[str, Tensor]] = {
            "masks": {name: item.mask.to(item.weight.device, torch.bool, copy=True) for name, item in layers.items()}
        }
        self._frozen = False

    @property
    @abstractmethod
    def until(self) -> int:
        """After how many steps masks freeze."""

    @abstractmethod
    def chosen(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        """The final masks [K, N], of the goals, from what is known now."""

    def collect(self, step: int) -> None:
        """See and change gradients while masks may move."""

    def move(self, step: int, optimizer: Optimizer) -> None:
        """Change weights and masks after a step while masks may move."""

    @property
    def frozen(self) -> bool:
        """Whether masks no longer move from now on."""
        return self._frozen

    @property
    def masks(self) -> dict[str, Tensor]:
        """What is kept now, bool [K, N]."""
        return self.held["masks"]

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """What the forward pass multiplies by; differentiable, in some policies straight through the mask."""
        return weight

    def penalty(self) -> Tensor | None:
        """What is added to the loss; None: nothing."""
        return None

    def after_backward(self, step: int) -> None:
        """Gradients are there and not yet clipped: mask them, add to them, learn from them."""
        if not self._frozen:
            self.collect(step)
            return
        for name, layer in self.layers.items():
            mask_gradient(layer.weight, self.masks[name])

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """The optimizer has stepped: zeros are zero again, masks move where it is time."""
        if self._frozen:
            self._clear()
            return
        self.move(step, optimizer)
        if step + 1 >= self.until:
            self._freeze(optimizer)

    def finish(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        """The final masks; weights are zero outside of them. As many units are gone as the goals say."""
        if not self._frozen:
            self._freeze(optimizer)
        self._clear()
        return {name: mask.clone() for name, mask in self.masks.items()}

    def realised(self) -> dict[str, float]:
        """The share of zeros in what the forward pass multiplies by, by layer."""
        with torch.no_grad():
            return {name: float((self.effective(name, layer.weight) == 0).double().mean())
                    for name, layer in self.layers.items()}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-identical resume needs beside weights and optimizer: tensors, strings and booleans."""
        held = {kind: {name: item.clone() for name, item in table.items()} for kind, table in self.held.items()}
        return {"frozen": self._frozen, "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the policy whose state this is; PassError where it had other layers."""
        if set(state["held"]["masks"]) != set(self.layers):
            raise PassError("the checkpoint's masks are of other layers; resume with the options it was made with")
        self._frozen = bool(state["frozen"])
        self.held = {kind: {name: item.to(self.layers[name].weight.device, copy=True) for name, item in table.items()}
                     for kind, table in state["held"].items()}  # fmt: skip

    def renew(self, name: str, mask: Tensor, optimizer: Optimizer | None, zero: bool = True) -> None:
        """A new mask: what the optimizer remembers of weights outside of it and of those that came back is forgotten.
        zero: weights outside become zero."""
        weight = self.layers[name].weight
        forgotten = ~mask | (mask != self.masks[name])
        self.masks[name] = mask
        if zero:
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
        if optimizer is not None:
            forget(optimizer, weight, forgotten)

    def masks_of(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks [K, N] of the goals, from scores [K, N]."""
        return {name: keep_of(scores[name], layer.goal) for name, layer in self.layers.items()}

    def _freeze(self, optimizer: Optimizer | None) -> None:
        for name, mask in self.chosen(optimizer).items():
            self.renew(name, mask, optimizer)
        self.held = {"masks": self.masks}
        self._frozen = True

    def _clear(self) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.masked_fill_(~self.masks[name], 0)


def keep_of(scores: Tensor, goal: Goal) -> Tensor:
    """The mask [K, N] that scores [K, N] give for a goal."""
    return projection.keep(scores.detach().T, goal.pattern, goal.sparsity).T.contiguous()


def through(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight; its gradient reaches all weights (straight-through estimator, Bengio et al., arXiv
    1308.3432)."""
    return weight + (weight.masked_fill(~mask, 0) - weight).detach()


def mask_gradient(weight: Tensor, mask: Tensor) -> None:
    """No gradient outside of a mask."""
    if weight.grad is not None:
        weight.grad.masked_fill_(~mask, 0)


def share(value: float, name: str) -> None:
    """PassError where an option is no share of the steps or weights."""
    if not 0 <= value <= 1:
        raise PassError(f"{name}={value:g} is not a share between 0 and 1")
