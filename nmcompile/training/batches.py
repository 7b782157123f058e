"""Batches of about as many tokens each, of samples of like lengths, in an order that a seed and a place determine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nmcompile.calibrate import Data
from nmcompile.errors import CalibrationError
from nmcompile.roles import real_tokens

Feeds = Mapping[str, np.ndarray]
POOL = 64  # batches that are sorted by length together
HELD_OUT = 16  # every sixteenth sample measures
FITTED, FITTED_LEAST, FITTED_BATCH = 1024, 256, 32  # samples that pruning fits layers to
FITTED_TOKENS = 49_152  # of those, at most: memory grows with them
FITTED_WORK = 300_000_000_000  # weights times tokens, at most: some 80 s on two cores (2.7e-10 s each)


@dataclass(frozen=True)
class Batches:
    """Samples for training, `tokens` of a batch with its padding; samples that have none count as one token each."""

    data: Data
    tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data.rows or self.data.synthetic:
            raise CalibrationError("training takes samples of the model's real inputs; give --data")

    def epoch(self, number: int) -> list[Feeds]:
        """All samples once, in the order of this epoch."""
        return list(self._lazily(number))

    def __iter__(self) -> Iterator[Feeds]:
        """Without end, epoch after epoch."""
        return self.since(0)

    def since(self, place: int) -> Iterator[Feeds]:
        """As the iteration is behind its first `place` batches."""
        number = 0
        while True:
            for feeds in self._lazily(number):
                if place > 0:
                    place -= 1
                    continue
                yield feeds
            number += 1

    def _lazily(self, number: int) -> Iterator[Feeds]:
        rows, rng = self.data.rows, np.random.default_rng([self.seed, number])
        order = rng.permutation(len(rows))
        lengths = np.array([length(row) for row in rows])
        usual = max(1, self.tokens // max(int(lengths.mean()), 1))
        for start in range(0, len(order), usual * POOL):
            pool = order[start : start + usual * POOL]
            groups = list(_groups(pool[np.argsort(lengths[pool], kind="stable")], lengths, self.tokens))
            for at in rng.permutation(len(groups)):
                yield from self.made([rows[i] for i in groups[at]])

    def made(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Feeds]:
        """Samples as one batch, or as several where the model fixes its batches."""
        return iter(replace(self.data, rows=tuple(map(dict, rows)), batch=len(rows)))


def _groups(order: np.ndarray, lengths: np.ndarray, limit: int) -> Iterator[list[int]]:
    """Neighbours that have at most `limit` tokens with their padding."""
    group: list[int] = []
    for i in order.tolist():
        if group and (len(group) + 1) * max(int(lengths[i]), 1) > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def length(row: Mapping[str, Any]) -> int:
    """Tokens of a sample: of its longest input of one axis, else 1."""
    return max((value.shape[0] for value in row.values() if value.ndim == 1), default=1)


def parted(data: Data, most: int, tokens: int) -> tuple[Data, Data]:
    """(for training, held out): every sixteenth sample, `most` at most, of so many tokens together. CalibrationError
    for too few samples."""
    rows = data.rows
    if len(rows) < 2 * HELD_OUT:
        raise CalibrationError(f"training takes {2 * HELD_OUT} samples at least, the data have {len(rows)}; give more")
    held: list[int] = []
    for i in range(HELD_OUT - 1, len(rows), HELD_OUT)[:most]:
        tokens -= length(rows[i])
        if tokens < 0 and len(held) > 1:
            break
        held.append(i)
    out = set(held)
    return (replace(data, rows=tuple(row for i, row in enumerate(rows) if i not in out)),
            replace(data, rows=tuple(rows[i] for i in held)))  # fmt: skip


def for_fitting(data: Data, weights: int) -> Data:
    """What pruning fits layers of so many weights to: the first samples that are not held out, the fewer the larger the
    model, in batches that are large where there are many; all that came where these fill no batch of the model."""
    if data.synthetic:
        return data
    seen = [row for i, row in enumerate(data.rows) if i % HELD_OUT != HELD_OUT - 1][:FITTED]
    tokens = min(FITTED_TOKENS, FITTED_WORK // max(weights, 1))
    count = int(np.searchsorted(np.cumsum([length(row) for row in seen]), tokens, side="right"))
    rows = tuple(seen[: max(count, FITTED_LEAST)])
    found = replace(data, rows=rows, batch=max(data.batch, min(FITTED_BATCH, len(rows) // FITTED_BATCH)))
    return data if next(found.groups(), None) is None else found


def token_mask(data: Data, feeds: Feeds, device: torch.device) -> torch.Tensor | None:
    """Which tokens are no padding, float [batch, tokens, 1]; None where nothing is padded."""
    real = real_tokens(feeds, data.inputs)
    return None if real is None else torch.from_numpy(real).to(device, torch.float32).unsqueeze(-1)
