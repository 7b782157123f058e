"""Quantize/dequantize pairs, as all passes write them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8


def quantized(graph: gs.Graph, tensor: gs.Tensor, params: q8.QuantParams) -> gs.Variable:
    """DequantizeLinear(QuantizeLinear(tensor)), which nothing reads yet."""
    stem = f"{tensor.name}/{params.dtype}"
    kind = np.dtype(params.dtype)
    scale = gs.Constant(g.fresh(graph, f"{stem}/scale"), np.array(params.scale, np.float32))
    zero = gs.Constant(g.fresh(graph, f"{stem}/zero_point"), np.array(params.zero_point, kind))
    small = gs.Variable(g.fresh(graph, f"{stem}/quantized"), kind, tensor.shape)
    wide = gs.Variable(g.fresh(graph, f"{stem}/dequantized"), np.dtype(np.float32), tensor.shape)
    graph.nodes.append(gs.Node("QuantizeLinear", g.fresh(graph, f"{stem}/quantize"), inputs=[tensor, scale, zero],
                               outputs=[small]))  # fmt: skip
    graph.nodes.append(gs.Node("DequantizeLinear", g.fresh(graph, f"{stem}/dequantize"), inputs=[small, scale, zero],
                               outputs=[wide]))  # fmt: skip
    return wide
