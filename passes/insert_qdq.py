"""InsertQdq: quantize linear layers and attention with QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile.contract import CANONICAL, Context, Pass, Report
from nmcompile.qdq.placed import insert, round_weights
from nmcompile.qdq.placement import needs, place
from nmcompile.qdq.scheme import Scheme


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
    softmax: bool = False  # with attention int8: quantize the softmax's probabilities too
    heads: bool = False  # quantize heads and poolers too
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: Scheme) -> InsertQdq:
        """The pass of a scheme; probabilities are quantized where attention is."""
        softmax = scheme.softmax and scheme.attention == "int8"
        return cls(
            scheme.activations, scheme.clip, scheme.percentile, scheme.bias, scheme.least_scale, scheme.attention,
            scheme.weight_bits, softmax, scheme.heads, scheme.include, scheme.keep,
        )  # fmt: skip

    @property
    def scheme(self) -> Scheme:
        """The options as a scheme; PassError for one that is not known."""
        return Scheme(
            activations=self.activations, weight_bits=self.weight_bits, attention=self.attention, softmax=self.softmax,
            heads=self.heads, least_scale=self.least_scale, clip=self.clip, percentile=self.percentile, bias=self.bias,
            include=self.include, keep=self.exclude,
        )  # fmt: skip

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        scheme = self.scheme
        return needs(place(graph, scheme), scheme)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        scheme = self.scheme
        placement = place(graph, scheme)
        placed = insert(graph, placement, scheme, context.gathered)
        round_weights(graph, placed)
        ranges = {site.tensor: f"{site.params.dtype} scale {site.params.scale:.6g} zero {site.params.zero_point}"
                  for site in placed.sites}  # fmt: skip
        notes = tuple(f"{name}: kept as it is, {reason}" for name, reason in placed.kept.items())
        detail = {"layers": len(placement.layers), "activations": ranges}
        return Report(changed=len(placement.sites) + len(placement.layers), detail=detail, notes=notes)
