"""RaiseOpset: bring the default ONNX operators to one version, so that later passes meet one meaning each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import Context, Pass, Report

ASIDE = "nmcompile.aside"  # a domain that the converter does not know and so leaves alone


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert a graph of an older operator set to `version`; a newer one stays as it is.

    opset 11: Squeeze(x, axes=[1])  ->  opset 23: Squeeze(x, [1])
    """

    preserves: ClassVar[bool] = True
    version: int = 23  # the first with RMSNormalization

    def run(self, graph: gs.Graph, context: Context) -> Report:
        before = graph.opset
        if before >= self.version:
            return Report()
        try:
            raised = _convert(graph, self.version, context)
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


def _set_aside_softmax(graph: gs.Graph, context: Context) -> None:
    """Hide Softmax over the last axis from the converter: before opset 13 it flattened its input, which over the last
    axis is the same, but the converter wraps it in Flatten and Reshape all the same."""
    old = [node for node in graph.nodes if node.op in ("Softmax", "LogSoftmax")] if graph.opset < 13 else []
    if old:
        context.derive(graph)  # for the ranks
    for node in old:
        rank = len(node.inputs[0].shape) if node.inputs and node.inputs[0].shape is not None else None
        if rank and node.attrs.get("axis", 1) in (-1, rank - 1):
            node.attrs["axis"] = -1
            node.domain = ASIDE


def _graphs(graph: gs.Graph) -> list[gs.Graph]:
    return [graph, *graph.subgraphs(recursive=True)]


def _convert(graph: gs.Graph, version: int, context: Context) -> gs.Graph:
    """onnx's own converter on a copy whose large weights stand aside as inputs, so that size does not matter."""
    bare = g.copy(graph)
    _set_aside_softmax(bare, context)
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
    for node in raised.nodes:
        if node.domain == ASIDE:
            node.domain = None
    raised.import_domains = [item for item in raised.import_domains if item.domain != ASIDE]
    held = {t.name: t for one in _graphs(graph) for t in one.tensors().values() if isinstance(t, gs.Constant)}
    for tensor in [t for one in _graphs(raised) for t in one.tensors().values() if isinstance(t, gs.Constant)]:
        g.with_source(tensor, g.source(held[tensor.name]) if tensor.name in held else None)
    by_name = raised.tensors()
    for name, values in weights.items():
        if name in by_name:
            g.with_source(by_name[name].to_constant(values), g.source(held[name]))
    raised.inputs[:] = [by_name.get(t.name, t) for t in inputs]
    return raised
