"""Products of 8-bit integers in a form that onnxruntime computes alike on every CPU.

Without VNNI onnxruntime adds pairs of u8 x s8 products in saturating 16-bit words; u8 x u8 and s8 x s8 are exact. It
mends that itself for weights (ort_options.EXACT), but only when it optimises, and then it refuses to open a model in
which two nodes read one weight or one zero point ("Attempt to replace the existing tensor", 1.32). What stands here
changes no value: x - z is the same in u8 as in s8 when 128 is added to both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile.ir.bodies import inner_graphs
from nmcompile.ir.edit import is_output
from nmcompile.ir.names import fresh

Array = npt.NDArray[Any]

MICROSOFT = "com.microsoft"
WITHIN = 64  # 2 * 255 * 64 is below 2**15: no pair of products of such weights saturates


@dataclass(frozen=True)
class Places:
    """Where a node has its s8 operand, that operand's zero point, and the zero point of the other operand."""

    weight: int
    zero: int
    other: int | None


PLACES = {
    ("", "MatMulInteger"): Places(1, 3, 2),
    ("", "QLinearMatMul"): Places(3, 5, 2),
    ("", "QLinearConv"): Places(3, 5, 2),
    (MICROSOFT, "DynamicQuantizeMatMul"): Places(1, 3, None),
    (MICROSOFT, "MatMulIntegerToFloat"): Places(1, 5, 4),
    (MICROSOFT, "QAttention"): Places(1, 7, 6),
    (MICROSOFT, "QGemm"): Places(3, 5, 2),
}
DEQUANTIZE = Places(0, 2, None)
# onnxruntime converts the weights of opset 10's only (1.32), and canonical graphs are of opset 23
MISSED = (("", "QLinearMatMul"),)


def exact_products(graph: gs.Graph, *, optimised: bool) -> None:
    """Edit a graph in place so that onnxruntime computes the same on every CPU, with its optimizations or without."""
    unsigned_weights(graph, MISSED if optimised else PLACES)
    if optimised:
        unshared(graph)
        unsigned_operands(graph)


def may_saturate(graph: gs.Graph) -> bool:
    """Whether some weight is so large that onnxruntime, as it opens a model by itself, may saturate without VNNI."""
    return any(_saturates(node, places) for node in _nodes(graph) if (places := _places(node)) is not None)


def unsigned_weights(graph: gs.Graph, kinds: Collection[tuple[str, str]] = PLACES) -> None:
    """s8 weights of integer products become u8, in place.

    MatMulInteger(x_u8, W, zx, z)  ->  MatMulInteger(x_u8, W + 128, zx, z + 128)
    """
    for node in _nodes(graph):
        places = PLACES.get(_kind(node)) if _kind(node) in kinds else None
        if places is not None and _saturates(node, places) and not _is_s8(node, places.other):
            zero = _input(node, places.zero)
            shift = np.zeros((), np.int8) if zero is None else np.asarray(zero.values)
            _set(graph, node, places.weight, _shifted(np.asarray(node.inputs[places.weight].values)))
            _set(graph, node, places.zero, _shifted(shift))


def unshared(graph: gs.Graph) -> None:
    """Every s8 weight that onnxruntime may turn into u8 is read by one node, as is its zero point; in place. Arrays are
    shared all the same.

    MatMul(x, DQ(W)), MatMul(y, DQ(W)) of one DQ  ->  two DQs of two names for W
    """
    for node in [node for node in graph.nodes if _kind(node) == ("", "DequantizeLinear")]:
        if _saturates(node, DEQUANTIZE):
            scale = _input(node, 1)
            if _input(node, 2) is None and scale is not None:  # onnxruntime adds a scalar, whatever the scale's shape
                _set(graph, node, 2, np.zeros(np.shape(scale.values), np.int8))
            _split(graph, node)
    for node in _nodes(graph):
        places = _places(node)
        if places is not None and _saturates(node, places):
            for place in (places.weight, places.zero):
                shared = _input(node, place)
                if shared is not None and len(shared.outputs) > 1:
                    _set(graph, node, place, shared.values)


