"""StoreWeights: hand quantized weights to a runtime as floats that it quantizes, or as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import Context, Pass, Report
from nmcompile.errors import PassError


@dataclass(frozen=True)
class StoreWeights(Pass):
    """Put weights in float before a Q/DQ pair; they lie on the grid already, so that nothing is rounded anew.

    DequantizeLinear(W_int8, s)   ->   DequantizeLinear(QuantizeLinear(W_float, s), s)

    form: float, which every TensorRT reads and whose sparsity it is known to see; int8 leaves the integers, a quarter
    of the size, which TensorRT reads from version 10 on.
    """

    preserves: ClassVar[bool] = True
    form: str = "float"

    def run(self, graph: gs.Graph, context: Context) -> Report:
        if self.form not in ("float", "int8"):
            raise PassError(f"form={self.form} is not known; choose float or int8")
        changed = 0
        for node in [node for node in graph.nodes if node.op == "DequantizeLinear"] if self.form == "float" else ():
            stored, values = g.constant(node.inputs[0]), g.dequantized(node)
            if stored is None or values is None or stored.dtype != np.int8 or "block_size" in node.attrs:
                continue
            stem = node.name
            wide = g.changed(gs.Constant(g.fresh(graph, f"{stem}/float"), values), node.inputs[0])
            small = gs.Variable(g.fresh(graph, f"{stem}/int8"), np.dtype(np.int8), list(values.shape))
            attrs = {"axis": node.attrs["axis"]} if "axis" in node.attrs else {}
            name = g.fresh(graph, f"{stem}/quantize")
            graph.nodes.append(gs.Node("QuantizeLinear", name, attrs, [wide, *node.inputs[1:]], [small]))
            node.inputs[0] = small
            changed += 1
        if changed:
            g.cleanup(graph)
        return Report(changed=changed)
