"""Features whose order is free, and an order in which zeros of a pattern lose least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.canonical import attentions
from nmcompile.solvers.grouping import grouped, spread

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics

ELEMENTWISE = frozenset(["Gelu", "Relu", "Tanh", "Sigmoid", "Elu", "LeakyRelu", "Silu", "Swish", "Identity", "Erf"])
SPARSITY = 0.5  # for which orders are compared


@dataclass(frozen=True)
class Hidden:
    """Features that only these layers see: rows of `makers`, inputs of `readers`, free in their order inside each of
    `spans` equal parts (heads), in which they move alike when `together`."""

    makers: tuple[g.Linear, ...]
    readers: tuple[g.Linear, ...]
    spans: int


def reorder(
    graph: gs.Graph, parts: Sequence[Hidden], pattern: sp.Pattern, statistics: Statistics
) -> dict[str, tuple[float, float]]:
    """Take the orders of some features that keep more, in place; by the first layer that makes them, the saliency that
    is kept before and after. statistics: the squares of what their layers read."""
    found = {}
    for part in parts:
        better = _order(part, pattern, statistics)
        if better is not None:
            order, before, after = better
            _apply(graph, part, order)
            found[part.makers[0].name] = before, after
    return found


def hidden(graph: gs.Graph) -> Iterator[Hidden]:
    """All features whose order is free."""
    layers = [layer for layer in g.linear_layers(graph) if not layer.quantized and _alone(layer)]
    by_output = {layer.y.name: layer for layer in layers}
    by_input: dict[str, list[g.Linear]] = {}
    for layer in layers:
        by_input.setdefault(layer.x.name, []).append(layer)
    for reader in layers:
        tensor = reader.x
        while (node := g.producer(tensor)) is not None and _only_read_once(graph, tensor):
            if tensor.name in by_output:
                yield Hidden((by_output[tensor.name],), (reader,), 1)
                break
            if node.op not in ELEMENTWISE:
                break
            tensor = node.inputs[0]
    for found in attentions(graph):
        sides = [by_output.get(tensor.name) for tensor in (found.q, found.k, found.v)]
        if any(not _only_read_once(graph, tensor) for tensor in (found.q, found.k, found.v)):
            continue
        q, k, v = sides
        if q is not None and k is not None and q.weight.shape[0] == k.weight.shape[0]:
            yield Hidden((q, k), (), found.heads)
        readers = by_input.get(found.y.name, [])
        if v is not None and len(readers) == 1 and _only_read_once(graph, found.y):
            yield Hidden((v,), tuple(readers), found.heads)


def _alone(layer: g.Linear) -> bool:
    return len(g.consumers(layer.node.inputs[1])) == 1


def _only_read_once(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return len(g.consumers(tensor)) == 1 and not g.is_output(graph, tensor)


def _saliency(layer: g.Linear, statistics: Statistics) -> np.ndarray:
    """w^2 |x|^2, [N, K], as shares of the layer's whole."""
    score = layer.weight.astype(np.float64) ** 2 * statistics.squares(layer.x.name)
    return np.asarray(score / max(float(score.sum()), 1e-300))


def _order(part: Hidden, pattern: sp.Pattern, statistics: Statistics) -> tuple[np.ndarray, float, float] | None:
    """(order [F], saliency kept before, after), or None when nothing is gained."""
    rows, cols = (pattern.rows, pattern.cols) if isinstance(pattern, sp.Block) else (1, 1)
    if isinstance(pattern, sp.NM):
        cols = pattern.m
    made = [_saliency(layer, statistics) for layer in part.makers] if rows > 1 else []
    read = [_saliency(layer, statistics) for layer in part.readers] if cols > 1 else []
    if not made and not read:
        return None
    profile = np.sqrt(np.concatenate([*(_summed(score, cols) for score in made), *(score.T for score in read)], axis=1))
    size, side = max(rows if made else 1, cols if read else 1), len(profile) // part.spans
    if side % size or size & (size - 1):
        return None
    starts = range(0, len(profile), side)
    if isinstance(pattern, sp.NM):
        options = [spread(np.concatenate(read), pattern.n, pattern.m, side)]
    else:
        options = [np.concatenate([start + find(profile[start : start + side]) for start in starts])
                   for find in (lambda p: grouped(p, size), _by_weight)]  # fmt: skip

    def kept(order: np.ndarray) -> float:
        scores = [*(score[order] for score in made), *(score[:, order] for score in read)]
        found = [float((score * sp.keep_mask(score, pattern, SPARSITY)).sum()) for score in scores]
        return sum(found) / len(found)

    before = kept(np.arange(len(profile)))
    order = max(options, key=kept)
    after = kept(order)
    return (order, before, after) if after > before else None


def _by_weight(profile: np.ndarray) -> np.ndarray:
    return np.argsort(-(profile**2).sum(axis=1), kind="stable")


def _summed(score: np.ndarray, cols: int) -> np.ndarray:
    """[N, K] in units of `cols` inputs."""
    return np.asarray(np.add.reduceat(score, np.arange(0, score.shape[1], cols), axis=1))


def _apply(graph: gs.Graph, part: Hidden, order: np.ndarray) -> None:
    for layer in part.makers:
        g.reorder(graph, layer, order, outputs=True)
    for layer in part.readers:
        g.reorder(graph, layer, order, outputs=False)
