"""What the linear layers of a profiled model would take at other shares of zeros, by timing their kernels here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.measure import Case
from nmcompile.backends.cpu.pack import BLOCKS, DENSE, GATHERS, Kind
from nmcompile.errors import InputError
from nmcompile.profile.timing import Machine, Profile, Row

Seconds = Callable[..., list[float]]  # measure.seconds

BATCH = 12  # cases timed in turn at a time


@dataclass(frozen=True)
class WhatIf:
    """`count` layers of outputs x inputs, all at `sparsity` in `pattern`; inputs 0: every layer of the model.

    Seconds of the layers and of the whole model, now and then. gains: some layer is not at that sparsity already.
    """

    outputs: int
    inputs: int
    count: int
    sparsity: float
    pattern: str
    now: float
    then: float
    model_now: float
    model_then: float
    gains: bool


def kind_of(pattern: str) -> Kind:
    """The engine's kernel for a pattern of outputs x inputs. InputError when it has none."""
    known = {f"{kind.rows}x{4 if kind.format == 'blocks' else 1}": kind for kind in (*BLOCKS, *GATHERS)}
    kind = known.get(pattern)
    if kind is None or not measure.supported(kind):
        names = ", ".join(name for name, kind in known.items() if measure.supported(kind))
        raise InputError(f"--pattern {pattern} has no kernel of its own; choose one of {names}")
    return kind


def what_if(
    profile: Profile, machine: Machine, sparsities: Sequence[float], pattern: str = "2x4", *,
    seconds: Seconds = measure.seconds, progress: Callable[[str, int, int], None] | None = None,
) -> list[WhatIf]:  # fmt: skip
    """For each sparsity one entry per shape of linear layer, and a last one for all of them.

    A layer's kernel is timed alone, as it is and as it would be, and the layer as profiled is scaled by their ratio.
    Layers that are at least as sparse already stay as they are, and so does one that would become slower: the
    compiler keeps the faster kernel.
    """
    kind = kind_of(pattern)
    rows = [row for row in profile.rows if row.step.linear is not None and not row.step.in_float]
    cases = {case for row in rows for case in (_now(row), *(_then(row, kind, s) for s in sparsities))}
    ordered = sorted(cases, key=str)
    timed: dict[Case, float] = {}
    for at in range(0, len(ordered), BATCH):
        part = ordered[at : at + BATCH]
        timed |= zip(part, seconds(part, threads=machine.threads, isa=machine.isa), strict=True)
        if progress is not None:
            progress("timing kernels", len(timed), len(ordered))
    found: list[WhatIf] = []
    for sparsity in sparsities:
        shapes: dict[tuple[int, int], list[tuple[float, float, bool]]] = {}
        for row in rows:
            linear = row.step.linear
            assert linear is not None
            now, then = timed[_now(row)], timed[_then(row, kind, sparsity)]
            gains = linear.share > 1.005 * (1 - sparsity)
            after = row.seconds * min(1.0, then / now) if gains else row.seconds
            shapes.setdefault((linear.outputs, linear.inputs), []).append((row.seconds, after, gains))
        parts = list(shapes.items())
        if len(parts) > 1:
            parts.append(((0, 0), [item for items in shapes.values() for item in items]))
        for (outputs, inputs), items in parts:
            before, after = sum(item[0] for item in items), sum(item[1] for item in items)
            found.append(WhatIf(outputs, inputs, len(items), sparsity, pattern, before, after, profile.seconds,
                                profile.seconds - before + after, any(item[2] for item in items)))  # fmt: skip
    return found


def _now(row: Row) -> Case:
    linear = row.step.linear
    assert linear is not None
    kind = Kind(linear.format, linear.rows)
    share = 1.0 if kind == DENSE else float(f"{linear.share:.2g}")  # layers that differ by less are timed once
    return Case(linear.outputs, linear.inputs, kind, share, max(1, row.tokens), linear.activation)


def _then(row: Row, kind: Kind, sparsity: float) -> Case:
    linear = row.step.linear
    assert linear is not None
    return Case(linear.outputs, linear.inputs, kind, round(1 - sparsity, 4), max(1, row.tokens),
                linear.activation)  # fmt: skip