def unsigned_operands(graph: gs.Graph) -> None:
    """s8 pairs that several products read as their second operand become u8, in place: onnxruntime does that itself
    where only one reads them.

    DQ(Q(k, z))  ->  DQ(Q(k, z + 128))     two MatMuls read it
    """
    for node in graph.nodes:
        if _kind(node) != ("", "QuantizeLinear") or len(node.inputs) < 3 or is_output(graph, node.outputs[0]):
            continue
        readers, zero = list(node.outputs[0].outputs), node.inputs[2]
        if not isinstance(zero, gs.Constant) or zero.dtype != np.int8 or np.size(zero.values) != 1 or not all(
            _kind(reader) == ("", "DequantizeLinear") and len(reader.inputs) > 2 and _input(reader, 2) is not None
            and np.array_equal(reader.inputs[2].values, zero.values) for reader in readers
        ):  # fmt: skip
            continue
        uses = [(user, tensor) for reader in readers for tensor in reader.outputs for user in tensor.outputs]
        if len(uses) > 1 and any(user.op == "MatMul" and user.inputs[1] is tensor for user, tensor in uses):
            for changed in (node, *readers):
                _set(graph, changed, 2, _shifted(np.asarray(zero.values)))
            node.outputs[0].dtype = np.dtype(np.uint8)


def _split(graph: gs.Graph, node: gs.Node) -> None:
    """A copy of the node for each of its readers but the first."""
    wide = node.outputs[0]
    for reader in list(wide.outputs)[0 if is_output(graph, wide) else 1 :]:
        place = next(index for index, tensor in reversed(list(enumerate(reader.inputs))) if tensor is wide)
        name = fresh(graph, f"{wide.name}/again")
        made = gs.Variable(name, wide.dtype, wide.shape)
        graph.nodes.insert(graph.nodes.index(node), gs.Node(
            node.op, fresh(graph, f"{node.name}/again"), dict(node.attrs), list(node.inputs), [made]))  # fmt: skip
        reader.inputs[place] = made


def _nodes(graph: gs.Graph) -> list[gs.Node]:
    return [node for part in (graph, *inner_graphs(graph)) for node in part.nodes]


def _kind(node: gs.Node) -> tuple[str, str]:
    return ("" if node.domain in (None, "", "ai.onnx") else node.domain, node.op)


def _places(node: gs.Node) -> Places | None:
    return DEQUANTIZE if _kind(node) == ("", "DequantizeLinear") else PLACES.get(_kind(node))


def _input(node: gs.Node, place: int) -> gs.Constant | None:
    """The constant that the node reads there."""
    found = node.inputs[place] if place < len(node.inputs) else None
    return found if isinstance(found, gs.Constant) else None


def _is_s8(node: gs.Node, place: int | None) -> bool:
    found = None if place is None else _input(node, place)
    return found is not None and found.dtype == np.int8


def _saturates(node: gs.Node, places: Places) -> bool:
    """Whether the node's weight is a constant s8 one that can make a pair of products saturate."""
    weight = _input(node, places.weight)
    if weight is None or weight.dtype != np.int8:
        return False
    zero = node.inputs[places.zero] if places.zero < len(node.inputs) else None
    if zero is not None and zero.name and not isinstance(zero, gs.Constant):
        return False  # onnxruntime leaves these as they are, and so do we
    values = np.asarray(weight.values)
    return values.size > 0 and (int(values.min()) < -WITHIN or int(values.max()) > WITHIN)


def _shifted(values: Array) -> Array:
    """128 more, u8 for s8."""
    return np.asarray(values.view(np.uint8) ^ np.uint8(128))


def _set(graph: gs.Graph, node: gs.Node, place: int, values: Array) -> None:
    """Let the node read a constant of its own."""
    before = node.inputs[place].name if place < len(node.inputs) else ""
    while len(node.inputs) <= place:
        node.inputs.append(gs.Variable.empty())
    node.inputs[place] = gs.Constant(fresh(graph, f"{before or node.name}/own"), values)
