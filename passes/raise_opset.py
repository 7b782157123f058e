"""RaiseOpset: bring the default ONNX operators to one version, so that later passes meet one meaning each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile.pipeline import Pass, Report


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert a graph of an older operator set to `version`; a newer one stays as it is.

    opset 11: Squeeze(x, axes=[1])  ->  opset 23: Squeeze(x, [1])
    """

    preserves: ClassVar[bool] = True
    version: int = 23  # the first with RMSNormalization

    def run(self, graph: gs.Graph) -> Report:
        before = graph.opset
        if before >= self.version:
            return Report()
        try:
            raised = _convert(graph, self.version)
        except Exception as error:  # the converter raises RuntimeError, ConvertError or InferenceError alike
            reason = str(error).strip().splitlines()[-1][:160] if str(error).strip() else type(error).__name__
            return Report(notes=(f"opset {before} kept, it cannot be raised to {self.version}: {reason}",))
        graph.nodes[:] = raised.nodes
        graph.inputs[:] = raised.inputs
        graph.outputs[:] = raised.outputs
        graph.opset = self.version
        graph.import_domains = raised.import_domains
        graph.ir_version = max(graph.ir_version or 0, raised.ir_version or 0, 10)
        return Report(changed=1, detail={"from": before, "to": self.version})


def _convert(graph: gs.Graph, version: int) -> gs.Graph:
    """onnx's own converter on a copy whose large weights stand aside as inputs, so that size does not matter."""
    bare = g.copy(graph)
    weights = {t.name: t.values for t in bare.tensors().values() if isinstance(t, gs.Constant) and t.values.size > 64}
    used_inside = {t.name for sub in bare.subgraphs(recursive=True) for t in sub.tensors().values()}
    tensors = bare.tensors()
    inputs = list(bare.inputs)
    for name in list(weights):
        if name in used_inside:
            del weights[name]
            continue
        values = weights[name]
        stand_in = tensors[name].to_variable(dtype=values.dtype, shape=list(values.shape))
        stand_in.type = "tensor_type"  # GraphSurgeon forgets it
        bare.inputs.append(stand_in)
    model = onnx.version_converter.convert_version(g.to_model(bare), version)
    raised = g.load(model)
    by_name = raised.tensors()
    for name, values in weights.items():
        if name in by_name:
            by_name[name].to_constant(values)
    raised.inputs[:] = [by_name.get(t.name, t) for t in inputs]
    return raised
