"""Decide, before its steps are written, how each quantized layer of a native segment runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nmcompile.backends.cpu import cluster
from nmcompile.backends.cpu.fuse import Chain, Fusion
from nmcompile.backends.cpu.ops import FLOAT, Op, Read
from nmcompile.backends.cpu.pack import FLOAT as IN_FLOAT
from nmcompile.backends.cpu.partition import Segment
from nmcompile.backends.cpu.tuning import Choice, Choose, gather_is_known


def choose_kernels(segment: Segment, choose: Choose) -> tuple[Sequence[Op], Mapping[str, Choice]]:
    """The segment's operations, those of layers that run in float changed to that, and each layer's choice by result.

    The choices are keyed by the name of what the layer's product makes.
    """
    fusion = Fusion(segment.ops, segment.outputs)
    changed = _reordered(fusion, choose)
    reordered = frozenset(changed)
    choices: dict[str, Choice] = {}
    # from the last to the first: a layer that runs in float reads floats, so the one before it may run in float too
    for name in [chain.root.y for chain in fusion.chains.values() if chain.root.kind == "linear"][::-1]:
        chain = next(chain for chain in fusion.chains.values() if chain.root.y == name)
        op = changed.get(name, chain.root)
        choice = choose(np.asarray(op.data["weight"]), *_could_be_float(fusion, chain))
        choices[name] = replace(choice, reordered=name in reordered)
        if choice.kind == IN_FLOAT:
            changed[name] = _in_float(op)
            fusion = Fusion([changed.get(op.y, op) for op in segment.ops], segment.outputs)
    return [changed.get(op.y, op) for op in segment.ops], choices


def _reordered(fusion: Fusion, choose: Choose) -> dict[str, Op]:
    """Layers to replace by ones whose outputs, and whose reader's inputs, stand in an order that makes both faster."""
    changed: dict[str, Op] = {}
    for chain in fusion.chains.values():
        reader = _only_reader(fusion, chain)
        if reader is None or reader.y in changed or chain.root.y in changed:
            continue
        first, second = (np.asarray(op.data["weight"]) for op in (chain.root, reader))
        order = cluster.best_order(first, second, gather_is_known())
        if order is None:
            continue
        before = [choose(weight, False, False) for weight in (first, second)]
        after = [choose(weight, False, False) for weight in (first[order], second[:, order])]
        alike = len({choice.by for choice in (*before, *after)}) == 1
        if alike and sum(c.cost for c in after) < cluster.WORTH * sum(c.cost for c in before):
            given = {key: value for key, value in chain.root.data.items() if key in ("weight", "scale", "bias")}
            rows = {key: value[order] for key, value in given.items() if isinstance(value, np.ndarray)}
            changed[chain.root.y] = replace(chain.root, data={**chain.root.data, **rows})
            changed[reader.y] = replace(reader, data={**reader.data, "weight": second[:, order]})
    return changed


def _only_reader(fusion: Fusion, chain: Chain) -> Op | None:
    """The quantized layer that alone reads a quantized layer's result, with one scale for all of it."""
    users = fusion.users[chain.last.y]
    if chain.root.kind != "linear" or chain.residual is not None or chain.last.y in fusion.leaving or len(users) != 1:
        return None
    reader, form = users[0]
    return reader if reader.kind == "linear" and form.layout == "u8" else None


def _could_be_float(fusion: Fusion, chain: Chain) -> tuple[bool, bool]:
    """Whether a layer in float would find its input and leave its result without further steps; whether its INT8 form
    needs a quantize step that nothing else wants."""
    read = chain.root.reads[0]
    maker = fusion.makers.get(read.tensor)
    if fusion.forms(chain.last.y) != {FLOAT} or read.tensor in fusion.smoothed:
        return False, False
    before = None if maker is None else fusion.chains.get(id(maker))
    # these write what is wanted, bytes alone if need be; everything else makes floats that are quantized after it
    writes_bytes = maker is not None and (
        maker.kind in ("attention", "attention_float", "layer_norm")
        or (before is not None and before.root.kind == "linear")
    )
    users, wanted_in_float = fusion.users[read.tensor], FLOAT in fusion.forms(read.tensor)
    if writes_bytes and not wanted_in_float and len(users) > 1:
        return False, False  # it would have to write both
    in_passing = writes_bytes and (not wanted_in_float or (maker is not None and maker.kind == "layer_norm"))
    return True, not in_passing and sum(form == read.form for _, form in users) == 1


def _in_float(op: Op) -> Op:
    weight = np.asarray(op.data["weight"]).astype(np.float32) * np.asarray(op.data["scale"])[:, None]
    return replace(op, kind="linear_float", reads=(Read(op.reads[0].tensor),), data={**op.data, "weight": weight})
