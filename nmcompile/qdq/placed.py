"""A graph whose weights and activations stand behind quantize/dequantize pairs, and its last step: weights rounded.

graph -> placed -> Placed: pairs around float weights, every scale known, which training can follow
                     | rounded
                     v
                   integers in place of the weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.calibrate import Statistics
from nmcompile.canonical import attentions, is_probability
from nmcompile.contract import NEEDS_DATA
from nmcompile.errors import PassError
from nmcompile.qdq.output_error import Sample, best_trial, candidates, mean_errors
from nmcompile.qdq.pairs import quantized
from nmcompile.qdq.placement import Placement, Site, place
from nmcompile.qdq.scheme import Scheme


@dataclass(frozen=True)
class PlacedSite:
    """An activation behind a pair; `readers` are names of nodes."""

    tensor: str
    params: q8.QuantParams
    readers: tuple[str, ...]


@dataclass(frozen=True)
class PlacedLayer:
    """A linear layer that reads a float weight behind a pair: what fake quantization of it takes.

    weight: the constant [K inputs, N outputs]; scales: float32 [N]; levels: the largest |level|; activation: how what
    the layer reads is quantized; quantizer: the node that rounds the weight, shared where the weight is.
    """

    name: str
    weight: str
    scales: np.ndarray
    levels: int
    activation: q8.QuantParams
    quantizer: str


@dataclass(frozen=True)
class Placed:
    """Pairs in place, nothing rounded. sites and layers have their ranges and scales; kept: layers that stay as they
    are, with the reason."""

    graph: gs.Graph
    sites: tuple[PlacedSite, ...]
    layers: Mapping[str, PlacedLayer]
    kept: Mapping[str, str]
    integers: Mapping[str, Integers] = field(repr=False)  # by quantizer, of weights that were rounded for a range


@dataclass(frozen=True)
class Integers:
    """A weight [N, K] on its levels at scales [N]."""

    weight: np.ndarray
    scales: np.ndarray
    small: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, levels: int) -> Integers:
        small, scales = q8.quantize_weight(weight, levels=levels)
        return cls(weight, scales, small)

    @property
    def coarse(self) -> np.ndarray:
        """float32 [N, K] after quantization and back."""
        return np.asarray(self.small * self.scales[:, None])


def placed(graph: gs.Graph, scheme: Scheme, statistics: Statistics | None) -> Placed:
    """A copy of the graph with pairs around float weights; `statistics` as `placement.needs` asks for them."""
    graph = g.copy(graph)
    return insert(graph, place(graph, scheme), scheme, statistics)


def rounded(placed: Placed) -> gs.Graph:
    """A copy of the placed graph with integers for the weights that it holds now, at the scales that were placed."""
    graph = g.copy(placed.graph)
    round_weights(graph, replace(placed, integers={}))  # weights may have been written to in place since
    return graph


# ---- placing -----------------------------------------------------------------------------------------------------


def insert(graph: gs.Graph, placement: Placement, scheme: Scheme, statistics: Statistics | None) -> Placed:
    """Put the pairs of a placement into its graph, in place, and the errors of rounding into biases."""
    made: dict[str, Integers] = {}
    sites: list[PlacedSite] = []
    params_of: dict[str, q8.QuantParams] = {}
    for site in placement.sites:
        readers = placement.readers(site)
        params = _settle(graph, site, readers, scheme, statistics, made)
        params_of |= {layer.name: params for layer in readers}
        wide = quantized(graph, site.tensor, params)
        for node, index in site.readers:
            node.inputs[index] = wide
        sites.append(PlacedSite(site.tensor.name, params, tuple(node.name for node, _ in site.readers)))
    layers, integers = _insert_weights(graph, placement, scheme, params_of, made)
    g.cleanup(graph)
    left = {node.name for node in graph.nodes}
    layers = {name: layer for name, layer in layers.items() if layer.quantizer in left}  # others made no output
    return Placed(graph, tuple(sites), layers, placement.kept, integers)


def _settle(
    graph: gs.Graph, site: Site, readers: list[g.Linear], scheme: Scheme, statistics: Statistics | None,
    made: dict[str, Integers],
) -> q8.QuantParams:  # fmt: skip
    """How a site is quantized; the biases of the layers that read it take on the mean error of that."""
    by_error = scheme.by_error and bool(readers) and not is_probability(site.tensor)
    biased = [layer for layer in readers if layer.bias is not None] if scheme.bias else []
    proposed = _proposed(site, scheme, statistics, by_error)
    weighed = readers if by_error else biased
    if not weighed or statistics is None:
        return proposed[0]
    coarse = [_integers(made, layer, scheme.levels).coarse for layer in weighed]
    sample = Sample.of(statistics.sample(site.measured.name), [layer.weight for layer in weighed], coarse)
    trial = best_trial(sample, proposed)
    for layer, lost in zip(weighed, mean_errors(sample, trial), strict=True) if biased else ():
        if layer.bias is not None:
            g.set_bias(graph, layer, layer.bias + lost)
    return trial.params


def _proposed(site: Site, scheme: Scheme, statistics: Statistics | None, by_error: bool) -> list[q8.QuantParams]:
    """How a site may be quantized, one way at least."""
    if is_probability(site.tensor):
        return [q8.activation_params(0.0, 1.0, site.dtype)]
    if statistics is None:
        raise PassError(NEEDS_DATA)
    name = site.measured.name
    if by_error:
        return candidates(statistics, name, site.dtype)
    ends = statistics.clip(name, scheme.method, scheme.percentile, site.dtype)
    return [q8.activation_params(*ends, site.dtype)]


def _integers(made: dict[str, Integers], layer: g.Linear, levels: int) -> Integers:
    name = layer.node.inputs[1].name
    if name not in made:
        made[name] = Integers.of(layer.weight, levels)
    return made[name]


def _insert_weights(
    graph: gs.Graph, placement: Placement, scheme: Scheme, params_of: Mapping[str, q8.QuantParams],
    made: Mapping[str, Integers],
) -> tuple[dict[str, PlacedLayer], dict[str, Integers]]:  # fmt: skip
    """(layers by name, what is rounded already by quantizer)"""
    factors = _factors(graph, placement, scheme)
    pairs: dict[str, tuple[PlacedLayer, gs.Tensor]] = {}
    layers, integers = {}, {}
    for layer in placement.layers:
        stored = layer.node.inputs[1]
        if stored.name not in pairs:
            ready = made.get(stored.name)
            scales = q8.weight_scales(layer.weight, scheme.levels) if ready is None else ready.scales
            # the factor of the scores moves into the queries' weights, and their scales with it
            least = scheme.least_scale / min(factors.get(layer.y.name, 1.0) or 1.0, 1.0)
            floored = np.maximum(scales, np.float32(least))
            pairs[stored.name] = _weight_pair(graph, layer, floored, scheme.levels, params_of[layer.name])
            if ready is not None and np.array_equal(floored, scales):
                integers[pairs[stored.name][0].quantizer] = ready
        first, layer.node.inputs[1] = pairs[stored.name]
        layers[layer.name] = replace(first, name=layer.name, activation=params_of[layer.name])
    return layers, integers


def _factors(graph: gs.Graph, placement: Placement, scheme: Scheme) -> dict[str, float]:
    """Those of attention's scores, by the tensor of the queries, where scales have a least."""
    if not scheme.least_scale:
        return {}
    found = placement.attentions if scheme.attention == "int8" else attentions(graph)
    return {attention.q.name: abs(attention.scale) for attention in found}


