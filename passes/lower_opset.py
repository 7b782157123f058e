"""LowerOpset: legalize a graph for an older operator set, for runtimes that read no newer one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.contract import SHAPES, Context, Pass, Report
from nmcompile.errors import PassError

DOMAINS = (None, "", "ai.onnx")


@dataclass(frozen=True)
class LowerOpset(Pass):
    """Convert a graph of a newer operator set to `version`; an older one stays as it is.

    opset 23: Gelu(x)  ->  opset 17: x * 0.5 * (1 + Erf(x / sqrt 2))

    Operators that came later are written with those of before, sizes that became inputs turn into attributes again.
    An operator that the older set cannot express is an error.
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (SHAPES,)
    version: int = 17

    def run(self, graph: gs.Graph, context: Context) -> Report:
        if graph.opset <= self.version:
            return Report()
        changed = 0
        for inner in [graph, *graph.subgraphs(recursive=True)]:
            for op, (since, legalize) in LEGALIZATIONS.items():
                found = [node for node in inner.nodes if node.op == op and node.domain in DOMAINS]
                for node in found if since > self.version else ():
                    legalize(inner, node)
                    changed += 1
        g.cleanup(graph)
        for node in _nodes(graph):
            if node.domain in DOMAINS:
                _fit(node, graph.opset, self.version)
        before, graph.opset = graph.opset, self.version
        graph.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.version)])
        for inner in graph.subgraphs(recursive=True):
            inner.opset = self.version
        return Report(changed=1, detail={"from": before, "to": self.version, "legalized": changed})


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for inner in [graph, *graph.subgraphs(recursive=True)]:
        yield from inner.nodes


# ---- operators that came later, by what came before -----------------------------------------------------------------


def _gelu(graph: gs.Graph, node: gs.Node) -> None:
    b, x, y = Builder(graph, node.name), node.inputs[0], node.outputs[0]

    def op(kind: str, *inputs: gs.Tensor) -> gs.Tensor:
        return b(kind, *inputs, dtype=y.dtype or np.float32, shape=y.shape)

    def number(value: float) -> gs.Tensor:
        return b.scalar(value, y.dtype or np.float32)

    if node.attrs.get("approximate", "none") == "tanh":
        cube = op("Mul", op("Mul", op("Mul", x, x), x), number(0.044715))
        bent = op("Tanh", op("Mul", op("Add", x, cube), number(sqrt(2 / pi))))
    else:
        bent = op("Erf", op("Div", x, number(sqrt(2))))
    # the order of TorchScript's exporter, which is what fusions look for
    g.rewire(graph, y, op("Mul", op("Mul", x, op("Add", bent, number(1.0))), number(0.5)))


def _rms_norm(graph: gs.Graph, node: gs.Node) -> None:
    b, (x, gain), y = Builder(graph, node.name), node.inputs[:2], node.outputs[0]
    rank = len(x.shape) if x.shape is not None else None
    axis = int(node.attrs.get("axis", -1))
    if axis != -1 and rank is None:
        raise PassError(f"node '{node.name}' (RMSNormalization): the rank of its input is not known")
    axes = [-1] if axis == -1 or rank is None else list(range(axis % rank, rank))
    mean = b("ReduceMean", b("Pow", x, b.scalar(2.0), shape=x.shape), b.ints(*axes), keepdims=1)
    root = b("Sqrt", b("Add", mean, b.scalar(float(node.attrs.get("epsilon", 1e-5)))))
    g.rewire(graph, y, b("Mul", b("Div", x, root, shape=x.shape), gain, shape=y.shape))


def _reduce(graph: gs.Graph, node: gs.Node) -> None:
    """Axes as an attribute, as before opset 18."""
    axes = node.inputs[1] if len(node.inputs) > 1 and not node.inputs[1].is_empty() else None
    noop = node.attrs.pop("noop_with_empty_axes", 0)
    values = None if axes is None else g.constant(axes)
    if axes is not None and values is None:
        raise PassError(f"node '{node.name}' ({node.op}): its axes are computed, which opsets before 18 cannot say")
    if values is not None and values.size:
        node.attrs["axes"] = [int(value) for value in values.reshape(-1)]
    elif noop:
        node.op = "Identity"
        node.attrs.clear()
    node.inputs = node.inputs[:1]


def _split(graph: gs.Graph, node: gs.Node) -> None:
    """Equal parts are the default before opset 18; a smaller last one is written out."""
    parts = node.attrs.pop("num_outputs", None)
    shape, axis = node.inputs[0].shape, int(node.attrs.get("axis", 0))
    size = shape[axis] if shape is not None else None
    if parts is None or not isinstance(size, int) or size % int(parts) == 0:
        return
    each = -(-size // int(parts))
    sizes = [*[each] * (int(parts) - 1), size - each * (int(parts) - 1)]
    node.inputs = [node.inputs[0], Builder(graph, node.name).ints(*sizes)]


def _pad(graph: gs.Graph, node: gs.Node) -> None:
    """Pads of all axes, as before opset 18 brought a choice of them."""
    if len(node.inputs) < 4 or node.inputs[3].is_empty():
        return
    pads, axes, shape = g.constant(node.inputs[1]), g.constant(node.inputs[3]), node.inputs[0].shape
    if pads is None or axes is None or shape is None:
        raise PassError(f"node '{node.name}' (Pad): its axes or pads are computed, which opsets before 18 cannot say")
    whole = np.zeros((2, len(shape)), np.int64)
    whole[:, axes.reshape(-1)] = pads.reshape(2, -1)
    node.inputs[1] = Builder(graph, node.name).ints(*whole.reshape(-1).tolist())
    node.inputs = node.inputs[:3]


Legalization = Callable[[gs.Graph, gs.Node], None]
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
              "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
# operator -> (first opset of the form that is legalized, how); in this order, since some make others
LEGALIZATIONS: Mapping[str, tuple[int, Legalization]] = {
    "Gelu": (20, _gelu),
    "RMSNormalization": (23, _rms_norm),
    "Split": (18, _split),
    "Pad": (18, _pad),
    **{op: (18, _reduce) for op in REDUCTIONS},
}


# ---- what is left ---------------------------------------------------------------------------------------------------


def _fit(node: gs.Node, now: int, version: int) -> None:
    """Drop attributes that the older operator lacks where they say what is usual; PassError where they do not."""
    try:
        old = onnx.defs.get_schema(node.op, version, "")
    except onnx.defs.SchemaError:
        raise PassError(f"node '{node.name}': opset {version} has no operator {node.op}; "
                        "export the model with an older opset") from None  # fmt: skip
    new = onnx.defs.get_schema(node.op, now, "")
    if old.since_version == new.since_version:
        return
    if len(node.inputs) > old.max_input:
        raise PassError(f"node '{node.name}': {node.op} of opset {version} takes {old.max_input} inputs, "
                        f"not {len(node.inputs)}; export the model with an older opset")  # fmt: skip
    for name in [name for name in node.attrs if name not in old.attributes]:
        known = new.attributes.get(name)
        usual = None if known is None or not known.default_value.name else onnx.helper.get_attribute_value(
            known.default_value)  # fmt: skip
        usual = usual.decode() if isinstance(usual, bytes) else usual
        if node.attrs[name] != usual:
            raise PassError(f"node '{node.name}': {node.op} of opset {version} has no attribute {name}; "
                            "export the model with an older opset")  # fmt: skip
        del node.attrs[name]
