"""Does anything after a native segment look at padding? Its rows are zeros there, not what the model would compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile import probe
from nmcompile.errors import NmcompileError

DRAWS = (0, 1)


def padding_matters(graph: gs.Graph, mask: str, tensors: Sequence[str]) -> bool:
    """Whether the graph's outputs change, other than at padding, with the padding rows of these token tensors.

    Learnt by running what comes after them on random masks, once as it is and once with other values in the padding
    rows. True where that cannot be found out.
    """
    known = graph.tensors()
    tokens = [name for name in tensors if len(known[name].shape or []) == 3]
    outputs = [info.name for info in g.outputs(graph) if info.name not in tokens]
    if not tokens or not outputs:
        return False
    for draw in DRAWS:
        sizes = probe.free_sizes(g.inputs(graph), draw)
        feeds = probe.binary_feeds(graph, draw)
        shapes = [probe.concrete(known[name].shape, sizes) for name in tokens]
        real = feeds[mask] != 0
        if any(shape is None or shape[:2] != real.shape for shape in shapes):
            return True
        rng = np.random.default_rng(draw)
        values = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(tokens, shapes, strict=True) if s}
        other = {name: np.where(real[..., None], value, value + 1) for name, value in values.items()}
        try:
            first = probe.evaluate(graph, outputs, {**feeds, **values}, tokens)
            second = probe.evaluate(graph, outputs, {**feeds, **other}, tokens)
        except NmcompileError:
            return True
        for name in outputs:
            a, b = first[name], second[name]
            if a.shape[:2] == real.shape:
                a, b = a[real], b[real]
            if a.dtype.kind == "f" and not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                return True
    return False
