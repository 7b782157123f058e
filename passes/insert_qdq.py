"""InsertQdq: quantize linear layers and attention with QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, cast, get_args

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.calibrate.statistics import Method
from nmcompile.canonical import attentions, is_probability, role
from nmcompile.contract import CANONICAL, NEEDS_DATA, Context, Pass, Report
from nmcompile.errors import PassError
from nmcompile.qdq.output_error import best_range, correct_bias
from nmcompile.qdq.pairs import quantized

if TYPE_CHECKING:
    from nmcompile.calibrate import Statistics


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
    """Everything that will be quantized, decided before the graph is touched."""

    sites: Mapping[tuple[str, str], Site]
    layers: tuple[g.Linear, ...]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Quantize activations per tensor and weights per output channel.

    MatMul(x, W)                 ->  MatMul(DQ(Q(x)), DQ(W_int8))     q, k and v share the Q of x
    attention(q, k, v)           ->  attention(DQ(Q(q)), DQ(Q(k)), DQ(Q(v)))

    Weights are symmetric int8 in [-127, 127], or in [-64, 64] with weight_bits=7 (onnxruntime's reduce_range), whose
    products no CPU saturates. Activations are `activations`: uint8 with a zero point for the CPU (VNNI multiplies u8 by
    s8), int8 with zero point 0 for TensorRT. Keys and values are always int8 with zero point 0: they are the s8
    operand. Ranges come from calibration by `clip`: min-max, percentile, entropy or mse; output takes, of what these
    propose, the range with the least error of the layers' outputs (mse for attention's operands). bias: biases take on
    what rounding adds on average.
    """

    requires: ClassVar[tuple[str, ...]] = (CANONICAL,)
    activations: str = "uint8"
    clip: str = "min-max"
    percentile: float = 99.99
    bias: bool = False
    least_scale: float = 0.0  # of weights; of queries' before their scores' factor moves into them
    attention: str = "int8"  # or float: q, k and v keep their floats, and with them the products and the softmax
    weight_bits: int = 8
    softmax: bool = False  # with attention int8: quantize the softmax's shares too
    heads: bool = False  # quantize heads and poolers too
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        wanted: tuple[str, ...] = ("range",) if self.clip == "min-max" else ("range", "histogram")
        placement = self.place(graph)
        found = {site.measured.name: wanted for site in placement.sites.values() if not is_probability(site.tensor)}
        if self.bias or self.clip == "output":
            found |= {layer.x.name: (*wanted, "sample") for layer in placement.layers}
        return found

    def place(self, graph: gs.Graph) -> Placement:
        """Decide what to quantize; changes nothing."""
        if self.activations not in ("uint8", "int8"):
            raise PassError(f"activations={self.activations} is not known; choose uint8 (CPU) or int8 (TensorRT)")
        methods = (*get_args(Method), "output")
        if self.clip not in methods:
            raise PassError(f"clip={self.clip} is not known; choose one of {', '.join(methods)}")
        if self.attention not in ("int8", "float"):
            raise PassError(f"attention={self.attention} is not known; choose int8 or float")
        if self.weight_bits not in q8.WEIGHT_LEVELS:
            raise PassError(f"weight_bits={self.weight_bits} is not known; choose 8, or 7 for CPUs without VNNI")
        activations = cast("q8.QuantType", self.activations)
        sites: dict[tuple[str, str], Site] = {}
        layers, kept = [], {}
        found_layers = g.linear_layers(graph)
        for glob in self.include:
            if not any(fnmatchcase(layer.name, glob) for layer in found_layers):
                raise PassError(f"include={glob} matches no linear layer; nmcompile inspect lists their names")
        for layer in found_layers:
            reason = self._reason(graph, layer)
            if reason:
                kept[layer.name] = reason
                continue
            layers.append(layer)
            _site(sites, layer.x, layer.x, activations).readers.append((layer.node, 0))
        for found in attentions(graph) if self.attention == "int8" else []:
            if any(map(_double, found.operands)):
                continue
            # Right before the products: there onnxruntime and TensorRT find the pairs that they fuse.
            kinds: tuple[q8.QuantType, ...] = (activations, "int8", "int8")
            parts = zip(found.operands, (found.q, found.k, found.v), found.readers, kinds, strict=True)
            for operand, measured, reader, dtype in parts:
                maker = g.producer(operand)
                if maker is not None and maker.op != "DequantizeLinear":
                    _site(sites, operand, measured, dtype).readers.append(reader)
            if self.softmax and not found.quantized_probabilities:
                product = found.readers[2][0]
                _site(sites, product.inputs[0], product.inputs[0], activations).readers.append((product, 0))
        return Placement(sites, tuple(layers), kept)

    def _reason(self, graph: gs.Graph, layer: g.Linear) -> str:
        if layer.quantized:
            return "already quantized, its scales are kept"
        if _double(layer.x) or layer.weight.dtype == np.float64:
            return "computed in float64, which is not quantized"
        if any(fnmatchcase(layer.name, glob) for glob in self.exclude):
            return "excluded by name"
        if self.include:
            return "" if any(fnmatchcase(layer.name, glob) for glob in self.include) else "not included by name"
        kind = role(graph, layer)
        return f"{kind}s stay float by default" if kind and not self.heads else ""

    def run(self, graph: gs.Graph, context: Context) -> Report:
        placement, levels = self.place(graph), q8.WEIGHT_LEVELS[self.weight_bits]
        ranges: dict[str, str] = {}
        for site in placement.sites.values():
            readers = [layer for layer in placement.layers if layer.x is site.tensor]
            low, high = self._range(context.gathered, site, readers)
            params = q8.activation_params(low, high, site.dtype)
            for layer in readers if self.bias else ():
                correct_bias(graph, layer, context.statistics.sample(layer.x.name), params, levels)
            wide = quantized(graph, site.tensor, params)
            for node, index in site.readers:
                node.inputs[index] = wide
            ranges[site.tensor.name] = f"{params.dtype} scale {params.scale:.6g} zero {params.zero_point}"
        done: dict[str, gs.Tensor] = {}
        factors = {found.q.name: abs(found.scale) for found in attentions(graph)}
        for layer in placement.layers:
            least = self.least_scale / min(factors.get(layer.y.name, 1.0) or 1.0, 1.0)
            _quantize_weight(graph, layer, done, least, levels)
        g.cleanup(graph)
        notes = tuple(f"{name}: kept as it is, {reason}" for name, reason in placement.kept.items())
        changed = len(placement.sites) + len(placement.layers)
        detail = {"layers": len(placement.layers), "activations": ranges}
        return Report(changed=changed, detail=detail, notes=notes)


    def _range(self, statistics: Statistics | None, site: Site, readers: list[g.Linear]) -> tuple[float, float]:
        if is_probability(site.tensor):
            return 0.0, 1.0
        if statistics is None:
            raise PassError(NEEDS_DATA)
        name = site.measured.name
        if self.clip == "output" and readers:
            return best_range(statistics, name, readers, site.dtype, q8.WEIGHT_LEVELS[self.weight_bits])
        method = "mse" if self.clip == "output" else cast("Method", self.clip)
        return statistics.clip(name, method, self.percentile, site.dtype)


