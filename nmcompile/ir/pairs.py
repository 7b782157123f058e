"""Reads QuantizeLinear/DequantizeLinear pairs as the standard defines them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.ir.edit import constant, producer

BYTES = {0: np.uint8, 2: np.uint8, 3: np.int8}  # output_dtype by onnx.TensorProto.DataType; 0: not given


@dataclass(frozen=True)
class Pair:
    """One scale and one zero point of 8 bits: x -> clip(round(x / scale) + zero) -> (. - zero) * scale."""

    x: gs.Tensor
    scale: float
    zero: int
    signed: bool


def read_pair(tensor: gs.Tensor) -> Pair | None:
    """The pair that a tensor comes out of; None for what is not per tensor, not of 8 bits, or whose halves disagree.

    Source: ONNX 1.19, QuantizeLinear-21 and DequantizeLinear-21. Without a zero point it is 0 of the type that
    output_dtype names, uint8 where that is not given either.
    """
    dq = producer(tensor)
    q = producer(dq.inputs[0]) if dq is not None and dq.op == "DequantizeLinear" else None
    if dq is None or q is None or q.op != "QuantizeLinear" or any(n.attrs.get("block_size", 0) for n in (q, dq)):
        return None
    scales = [constant(node.inputs[1]) for node in (q, dq)]
    zeros = [_zero(node) for node in (q, dq)]
    if any(scale is None or scale.size != 1 for scale in scales) or any(zero is None for zero in zeros):
        return None
    first, second = (float(scale.item()) for scale in scales if scale is not None)
    zero, again = zeros
    assert zero is not None and again is not None
    kind = BYTES.get(int(q.attrs.get("output_dtype", 0))) if zero.dtype.kind == "V" else zero.dtype
    if kind is None or np.dtype(kind) not in (np.dtype(np.int8), np.dtype(np.uint8)):
        return None
    numbers = [0 if item.dtype.kind == "V" else int(item.item()) for item in (zero, again)]
    if first != second or numbers[0] != numbers[1]:
        return None
    return Pair(q.inputs[0], first, numbers[0], np.dtype(kind) == np.int8)


def _zero(node: gs.Node) -> np.ndarray | None:
    """The zero point, of type void where none is given; None where it is computed or not one number."""
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return np.zeros(1, np.void)
    value = constant(node.inputs[2])
    return value if value is not None and value.size == 1 else None
