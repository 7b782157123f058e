"""Prints a graph as text that people read and tests compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from nmcompile.ir.bodies import inner_graphs
from nmcompile.ir.tensor import element_type, raw_bytes

SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
FEW = 8  # elements up to which a constant is printed by value


def to_text(graph: gs.Graph) -> str:
    """One line per input, node and output; equal graphs give equal texts.

    opset 20
    input x: f32[batch,768]
    h: f32[batch,3072] = MatMul(x, W f32[768,3072] 20% #5f3a91c2)  # /layer/MatMul
    output h

    A constant shows its type, shape, share of non-zeros and a hash of its values, or the values when they are
    few.
    """
    known: dict[int, str] = {}
    used = {node.domain for inner in [graph, *inner_graphs(graph)] for node in inner.nodes}
    others = [item for item in graph.import_domains or () if item.domain in used - {None, "", "ai.onnx"}]
    domains = sorted(f", {item.domain} {item.version}" for item in others)
    return "\n".join([f"opset {graph.opset}{''.join(domains)}", *_lines(graph, known, ""), ""])


def _lines(graph: gs.Graph, known: dict[int, str], indent: str) -> Iterator[str]:
    for tensor in graph.inputs:
        yield f"{indent}input {_declared(tensor)}"
    for node in graph.nodes:
        outs = ", ".join(_declared(t) if t.name else "_" for t in node.outputs)
        ins = ", ".join(_read(t, known) for t in node.inputs)
        op = f"{node.domain}.{node.op}" if node.domain not in (None, "", "ai.onnx") else node.op
        plain = {name: value for name, value in sorted(node.attrs.items()) if not isinstance(value, gs.Graph)}
        attrs = f"<{', '.join(f'{name}={_attribute(value, known)}' for name, value in plain.items())}>" if plain else ""
        yield f"{indent}{outs} = {op}{attrs}({ins})  # {node.name}"
        for name, value in sorted(node.attrs.items()):
            if isinstance(value, gs.Graph):
                yield f"{indent}  {name}:"
                yield from _lines(value, known, indent + "    ")
    for tensor in graph.outputs:
        shown = _read(tensor, known) if isinstance(tensor, gs.Constant) else _declared(tensor)
        yield f"{indent}output {shown}"


def _declared(tensor: gs.Tensor) -> str:
    kind = getattr(tensor, "type", "tensor_type")
    if kind not in (None, "tensor_type"):
        return f"{tensor.name}: {kind.removesuffix('_type')}"
    if tensor.dtype is None:
        return f"{tensor.name}: ?"
    shape = "[?]" if tensor.shape is None else _shape(tensor.shape)
    return f"{tensor.name}: {type_name(tensor.dtype)}{shape}"


def _shape(shape: Any) -> str:
    return f"[{','.join('?' if dim is None else str(dim) for dim in shape)}]"


def type_name(dtype: Any) -> str:
    """f32, bf16, i64, u8, bool, string; the ONNX name for rarer types."""
    number = element_type(dtype)
    name = str(onnx.TensorProto.DataType.Name(number)).lower()
    try:
        name = np.dtype(dtype).name if number != onnx.TensorProto.STRING else "string"
    except TypeError:
        return name
    stem = name.rstrip("0123456789")
    return SHORT[stem] + name[len(stem) :] if stem in SHORT and stem != name else name


def _read(tensor: gs.Tensor, known: dict[int, str]) -> str:
    if not tensor.name:
        return "_"
    return f"{tensor.name} {_constant(tensor.values, known)}" if isinstance(tensor, gs.Constant) else str(tensor.name)


def _constant(values: npt.NDArray[Any], known: dict[int, str]) -> str:
    if id(values) in known:
        return known[id(values)]
    kind = f"{type_name(values.dtype)}{_shape(values.shape)}"
    if values.size <= FEW:
        shown = ", ".join(_element(item) for item in values.ravel().tolist())
        known[id(values)] = f"{kind} {{{shown}}}"
    else:
        share = np.count_nonzero(values) / values.size
        known[id(values)] = f"{kind} {share:.0%} #{digest(values)}"
    return known[id(values)]


def digest(values: npt.NDArray[Any]) -> str:
    """Eight hexadecimal digits of the SHA-256 of the values."""
    if values.dtype == object:
        return hashlib.sha256("\0".join(map(str, values.ravel().tolist())).encode()).hexdigest()[:8]
    return hashlib.sha256(raw_bytes(values)).hexdigest()[:8]


def _element(item: object) -> str:
    if isinstance(item, bytes):
        return repr(item.decode(errors="replace"))
    return f"{item:.7g}" if isinstance(item, float) else str(item)


def _attribute(value: Any, known: dict[int, str]) -> str:
    if isinstance(value, gs.Tensor):
        return _constant(value.values, known)
    if isinstance(value, np.ndarray):
        return _constant(value, known)
    if isinstance(value, onnx.AttributeProto):
        return str(onnx.helper.printable_attribute(value)).partition(" = ")[2]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_attribute(item, known) for item in value)}]"
    if isinstance(value, (str, bytes)):
        return repr(value)
    return _element(float(value) if isinstance(value, np.floating) else value)
