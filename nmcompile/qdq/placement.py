"""Where quantize/dequantize pairs go, decided before the graph is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.canonical import Attention, attentions, is_probability, role
from nmcompile.errors import PassError
from nmcompile.qdq.scheme import Scheme


@dataclass(frozen=True)
class Site:
    """One activation to quantize once, and everything that then reads the quantized value.

    `measured` holds the same values as `tensor` in the shape that calibration knows, [batch, tokens, features].
    """

    tensor: gs.Tensor
    measured: gs.Tensor
    dtype: q8.QuantType  # "uint8" asymmetric or "int8" symmetric
    readers: list[tuple[gs.Node, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Placement:
    """What will be quantized, activations and linear layers, and why other layers not.

    attentions: those of the graph, where the scheme asked for them.
    """

    sites: tuple[Site, ...]
    layers: tuple[g.Linear, ...]
    kept: Mapping[str, str]
    attentions: tuple[Attention, ...]

    def readers(self, site: Site) -> list[g.Linear]:
        """The linear layers that read a site."""
        read = {id(node) for node, _ in site.readers}
        return [layer for layer in self.layers if id(layer.node) in read]


def place(graph: gs.Graph, scheme: Scheme) -> Placement:
    """Decide what to quantize; changes nothing."""
    sites: dict[tuple[str, str], Site] = {}
    layers, kept = [], {}
    found = g.linear_layers(graph)
    for glob in scheme.include:
        if not any(fnmatchcase(layer.name, glob) for layer in found):
            raise PassError(f"include={glob} matches no linear layer; nmcompile inspect lists their names")
    for layer in found:
        reason = _reason(graph, layer, scheme)
        if reason:
            kept[layer.name] = reason
            continue
        layers.append(layer)
        _site(sites, layer.x, layer.x, scheme.dtype).readers.append((layer.node, 0))
    heads = attentions(graph) if scheme.attention == "int8" else []
    for attention in heads:
        _place_attention(sites, attention, scheme)
    return Placement(tuple(sites.values()), tuple(layers), kept, tuple(heads))


def needs(placement: Placement, scheme: Scheme) -> dict[str, tuple[str, ...]]:
    """The statistics that the ranges and biases of a placement take."""
    found = {site.measured.name: scheme.kinds for site in placement.sites if not is_probability(site.tensor)}
    if scheme.bias or scheme.by_error:
        found |= {layer.x.name: (*scheme.kinds, "sample") for layer in placement.layers}
    return found


def _place_attention(sites: dict[tuple[str, str], Site], attention: Attention, scheme: Scheme) -> None:
    if any(map(_double, attention.operands)):
        return
    # Right before the products: there onnxruntime and TensorRT find the pairs that they fuse.
    measured = (attention.q, attention.k, attention.v)
    parts = zip(attention.operands, measured, attention.readers, scheme.operands, strict=True)
    for operand, values, reader, dtype in parts:
        maker = g.producer(operand)
        if maker is not None and maker.op != "DequantizeLinear":
            _site(sites, operand, values, dtype).readers.append(reader)
    if scheme.softmax and not attention.quantized_probabilities:
        product = attention.readers[2][0]
        probabilities = product.inputs[0]
        _site(sites, probabilities, probabilities, scheme.dtype).readers.append((product, 0))


def _reason(graph: gs.Graph, layer: g.Linear, scheme: Scheme) -> str:
    """Why a layer stays as it is; "" where it does not."""
    if layer.quantized:
        return "already quantized, its scales are kept"
    if _double(layer.x) or layer.weight.dtype == np.float64:
        return "computed in float64, which is not quantized"
    if any(fnmatchcase(layer.name, glob) for glob in scheme.keep):
        return "excluded by name"
    if scheme.include:
        return "" if any(fnmatchcase(layer.name, glob) for glob in scheme.include) else "not included by name"
    kind = role(graph, layer)
    return f"{kind}s stay float by default" if kind and not scheme.heads else ""


def _site(sites: dict[tuple[str, str], Site], tensor: gs.Tensor, measured: gs.Tensor, dtype: q8.QuantType) -> Site:
    return sites.setdefault((tensor.name, dtype), Site(tensor, measured, dtype))


def _double(tensor: gs.Tensor) -> bool:
    """Of float64, which QuantizeLinear does not take."""
    return tensor.dtype is not None and bool(tensor.dtype == np.float64)
