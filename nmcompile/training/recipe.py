"""How a training goes: its budget, stages, masks, losses; one frozen value that the command line and passes build."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nmcompile.errors import PassError
from nmcompile.qdq.scheme import CPU, TENSORRT, Scheme, known
from nmcompile.training.losses import Distillation

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
LEAST = 1.0  # seconds
SPARSE, LEAST_SPARSE = 0.8, 0.3  # sparsity from which on the learning rate is the whole, and to which it falls
SCHEMES = {"cpu": CPU, "tensorrt": TENSORRT}


@dataclass(frozen=True)
class Recipe:
    """budget: seconds, from the start of pruning on. masks: a policy (nmcompile.training.policies) and its options.
    lr (0: what is usual for the model's width), tokens (of a step, padding included), steps (0: as many as the
    budget allows): of the end-to-end stage. local: the share of the budget for block-local distillation, 0 leaves
    it out. embeddings: their tables are trained as well. qat: the share in which products read what is rounded to
    eight bits as `target` rounds it, 1 for all of the end-to-end stage. labels: the inputs that hold the samples'
    classes or answers. device: "cpu", "cuda". half: products in bfloat16; None where the device is faster at them.
    seed: of the order of samples."""

    budget: float = 600.0
    masks: str = "fixed"
    options: Mapping[str, object] = field(default_factory=dict)
    lr: float = 0.0
    tokens: int = 1024
    steps: int = 0
    local: float = 0.0
    embeddings: bool = True
    qat: float = 0.0
    target: str = "cpu"
    labels: tuple[str, ...] = ()
    loss: Distillation = field(default_factory=Distillation)
    device: str = "cpu"
    half: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """PassError for what cannot be."""
        if self.budget < LEAST:
            raise PassError(f"a budget of {self.budget:g} s is too short for one step; give for example 10m")
        if not 0 <= self.local < 1:
            raise PassError(f"local={self.local:g} is not a share of the budget; 0.2 is much, 0 leaves the stage out")
        if not 0 <= self.qat <= 1:
            raise PassError(f"qat={self.qat:g} is not a share of the budget; 0.15 is usual, 1 is all of it")
        known("target", self.target, tuple(SCHEMES))
        if not 0 <= self.lr <= 1:
            raise PassError(f"lr={self.lr:g} is no learning rate; 1e-3 is usual for 384 features, 3e-4 for 768, and 0 "
                            "takes what is usual")  # fmt: skip
        if self.tokens < 1 or self.steps < 0:
            raise PassError(f"tokens={self.tokens}, steps={self.steps}: a step takes at least 1 token")

    def rate(self, width: int | None, sparsity: float = SPARSE) -> float:
        """The learning rate for a stream of so many features and a model of so many zeros: 1e-3 up to 384 at 80 %, 3e-4
        for 768, beyond by that power; below 80 % by the square, since a high rate soon ruins what lost little."""
        zeros = min(max(sparsity, LEAST_SPARSE) / SPARSE, 1.0)
        return self.lr or 1e-3 * (max(width or 384, 384) / 384) ** -1.74 * zeros**2

    @property
    def scheme(self) -> Scheme:
        """What is rounded while training: biases need no correction, they are trained."""
        return replace(SCHEMES[self.target], clip="output", alpha=0.0)


def seconds(text: str) -> float:
    """Of a time written 90, 90s, 10m, 1.5h. PassError for what is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)", text.strip().lower())
    if match is None:
        raise PassError(f"'{text}' is not a time; write for example 90s, 10m or 1.5h")
    return float(match[1]) * UNITS[match[2]]
