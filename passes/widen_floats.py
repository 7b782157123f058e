"""WidenFloats: compute a half-precision model in float32, the precision that calibration and the CPU engine use."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import Context, Pass, Report

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # onnx.TensorProto.DataType
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class WidenFloats(Pass):
    """Turn float16 and bfloat16 weights and tensors into float32; inputs and outputs keep their types.

    x[f16] -> MatMul(x, W[f16]) -> y[f16]   ->   Cast(x) -> MatMul(., W[f32]) -> Cast -> y[f16]
    """

    def run(self, graph: gs.Graph, context: Context) -> Report:
        if any(_narrow_inside(sub) for sub in graph.subgraphs(recursive=True)):
            return Report(notes=("half-precision tensors inside If, Loop or Scan bodies: the model keeps its types",))
        changed = 0
        for tensor in list(graph.tensors().values()):
            if isinstance(tensor, gs.Constant) and _narrow(tensor.dtype):
                wide = _widened(tensor)
                for user in g.consumers(tensor):
                    user.inputs = [wide if x is tensor else x for x in user.inputs]
                changed += 1
        for node in graph.nodes:
            if node.op == "Cast" and node.attrs.get("to") in (FLOAT16, BFLOAT16) and not _narrows_output(graph, node):
                node.attrs["to"] = FLOAT
                changed += 1
            for key in ("dtype", "output_dtype"):  # EyeLike and the random ones; QuantizeLinear and its inverse
                if node.attrs.get(key) in (FLOAT16, BFLOAT16):
                    node.attrs[key] = FLOAT
                    changed += 1
            value = node.attrs.get("value")
            if isinstance(value, gs.Constant) and _narrow(value.dtype):
                node.attrs["value"] = _widened(value)
                changed += 1
        inputs = [t for t in graph.inputs if _narrow(t.dtype) and not all(map(_widens, g.consumers(t)))]
        outputs = [t for t in graph.outputs if _narrow(t.dtype)]
        outputs = [t for t in outputs if not any(_narrows_output(graph, node) for node in t.inputs)]
        if not changed and not inputs and not outputs:
            return Report()
        for tensor in inputs:
            wide = gs.Variable(g.fresh(graph, f"{tensor.name}/float32"), np.dtype(np.float32), tensor.shape)
            for user in g.consumers(tensor):
                user.inputs = [wide if x is tensor else x for x in user.inputs]
            name = g.fresh(graph, f"{tensor.name}/widen")
            graph.nodes.insert(0, gs.Node("Cast", name, {"to": FLOAT}, [tensor], [wide]))
        for index, tensor in enumerate(list(graph.outputs)):
            if any(tensor is output for output in outputs):
                graph.outputs[index] = _narrow_output(graph, tensor)
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable) and _narrow(tensor.dtype) and not _edge(graph, tensor):
                tensor.dtype = np.dtype(np.float32)
        g.cleanup(graph)
        return Report(changed=max(changed, 1))


def _widened(tensor: gs.Constant) -> gs.Constant:
    return g.derived(tensor, tensor.name, g.Cast("float32"))


def _narrow(dtype: object) -> bool:
    return dtype is not None and (dtype == BFLOAT16 or dtype in NARROW)


def _narrow_inside(graph: gs.Graph) -> bool:
    return any(_narrow(t.dtype) for t in graph.tensors().values())


def _widens(node: gs.Node) -> bool:
    return bool(node.op == "Cast" and node.attrs.get("to") == FLOAT)


def _narrows_output(graph: gs.Graph, node: gs.Node) -> bool:
    """A Cast from float32 that does nothing but make a graph output of half precision."""
    if node.op != "Cast" or _narrow(node.inputs[0].dtype) or not _narrow(node.outputs[0].dtype):
        return False
    return g.is_output(graph, node.outputs[0]) and not g.consumers(node.outputs[0])


def _edge(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(t is tensor for t in [*graph.inputs, *graph.outputs])


def _narrow_output(graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor:
    """A new output of the old name and type behind a Cast; the old tensor becomes float32 under another name."""
    name, dtype = tensor.name, tensor.dtype
    to = BFLOAT16 if dtype in (BFLOAT16, NARROW[1]) else FLOAT16
    tensor.name = g.fresh(graph, f"{name}/float32")
    tensor.dtype = np.dtype(np.float32)
    output = gs.Variable(name, dtype, tensor.shape)
    graph.nodes.append(gs.Node("Cast", g.fresh(graph, f"{name}/narrow"), {"to": to}, [tensor], [output]))
    return output
