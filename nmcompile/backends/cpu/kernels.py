"""Decide, before its steps are written, how each quantized layer of a native segment runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nmcompile.backends.cpu import cluster
from nmcompile.backends.cpu.fuse import Chain, Fusion
from nmcompile.backends.cpu.ops import FLOAT, AnyAttention, LayerNorm, Linear, LinearFloat, Op, Read
from nmcompile.backends.cpu.pack import FLOAT as IN_FLOAT
from nmcompile.backends.cpu.partition import Segment
from nmcompile.backends.cpu.tuning import Choice, Choose, gather_is_known


def choose_kernels(segment: Segment, choose: Choose) -> tuple[Sequence[Op], Mapping[str, Choice]]:
    """The segment's operations, those of layers that run in float changed to that, and each layer's choice by result.

    The choices are keyed by the name of what the layer's product makes.
    """
    fusion = Fusion(segment.ops, segment.outputs)
    reordered = _reordered(fusion, choose)
    changed: dict[str, Op] = dict(reordered)
    choices: dict[str, Choice] = {}
    layers = [chain.root for chain in fusion.chains.values() if isinstance(chain.root, Linear)]
    # from the last to the first: a layer that runs in float reads floats, so the one before it may run in float too
    for layer in layers[::-1]:
        name = layer.y
        chain = next(chain for chain in fusion.chains.values() if chain.root.y == name)
        op = reordered.get(name, layer)
        choice = choose(op.weight, *_could_be_float(fusion, chain))
        choices[name] = replace(choice, reordered=name in reordered)
        if choice.kind == IN_FLOAT:
            changed[name] = _in_float(op)
            fusion = Fusion([changed.get(op.y, op) for op in segment.ops], segment.outputs)
    return [changed.get(op.y, op) for op in segment.ops], choices


def _reordered(fusion: Fusion, choose: Choose) -> dict[str, Linear]:
    """Layers to replace by ones whose outputs, and whose reader's inputs, stand in an order that makes both faster."""
    changed: dict[str, Linear] = {}
    for chain in fusion.chains.values():
        layer, reader = chain.root, _only_reader(fusion, chain)
        if not isinstance(layer, Linear) or reader is None or reader.y in changed or layer.y in changed:
            continue
        order = cluster.best_order(layer.weight, reader.weight, gather_is_known())
        if order is None:
            continue
        first = replace(layer, weight=layer.weight[order], scale=layer.scale[order],
                        bias=None if layer.bias is None else layer.bias[order])  # fmt: skip
        second = replace(reader, weight=reader.weight[:, order])
        before = [choose(op.weight, False, False) for op in (layer, reader)]
        after = [choose(op.weight, False, False) for op in (first, second)]
        alike = len({choice.by for choice in (*before, *after)}) == 1
        if alike and sum(c.cost for c in after) < cluster.WORTH * sum(c.cost for c in before):
            changed |= {layer.y: first, reader.y: second}
    return changed


def _only_reader(fusion: Fusion, chain: Chain) -> Linear | None:
    """The quantized layer that alone reads a quantized layer's result, with one scale for all of it."""
    users = fusion.users[chain.last.y]
    if chain.residual is not None or chain.last.y in fusion.leaving or len(users) != 1:
        return None
    reader, form = users[0]
    return reader if isinstance(reader, Linear) and form.layout == "u8" else None


def _could_be_float(fusion: Fusion, chain: Chain) -> tuple[bool, bool]:
    """Whether a layer in float would find its input and leave its result without further steps; whether its INT8 form
    needs a quantize step that nothing else wants."""
    read = chain.root.reads[0]
    maker = fusion.makers.get(read.tensor)
    if fusion.forms(chain.last.y) != {FLOAT} or read.tensor in fusion.smoothed:
        return False, False
    before = None if maker is None else fusion.chains.get(id(maker))
    # these write what is wanted, bytes alone if need be; everything else makes floats that are quantized after it
    writes_bytes = isinstance(maker, (AnyAttention, LayerNorm)) or (
        before is not None and isinstance(before.root, Linear)
    )
    users, wanted_in_float = fusion.users[read.tensor], FLOAT in fusion.forms(read.tensor)
    if writes_bytes and not wanted_in_float and len(users) > 1:
        return False, False  # it would have to write both
    in_passing = writes_bytes and (not wanted_in_float or isinstance(maker, LayerNorm))
    return True, not in_passing and sum(form == read.form for _, form in users) == 1


def _in_float(op: Linear) -> LinearFloat:
    weight = op.weight.astype(np.float32) * op.scale[:, None]
    return LinearFloat(reads=(Read(op.reads[0].tensor),), y=op.y, rows=op.rows, space=op.space, nodes=op.nodes,
                       name=op.name, weight=weight, bias=op.bias)  # fmt: skip
