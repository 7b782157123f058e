"""Accuracy fallback: which layers go back to denser forms until the model is as good as asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.calibrate import Data
from nmcompile.calibrate.collect import without_padding
from nmcompile.compare import powers
from nmcompile.errors import UnsupportedError
from nmcompile.metrics import Limit
from nmcompile.roles import real_tokens

SAMPLES = 16  # that the noise of layers is measured on


@dataclass(frozen=True)
class Noise:
    """Of a layer's output against the dense model's: SQNR in dB, and what share of the signal's power the layer itself
    has added to the noise that came in."""

    sqnr: float
    added: float


@dataclass(frozen=True)
class Outcome:
    """Where the search ended: the drop of the metric, and the layers that gave way, worst first."""

    drop: float
    dense: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """How a limit was held: what it took, and the drop on samples that the search did not choose by, where there were
    any. dense, floating: layers that went back."""

    metric: str
    limit: float
    drop: float
    dense: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    drop_apart: float | None = None

    def to_json(self) -> dict[str, object]:
        apart = {} if self.drop_apart is None else {"drop_apart": self.drop_apart}
        return {"metric": self.metric, "limit": self.limit, "drop": self.drop, "dense": list(self.dense),
                "float": list(self.floating), **apart}  # fmt: skip


def layer_noise(dense: gs.Graph, other: gs.Graph, data: Data) -> dict[str, Noise]:
    """By layer, in the order of the nodes; both graphs have the same layers, run in onnxruntime without optimization of
    what is between them."""
    mine = {layer.name: layer for layer in g.linear_layers(other)}
    pairs = [(layer, mine[layer.name]) for layer in g.linear_layers(dense) if layer.name in mine]
    sums = np.zeros((len(pairs), 4))  # power and error of inputs, of outputs
    runs = [g.runner(graph, list(dict.fromkeys(name for layer in layers for name in _tensors(layer, graph))))
            for graph, layers in ((dense, [a for a, _ in pairs]), (other, [b for _, b in pairs]))]  # fmt: skip
    count = 0
    for feed in data:
        values = [run(feed) for run in runs]
        real = real_tokens(feed, data.inputs)
        for i, (first, second) in enumerate(pairs):
            for j, (a, b) in enumerate(zip(_tensors(first, dense), _tensors(second, other), strict=True)):
                x, y = (without_padding(found[name], real) for found, name in zip(values, (a, b), strict=True))
                sums[i, 2 * j : 2 * j + 2] += powers(x, y)
        count += len(next(iter(feed.values())))
        if count >= SAMPLES:
            break
    found = {}
    for (layer, _), (x_power, x_error, y_power, y_error) in zip(pairs, sums, strict=True):
        out, into = y_error / max(y_power, 1e-300), x_error / max(x_power, 1e-300)
        found[layer.name] = Noise(float(-10 * np.log10(max(out, 1e-30))), float(max(out - into, 0.0)))
    return found


def _tensors(layer: g.Linear, graph: gs.Graph) -> tuple[str, str]:
    """Input as it was before smoothing and quantization, output."""
    tensor = layer.x
    while (node := g.producer(tensor)) is not None and (
        node.op in ("DequantizeLinear", "QuantizeLinear") or (node.op == "Mul" and "/smooth" in node.name)
    ):
        tensor = node.inputs[0]
    return tensor.name, layer.y.name


def fall_back(
    limit: Limit,
    attempt: Callable[[Sequence[str], Sequence[str]], float],
    candidates: Callable[[], tuple[Sequence[str], Sequence[str]]],
    progress: Callable[[str, int, int], None],
) -> Outcome:
    """The fewest layers, worst first, that must go back for the drop to stay within the limit.

    attempt(dense, floating) builds the model with these layers unpruned and those unquantized and gives its drop; what
    it built last is what the outcome says. candidates() gives the layers to unprune and to leave in float, in order of
    harm; it is asked only when the model is not good enough as it is. Layers are made dense first; what that cannot
    mend is mended in float. UnsupportedError when not even the float model is good enough.
    """
    tried = 0

    def drop(dense: Sequence[str], floating: Sequence[str]) -> float:
        nonlocal tried
        progress("holding accuracy", tried, 0)
        tried += 1
        return attempt(dense, floating)

    now = drop((), ())
    if now <= limit.value:
        return Outcome(now)
    pruned, quantized = map(tuple, candidates())
    built = len(pruned), 0  # layers that the last attempt made dense, and left in float
    for names, is_float in ((pruned, False), (quantized, True)):
        if not names:
            continue
        low, high, tries = 0, len(names) + 1, len(names)  # low fails, high holds if there is one
        while high - low > 1:
            built = (len(pruned), tries) if is_float else (tries, 0)
            now = drop(pruned[: built[0]], quantized[: built[1]])
            low, high = (low, tries) if now <= limit.value else (tries, high)
            tries = (low + high) // 2
        if high <= len(names):
            best = (len(pruned), high) if is_float else (high, 0)
            if built != best:
                now = drop(pruned[: best[0]], quantized[: best[1]])
            return Outcome(now, pruned[: best[0]], quantized[: best[1]])
    raise UnsupportedError(
        f"{limit.name} drops by {now:.4g} even without pruning and quantization, {limit.value:g} is allowed; "
        "check the metric and the data"
    )


def worst_first(noise: Mapping[str, Noise], names: Iterable[str]) -> list[str]:
    """Names by what their layers add to the noise."""
    return sorted((name for name in names if name in noise), key=lambda name: -noise[name].added)
