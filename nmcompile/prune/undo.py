"""Layers that go back to what they were before pruning."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate.data import Data
from nmcompile.contract import NEEDS_DATA
from nmcompile.errors import PassError
from nmcompile.prune.norms import fit_norms, restore_norms
from nmcompile.prune.records import LayerRecord, Records, packed


def undone(graph: gs.Graph, records: Records, names: Collection[str], data: Data | None = None) -> gs.Graph:
    """A copy of the graph, as the pruning pass that made `records` left it, in which the layers named have the weights
    and biases that they had before; names without a record are ignored.

    Normalisations that pruning has fitted are fitted again to the layers that stay pruned, which takes the samples
    (PassError without them); where none stay, everything is as it was. A weight that several layers share goes back
    for all of them.
    """
    left = {name for name in records.changed if name not in names}
    graph = _restored(graph, records, names if left else records.layers)
    if restore_norms(graph, records.norms) and left:
        if data is None:
            raise PassError(NEEDS_DATA)
        dense = _restored(graph, records, records.layers)
        fit_norms(graph, dense, data, [layer for layer in g.linear_layers(graph) if layer.name in left])
    return graph


def completed(records: Records, before: gs.Graph, after: gs.Graph) -> Records:
    """The records, and one for each layer whose weight is another in the graph after than in the one before without a
    pass having told so: passes of others need not know of records."""
    old = {layer.name: layer for layer in g.linear_layers(before)}
    found = {}
    for layer in g.linear_layers(after):
        was = old.get(layer.name)
        if was is None or layer.name in records.layers or np.array_equal(layer.weight, was.weight):
            continue
        mask, seen = layer.weight != 0, sp.detect(layer.weight)
        pattern = sp.Unstructured() if seen is None else seen.pattern
        found[layer.name] = LayerRecord(pattern, 1 - float(mask.mean()), packed(mask), was.weight, was.bias,
                                        bias_name(was), None, True)  # fmt: skip
    return Records({**records.layers, **found}, records.norms)


def bias_name(layer: g.Linear) -> str:
    """The tensor that holds a layer's bias; "" where it has none."""
    held = bias_tensor(layer)
    return held[0].inputs[held[1]].name if held is not None else ""


def bias_tensor(layer: g.Linear) -> tuple[gs.Node, int] | None:
    """The node that adds a layer's bias, and the place of the bias among its inputs."""
    add = g.producer(layer.y)
    if layer.bias is None or add is None:
        return None
    return add, next(i for i, t in enumerate(add.inputs) if g.constant(t) is not None)


def _restored(graph: gs.Graph, records: Records, names: Collection[str]) -> gs.Graph:
    """A copy with the weights and biases that some layers had before, under the names that they had."""
    graph = g.copy(graph)
    for layer in g.linear_layers(graph):
        record, held = records.layers.get(layer.name), bias_tensor(layer)
        if record is None or layer.name not in names:
            continue
        g.set_weight(graph, layer, record.weight)
        if record.bias is None or held is None:
            continue
        add, at = held
        if add.inputs[at].name != record.bias_name:
            kind = np.asarray(g.constant(add.inputs[at])).dtype
            before = gs.Constant(g.fresh(graph, record.bias_name), np.asarray(record.bias, kind))
            add.inputs[at] = g.changed(before, add.inputs[at])
    return graph
