"""NarrowFloats: compute in half precision, and in float32 where half does not reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import SHAPES, Context, Pass, Report

FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)
NUMBERS = {FLOAT: 1, HALF: 10}  # onnx.TensorProto.DataType
LARGEST, LEAST = 65504.0, 6.104e-5  # finite and normal values of half precision
NOTHING = -1e30  # at or below: a score that masks its key, of any float type
MASKED = -32752.0  # what it becomes: a score added to it stays finite
SAMPLES = 32  # on which values are looked at
# Sums and squares over many values, and what half precision is known to spoil.
FLOAT_OPS = frozenset({
    "LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization", "ReduceMean", "ReduceSum",
    "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum", "Pow", "Exp", "Range", "Resize", "Sin",
    "Cos",
})  # fmt: skip
SUMS = ("Pow", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
AFTER_SUMS = ("Add", "Sub", "Sqrt", "Reciprocal", "Max", "Clip")  # the way from a sum of squares to a division by it
BY_SUMS = ("Div", "Mul")
ANGLES = ("Sin", "Cos")
WHOLE = 2048.0  # up to which half precision holds every whole number


@dataclass(frozen=True)
class NarrowFloats(Pass):
    """Give every float tensor a type, for networks that compute in the types that stand there.

    x[f32] -> MatMul(x, W[f32]) -> y[f32]   ->   Cast(x) -> MatMul(., W[f16]) -> Cast -> y[f32]

    Inputs and outputs of the graph keep their types. Normalisations, sums, powers and what is divided by them stay
    float32, angles and all that makes them, and so does what reaches values above 65504 / `margin` on the calibration
    data, or reads a number that half precision has not; each such node is named in a note, all are in the report's
    detail. The scales of Q/DQ pairs are of the type that they make.
    """

    requires: ClassVar[tuple[str, ...]] = (SHAPES,)
    margin: float = 8.0

    def run(self, graph: gs.Graph, context: Context) -> Report:
        if any(True for _ in graph.subgraphs(recursive=True)):
            return Report(notes=("If, Loop or Scan inside: all floats stay float32",))
        peaks = _peaks(graph, context)
        limit = LARGEST / self.margin
        kept = {node.name: why for node in graph.nodes if (why := _stays_float(graph, node, peaks, limit))}
        _spread_from_sums(graph, kept)
        _spread_to_angles(graph, kept)
        _spread_to_pairs(graph, kept)
        wide = [t for t in graph.outputs if t.dtype == FLOAT]
        edges = _Edges(graph)
        for node in list(graph.nodes):
            edges.retype(node, FLOAT if node.name in kept else HALF)
        for index, tensor in enumerate(list(graph.outputs)):
            if tensor.dtype == HALF and any(tensor is t for t in wide):
                edges.widen_output(index, tensor)
        g.cleanup(graph)
        notes = [f"{name}: stays float32, {why}" for name, why in kept.items() if not why.startswith("by kind")]
        detail = {"half": sum(node.name not in kept for node in graph.nodes), "float32": kept}
        return Report(changed=edges.changed, detail=detail, notes=tuple(notes))


def _floats(tensors: list[gs.Tensor]) -> list[gs.Tensor]:
    return [t for t in tensors if not t.is_empty() and t.dtype == FLOAT]


def _peaks(graph: gs.Graph, context: Context) -> dict[str, float]:
    """Largest finite |value| of every float tensor that a node makes, masked scores left out."""
    names = [t.name for node in graph.nodes for t in _floats(node.outputs)]
    if context.calibration is None or not names:
        return {}
    found = dict.fromkeys(names, 0.0)
    run, count = g.runner(graph, names), 0
    for feed in context.data:
        for name, values in run(feed).items():
            real = values[values > NOTHING]
            found[name] = max(found[name], float(np.abs(real).max(initial=0.0)))
        count += len(next(iter(feed.values())))
        if count >= SAMPLES:
            break
    return found


def _stays_float(graph: gs.Graph, node: gs.Node, peaks: Mapping[str, float], limit: float) -> str:
    """Why a node computes in float32, "" if it need not."""
    inside, made = _floats(node.inputs), _floats(node.outputs)
    if not inside and not made:
        return ""
    filled = node.attrs.get("value")
    if node.op == "ConstantOfShape" and filled is not None:
        return _beyond(np.asarray(filled.values))
    if node.op == "Cast" and made and not inside and peaks.get(made[0].name, 0.0) > WHOLE:
        return f"its whole numbers reach {peaks[made[0].name]:.3g}"
    widens = node.op == "Cast" and node.inputs[0].dtype == HALF
    if node.op in FLOAT_OPS or widens:
        return "by kind"
    if not _takes_half(node, graph.opset):
        return f"by kind: {node.op} of opset {graph.opset} has no half precision"
    for tensor in [*inside, *made]:
        values = g.constant(tensor)
        if values is not None and node.op in ("QuantizeLinear", "DequantizeLinear") and tensor is node.inputs[1]:
            if values.min() < LEAST:
                return f"its scale {float(values.min()):.3g} is too small for half precision"
            if values.max() > LARGEST:
                return f"its scale {float(values.max()):.3g} is too large for half precision"
        elif values is not None:
            if why := _beyond(values):
                return why
        elif peaks.get(tensor.name, 0.0) > limit:
            return f"its values reach {peaks[tensor.name]:.3g}"
    return ""


def _beyond(values: np.ndarray) -> str:
    """Why half precision cannot hold constants: too large, or a single number (an epsilon) too small."""
    sizes = np.abs(values[values > NOTHING])
    if sizes.max(initial=0.0) > LARGEST:
        return f"its constant reaches {float(sizes.max()):.3g}"
    if sizes.size == 1 and 0 < sizes.item() < LEAST:
        return f"its constant {float(sizes.item()):.3g} is too small for half precision"
    return ""


def _spread_from_sums(graph: gs.Graph, kept: dict[str, str]) -> None:
    """What is between a sum and the division by it, and that division, stay float32 with it."""
    chain = {t.name for node in graph.nodes if node.op in SUMS for t in node.outputs}
    for node in graph.nodes:  # producers first
        read = [t for t in _floats(node.inputs) if g.constant(t) is None]
        if read and node.op in AFTER_SUMS and all(t.name in chain for t in read):
            chain |= {t.name for t in node.outputs}
            kept.setdefault(node.name, "by kind: it goes on from a sum")
        elif node.op in BY_SUMS and any(t.name in chain for t in read):
            kept.setdefault(node.name, "by kind: it is divided by a sum")


def _spread_to_angles(graph: gs.Graph, kept: dict[str, str]) -> None:
    """All that computes an angle, back to where it is quantized or comes from outside, stays float32."""
    todo = [t for node in graph.nodes if node.op in ANGLES for t in _floats(node.inputs)]
    while todo:
        maker = g.producer(todo.pop())
        if maker is not None and maker.op not in ("DequantizeLinear", "QuantizeLinear") and maker.name not in kept:
            kept[maker.name] = "by kind: it makes an angle"
            todo += _floats(maker.inputs)


def _takes_half(node: gs.Node, opset: int) -> bool:
    """Whether the operator is defined on half precision wherever this node has floats."""
    if node.domain not in (None, "", "ai.onnx"):
        return False
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return False
    types = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    for formal, tensors in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, tensor in enumerate(tensors):
            kind = formal[min(index, len(formal) - 1)].type_str if formal else ""
            if tensor.dtype == FLOAT and "tensor(float16)" not in types.get(kind, [kind]):
                return False
    return True


def _spread_to_pairs(graph: gs.Graph, kept: dict[str, str]) -> None:
    """A Q and its DQ compute in one type, since they share their scale."""
    for node in graph.nodes:
        if node.op != "QuantizeLinear":
            continue
        pair = [node, *(user for user in g.consumers(node.outputs[0]) if user.op == "DequantizeLinear")]
        why = next((kept[item.name] for item in pair if item.name in kept), "")
        for item in pair if why else ():
            kept.setdefault(item.name, why)


def _half(values: np.ndarray) -> np.ndarray:
    """In half precision; what stands for minus infinity stays finite."""
    return np.where(values <= NOTHING, MASKED, values).astype(HALF)


class _Edges:
    """Brings what a node reads to the node's type; one Cast or one copy of a constant for all readers."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph, self.changed = graph, 0
        self._made: dict[tuple[int, np.dtype], gs.Tensor] = {}
        self._held: list[gs.Tensor] = []  # so that no id is used twice

    def retype(self, node: gs.Node, kind: np.dtype) -> None:
        neutral = node.op == "Cast"
        for index, tensor in enumerate(list(node.inputs)):
            if tensor.dtype in (FLOAT, HALF) and tensor.dtype != kind and not neutral:
                node.inputs[index] = self._as(tensor, kind)
        if kind == HALF:
            if neutral and node.attrs.get("to") == NUMBERS[FLOAT]:
                node.attrs["to"] = NUMBERS[HALF]
            value = node.attrs.get("value")  # of ConstantOfShape
            if value is not None and getattr(value, "dtype", None) == FLOAT:
                node.attrs["value"] = gs.Constant("value", _half(np.asarray(value.values)))
            for tensor in _floats(node.outputs):
                tensor.dtype = HALF
                self.changed += 1

    def _as(self, tensor: gs.Tensor, kind: np.dtype) -> gs.Tensor:
        key = (id(tensor), kind)
        if key in self._made:
            return self._made[key]
        name = g.fresh(self.graph, f"{tensor.name}/{kind.name}")
        made: gs.Tensor
        if isinstance(tensor, gs.Constant):
            values = np.asarray(tensor.values)
            made = g.changed(gs.Constant(name, _half(values) if kind == HALF else values.astype(kind)), tensor)
        else:
            made = gs.Variable(name, kind, tensor.shape)
            cast = g.fresh(self.graph, f"{tensor.name}/to_{kind.name}")
            self.graph.nodes.append(gs.Node("Cast", cast, {"to": NUMBERS[kind]}, [tensor], [made]))
            self.changed += 1
        self._made[key] = made
        self._held.append(tensor)
        return made

    def widen_output(self, index: int, tensor: gs.Tensor) -> None:
        """The graph's output in float32 under its old name."""
        name, tensor.name = tensor.name, g.fresh(self.graph, f"{tensor.name}/float16")
        output = gs.Variable(name, FLOAT, tensor.shape)
        cast = g.fresh(self.graph, f"{name}/to_float32")
        self.graph.nodes.append(gs.Node("Cast", cast, {"to": NUMBERS[FLOAT]}, [tensor], [output]))
        self.graph.outputs[index] = output
