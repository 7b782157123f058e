"""Says what is legal in a graph between any two passes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.bodies import bodies
from nmcompile.ir.edit import constant, consumers


def verify(graph: gs.Graph, stage: str) -> None:
    """Raise GraphError, naming the stage, the node and the remedy, unless the graph is well formed:

    unique node and tensor names, one producer each, sorted, outputs produced; after "load" also quantization:
    every QuantizeLinear is read by something, constant scales are finite and > 0 and of their tensor's number
    of channels.
    """
    _structure(graph, stage, {}, {})
    if stage != "load":
        for node in graph.nodes:
            if node.op in ("QuantizeLinear", "DequantizeLinear"):
                _quantization(graph, stage, node)


def _structure(graph: gs.Graph, stage: str, outer: dict[str, gs.Tensor], named: dict[str, gs.Node]) -> None:
    known = dict(outer)
    own = {id(node) for node in graph.nodes}
    for tensor in graph.inputs:
        if tensor.name in known:
            raise GraphError(f"{stage}: two tensors are named '{tensor.name}'; give the input another name")
        known[tensor.name] = tensor
    for node in graph.nodes:
        if not node.name:
            raise GraphError(f"{stage}: a node {node.op} of '{_first(node)}' has no name; name it by graph.fresh")
        if node.name in named:
            other = named[node.name].op
            raise GraphError(f"{stage}: {other} and {node.op} are both named '{node.name}'; use graph.fresh")
        named[node.name] = node
        parts = node.attrs.get("num_outputs")
        if node.op == "Split" and parts is not None and parts != len(node.outputs):
            raise GraphError(f"{stage}: node '{node.name}' (Split) has {len(node.outputs)} outputs, num_outputs says "
                             f"{parts}; the file is damaged, export it again")  # fmt: skip
        for tensor in node.inputs:
            _check_read(tensor, node, stage, known, own)
        for sub in bodies(node):
            _structure(sub, stage, known, named)
        for tensor in node.outputs:
            _check_made(tensor, node, stage, known)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant):
            known.setdefault(tensor.name, tensor)
        if known.get(tensor.name) is not tensor:
            raise GraphError(f"{stage}: output '{tensor.name}' is not computed by any node; rewire it or drop it")


def _check_read(tensor: gs.Tensor, node: gs.Node, stage: str, known: dict[str, gs.Tensor], own: set[int]) -> None:
    if not tensor.name:
        return
    if isinstance(tensor, gs.Constant):
        known.setdefault(tensor.name, tensor)
    found = known.get(tensor.name)
    if found is tensor:
        return
    where = f"{stage}, node '{node.name}' ({node.op}): input '{tensor.name}'"
    if found is not None:
        raise GraphError(f"{where} shares its name with another tensor; name the new one by graph.fresh")
    if not tensor.inputs:
        raise GraphError(f"{where} is neither computed, an input, nor a weight; rewire the node")
    if id(tensor.inputs[0]) not in own:
        raise GraphError(f"{where} is computed by '{tensor.inputs[0].name}', which is not in the graph; add it")
    raise GraphError(f"{where} is computed later, by '{tensor.inputs[0].name}': a cycle, or not sorted; "
                     "call graph.cleanup after editing")  # fmt: skip


def _check_made(tensor: gs.Tensor, node: gs.Node, stage: str, known: dict[str, gs.Tensor]) -> None:
    if not tensor.name:
        return
    where = f"{stage}, node '{node.name}' ({node.op}): output '{tensor.name}'"
    if isinstance(tensor, gs.Constant):
        raise GraphError(f"{where} is a constant; clear its producers first")
    if len(tensor.inputs) > 1:
        raise GraphError(f"{where} is also produced by '{tensor.inputs[0].name}'; give each result a name of its own")
    if tensor.name in known:
        raise GraphError(f"{where} shares its name with another tensor; name the new one by graph.fresh")
    known[tensor.name] = tensor


def _first(node: gs.Node) -> str:
    return next((t.name for t in node.outputs), "?")


def _quantization(graph: gs.Graph, stage: str, node: gs.Node) -> None:
    where = f"{stage}, node '{node.name}' ({node.op})"
    scale = constant(node.inputs[1])
    if scale is not None:
        values = scale.astype(np.float32)
        if not np.isfinite(values).all() or not (values > 0).all():
            raise GraphError(f"{where}: scale {_worst(values)} is not finite and > 0; calibrate again on other samples")
        if scale.ndim == 1 and scale.size > 1:
            _check_channels(node, where, scale.size)
    if node.op == "QuantizeLinear" and node.outputs[0].name not in {t.name for t in graph.outputs}:
        readers = list(_beyond(node.outputs[0]))
        if not any(reader.op == "DequantizeLinear" or _takes_integers(reader) for reader in readers):
            raise GraphError(f"{where} has no DequantizeLinear; add one or drop the node")


def _check_channels(node: gs.Node, where: str, channels: int) -> None:
    shape, axis = node.inputs[0].shape, int(node.attrs.get("axis", 1))
    if shape is None or node.attrs.get("block_size") or not -len(shape) <= axis < len(shape):
        return
    if isinstance(shape[axis], int) and shape[axis] != channels:
        raise GraphError(f"{where}: {channels} scales for {shape[axis]} channels on axis {axis}; correct the axis")


def _beyond(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """Readers of a tensor, through nodes that only move values."""
    for node in consumers(tensor):
        if node.op in (
            "Reshape",
            "Transpose",
            "Identity",
            "Squeeze",
            "Unsqueeze",
            "Gather",
            "Slice",
            "Flatten",
        ):
            yield from _beyond(node.outputs[0])
        yield node


def _takes_integers(node: gs.Node) -> bool:
    return "Integer" in node.op or node.op.startswith("QLinear") or node.domain not in (None, "", "ai.onnx")


def _worst(values: np.ndarray) -> float:
    return float(values[~(np.isfinite(values) & (values > 0))].ravel()[0])