def _weight_pair(
    graph: gs.Graph, layer: g.Linear, scales: np.ndarray, levels: int, activation: q8.QuantParams
) -> tuple[PlacedLayer, gs.Tensor]:
    """DequantizeLinear(QuantizeLinear(W)) per output, which nothing reads yet, and what is known of it."""
    stored = layer.node.inputs[1]
    stem, shape = stored.name, list(stored.shape)
    small = gs.Variable(g.fresh(graph, f"{stem}/int8"), np.dtype(np.int8), shape)
    scale = gs.Constant(g.fresh(graph, f"{stem}/scale"), scales)
    zero = gs.Constant(g.fresh(graph, f"{stem}/zero_point"), np.zeros(scales.shape, np.int8))
    wide = gs.Variable(g.fresh(graph, f"{stem}/dequantized"), np.dtype(np.float32), shape)
    name, quantizer = g.fresh(graph, f"{stem}/dequantize"), g.fresh(graph, f"{stem}/quantize")
    if not isinstance(stored, gs.Constant) or stored.dtype != np.float32:  # behind an Identity, or of another width
        floats = gs.Constant(g.fresh(graph, f"{stem}/float"), np.ascontiguousarray(layer.weight.T))
        stored = g.changed(floats, stored)
    # side by side, the first before the second: without the first the sorted rest has the same order
    graph.nodes.append(gs.Node("QuantizeLinear", quantizer, {"axis": 1}, [stored, scale, zero], [small]))
    graph.nodes.append(gs.Node("DequantizeLinear", name, {"axis": 1}, [small, scale, zero], [wide]))
    return PlacedLayer(layer.name, stored.name, scales, levels, activation, quantizer), wide


# ---- rounding ----------------------------------------------------------------------------------------------------


def round_weights(graph: gs.Graph, placed: Placed) -> None:
    """Fold each weight and its QuantizeLinear into integers, in place: of the weights that the graph holds, which
    training may have changed. PassError where a layer's pair is gone."""
    found = {layer.quantizer: layer for layer in placed.layers.values()}
    nodes = {node.name: node for node in graph.nodes if node.name in found}
    for name, layer in found.items():
        weight = g.constant(nodes[name].inputs[0]) if name in nodes else None
        if weight is None:
            raise PassError(f"layer '{layer.name}': its weight no longer stands behind '{name}'; "
                            "round the graph that was placed")  # fmt: skip
        ready = placed.integers.get(name)
        if ready is not None and np.may_share_memory(ready.weight, weight):  # the weight is the one that was rounded
            small = ready.small
        else:
            small = q8.round_weight(weight.T, layer.scales, layer.levels)
        variable = nodes[name].outputs[0]
        constant = gs.Constant(variable.name, np.ascontiguousarray(small.T))  # [K, N]
        integers = g.changed(constant, nodes[name].inputs[0])
        for reader in g.consumers(variable):
            reader.inputs = [integers if tensor is variable else tensor for tensor in reader.inputs]
        nodes[name].inputs.clear()
        nodes[name].outputs.clear()
    graph.nodes[:] = [node for node in graph.nodes if node.name not in found]
