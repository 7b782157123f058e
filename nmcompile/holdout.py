"""Which samples calibrate, which a limit is held by, and which the loss is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nmcompile.calibrate import Data, split

Feed = dict[str, np.ndarray]

BATCHES = 4  # of a fixed size, of which one is held out
APART = 4  # samples (or fixed batches) held out, of which half are kept from the search


@dataclass(frozen=True)
class Holdout:
    """seen: what calibration reads. chosen: what a limit is held by. measured: what the loss is measured on.

    held_out: `measured` shares no sample with `seen`; apart: none with `chosen`.
    """

    seen: Data
    chosen: Data
    measured: Data
    held_out: bool
    apart: bool


    def together(self) -> Holdout:
        """A limit held by all that was held out, on which the loss is then measured too."""
        every = replace(self.chosen, rows=(*self.chosen.rows, *self.measured.rows))
        return replace(self, chosen=every, measured=every, apart=False)


def hold_out(data: Data, limited: bool) -> Holdout:
    """Every eighth sample is held out, of a model of a fixed batch size every eighth batch; where there are too few,
    all serve for everything. limited: of those held out, a limit is held by one half and the loss measured on the
    other, where they are enough. Data that were made up are split the same way, batch by batch.
    """
    units = _fixed_batches(data)
    if units is None:
        seen, held = split(data)
        parts: list[tuple[Feed, ...]] = [(row,) for row in held.rows]
    elif len(units) < BATCHES:
        seen, held, parts = data, data, list(units)
    else:
        at = range(len(units) - 1 if len(units) < 8 else 7, len(units), 8)
        parts = [units[index] for index in at]
        held = _of(data, parts)
        seen = _of(data, [unit for index, unit in enumerate(units) if index not in at])
    held_out = held is not seen
    enough = (held_out or data.synthetic) and len(parts) >= APART
    if not limited or not enough:
        return Holdout(seen, held, held, held_out, not limited)
    chosen, measured = _of(data, parts[::2]), _of(data, parts[1::2])
    if not chosen.samples or not measured.samples:  # of a model without a mask, whose batches have one shape
        return Holdout(seen, held, held, held_out, False)
    return Holdout(seen, chosen, measured, held_out, True)


def _of(data: Data, parts: Sequence[Sequence[Feed]]) -> Data:
    return replace(data, rows=tuple(row for part in parts for row in part))


def _fixed_batches(data: Data) -> list[tuple[Feed, ...]] | None:
    """The rows of each whole batch; None where a batch may have any size, or where rows are batches."""
    size = next((info.shape[0] for info in data.inputs if info.shape and isinstance(info.shape[0], int)), 1)
    if size == 1 or data.synthetic:
        return None
    found, at = [], 0
    while at + size <= len(data.rows):
        rows = data.rows[at : at + size]
        whole = replace(data, rows=rows).samples == size  # rows of other shapes do not make a batch
        if whole:
            found.append(rows)
        at += size if whole else 1
    return found