def _site(sites: dict[tuple[str, str], Site], tensor: gs.Tensor, measured: gs.Tensor, dtype: q8.QuantType) -> Site:
    return sites.setdefault((tensor.name, dtype), Site(tensor, measured, dtype))


def _quantize_weight(
    graph: gs.Graph, layer: g.Linear, done: dict[str, gs.Tensor], least: float, levels: int
) -> None:
    stored = layer.node.inputs[1]
    if stored.name not in done:
        small, scale = q8.quantize_weight(layer.weight, least, levels)
        stem = stored.name
        tensors = [
            g.changed(gs.Constant(g.fresh(graph, f"{stem}/int8"), np.ascontiguousarray(small.T)), stored),  # [K, N]
            gs.Constant(g.fresh(graph, f"{stem}/scale"), scale.astype(np.float32)),
            gs.Constant(g.fresh(graph, f"{stem}/zero_point"), np.zeros(scale.shape, np.int8)),
        ]
        wide = gs.Variable(g.fresh(graph, f"{stem}/dequantized"), np.dtype(np.float32), list(stored.shape))
        name = g.fresh(graph, f"{stem}/dequantize")
        graph.nodes.append(gs.Node("DequantizeLinear", name, {"axis": 1}, tensors, [wide]))
        done[stored.name] = wide
    layer.node.inputs[1] = done[stored.name]


def _double(tensor: gs.Tensor) -> bool:
    """Of float64, which QuantizeLinear does not take."""
    return tensor.dtype is not None and bool(tensor.dtype == np.float64)
