"""What a compressed model loses against the dense one: feature maps, logits, embeddings.

features   mean over tensors of |m (S - T)|^2 / |m T|^2, real tokens (SquareHead, Kurtic et al. 2023, arXiv 2310.06927)
logits     KL(teacher || student) at a temperature, times its square (Hinton et al. 2015, arXiv 1503.02531); of large
           vocabularies over the teacher's likeliest classes, the others taken together
embeddings 1 - cosine of pooled vectors, and KL of the rows of similarities: within a batch, or while training to the
           teacher's vectors of the latest batches (as in SEED, Fang et al. 2021, arXiv 2101.04731)
labels     cross entropy with the classes that samples are given with
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from nmcompile.errors import PassError

Tensor = torch.Tensor
Kind = Literal["embedding", "embeddings", "logits", "tokens", "spans"]
WEIGHINGS = ("uniform", "sensitivity")
NEIGHBOURS = 0.05  # temperature of similarities
BANK = 2048  # the teacher's vectors that similarities are taken to
MANY, LIKELIEST = 8192, 512  # classes from which on, and how many of them, are told apart


@dataclass(frozen=True)
class Output:
    """An output of the model, and what it is: a vector per sample (embedding), per token (embeddings), scores of
    classes (logits), of classes per token (tokens), of positions (spans)."""

    name: str
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Weights of the parts. cosine, relations: of an embedding's own direction, and of the similarities within a batch.
    temperature: of logits. labels: of those that samples have, where they have any. weighing: of the feature maps,
    one of WEIGHINGS: all alike, or by what the outputs feel of an error there (nmcompile.training.weighing)."""

    features: float = 1.0
    outputs: float = 1.0
    cosine: float = 5.0
    relations: float = 0.6
    temperature: float = 2.0
    labels: float = 0.5
    weighing: str = "uniform"

    def __post_init__(self) -> None:
        """PassError for what cannot be."""
        parts = (self.features, self.outputs, self.cosine, self.relations, self.labels)
        if min(parts) < 0 or self.features + self.outputs <= 0:
            raise PassError("the loss has no part: features or outputs must be above 0, and no weight below")
        if self.temperature <= 0:
            raise PassError(f"temperature={self.temperature:g} is not above 0; 2 is usual")
        if self.weighing not in WEIGHINGS:
            raise PassError(f"feature maps are weighed '{self.weighing}'; known are {', '.join(WEIGHINGS)}")


class Bank:
    """The teacher's pooled vectors of the latest batches, by output; at most `size` of each."""

    def __init__(self, size: int = BANK) -> None:
        self.size = size
        self.held: dict[str, Tensor] = {}  # [n, width], of length one

    def relations(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """KL of the rows of similarities to what is held, [batch, width] both; then the teacher's are held as well."""
        held, now = self.held.get(name), teacher.detach()
        self.held[name] = (now if held is None else torch.cat((held, now)))[-self.size :].clone()
        if held is None:
            return student.sum() * 0
        return _divergence(student @ held.t() / NEIGHBOURS, teacher @ held.t() / NEIGHBOURS, 1.0, None)


def normalised(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """|m (S - T)|^2 / |m T|^2 as a scalar; mask: of tokens, None for all."""
    lost, whole = student.float() - teacher.float(), teacher.float()
    if mask is not None and mask.ndim == lost.ndim:
        lost, whole = lost * mask, whole * mask
    return _energy(lost) / _energy(whole).clamp_min(1e-12)


def _energy(x: Tensor) -> Tensor:
    """The sum of squares, without a tensor of them."""
    flat = x.flatten()
    return torch.dot(flat, flat)


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """Means over real tokens, [batch, features]."""
    if x.ndim < 3:
        return x
    if mask is None or mask.ndim != x.ndim:
        return x.mean(1)
    return (x * mask).sum(1) / mask.sum(1).clamp_min(1)


def of_output(
    output: Output, student: Tensor, teacher: Tensor, mask: Tensor | None, how: Distillation, bank: Bank | None = None
) -> Tensor:
    """The loss of one output as a scalar; bank: what similarities are taken to, None for those within the batch."""
    student, teacher = student.float(), teacher.float()
    if output.kind in ("embedding", "embeddings"):
        a, b = F.normalize(pooled(student, mask), dim=-1), F.normalize(pooled(teacher, mask), dim=-1)
        related = _relations(a, b) if bank is None else bank.relations(output.name, a, b)
        return how.cosine * (1 - (a * b).sum(-1)).mean() + how.relations * related
    if output.kind == "tokens":
        return _divergence(student, teacher, how.temperature, mask)
    if output.kind == "spans" and mask is not None and mask.squeeze(-1).shape == student.shape:
        hidden = mask.squeeze(-1) == 0
        student, teacher = student.masked_fill(hidden, -1e4), teacher.masked_fill(hidden, -1e4)
    return _divergence(student, teacher, how.temperature, None)


def of_features(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], names: Sequence[str], mask: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean error of feature maps, each times its weight."""
    errors = torch.stack([normalised(student[name], teacher[name], mask) for name in names])
    return errors.mean() if weights is None else (errors * weights).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """T^2 KL(teacher || student) per row, the mean over rows (over real tokens)."""
    a, b = _log_probabilities(student / temperature, teacher / temperature)
    rows = F.kl_div(a, b, reduction="none", log_target=True).sum(-1) * temperature**2
    if mask is None or mask.ndim != rows.ndim + 1:
        return rows.mean()
    kept = mask.squeeze(-1)
    return (rows * kept).sum() / kept.sum().clamp_min(1)


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the same classes from scores of both; of many, the teacher's likeliest and the rest as one:
    never above the divergence of all, zero where that is."""
    if student.shape[-1] <= MANY:
        return F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    likeliest = teacher.topk(LIKELIEST, -1).indices

    def merged(scores: Tensor) -> Tensor:
        known = scores.gather(-1, likeliest) - scores.logsumexp(-1, keepdim=True)
        rest = -torch.expm1(known.logsumexp(-1, keepdim=True).clamp_max(-1e-6))  # 1 - their sum, never 0
        return torch.cat((known, rest.log()), -1)

    return merged(student), merged(teacher)


def _relations(a: Tensor, b: Tensor) -> Tensor:
    """KL of the rows of similarities within a batch, each sample's own left out."""
    if len(a) < 3:
        return a.sum() * 0
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    mine, theirs = ((x @ x.t() / NEIGHBOURS).masked_fill(itself, -1e4) for x in (a, b))
    return _divergence(mine, theirs, 1.0, None)
