"""Rules Q12, U1 and U2: whether the parser of the version reads the graph's opset, operators and element types."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.findings import Hit, Rule, Subject
from nmcompile.backends.tensorrt.operators import FIRST_OUTPUT, IMPORTED, INTEGER
from nmcompile.backends.tensorrt.walk import Q


def _opset(subject: Subject) -> Iterator[Hit]:
    profile = subject.profile
    if (subject.graph.opset or 0) > profile.newest_opset:
        what = f"opset {subject.graph.opset}, TensorRT {profile.name} is sure to read up to {profile.newest_opset}"
        yield Hit(subject.graph.name or "graph", what)
    first: dict[str, str] = {}
    for node in subject.of(Q):
        zero = walk.given(node, 2)
        kind = walk.kind(zero) if zero is not None else None
        if kind is not None and kind not in first:
            first[kind] = node.name
    if "int8" in first and "float8_e4m3fn" in first:
        what = f"it makes FP8, node '{first['int8']}' makes INT8"
        yield Hit(first["float8_e4m3fn"], what, "use one of the two in the whole model")


def _operators(subject: Subject) -> Iterator[Hit]:
    version = subject.profile.name
    known = IMPORTED[version]
    for node in subject.nodes:
        if node.domain not in (None, "", "ai.onnx"):
            what = f"{node.domain}.{node.op} is no operator of ONNX, TensorRT {version} looks for a plugin of that name"
            yield Hit(node.name, what)
        elif node.op not in known and node.op not in INTEGER:
            yield Hit(node.name, f"the parser of TensorRT {version} does not import {node.op}")
        elif node.op in FIRST_OUTPUT:
            for tensor in node.outputs[1:]:
                if g.consumers(tensor) or g.is_output(subject.graph, tensor):
                    yield Hit(node.name, f"TensorRT {version} gives no output '{tensor.name}' of {node.op}")


def _elements(subject: Subject) -> Iterator[Hit]:
    seen: set[int] = set()

    def checked(tensor: gs.Tensor, where: str) -> Iterator[Hit]:
        kind = walk.kind(tensor)
        if id(tensor) in seen:
            return
        seen.add(id(tensor))
        if getattr(tensor, "type", None) in ("sequence_type", "optional_type", "map_type"):
            yield Hit(where, f"'{tensor.name}' is no tensor but a {tensor.type.removesuffix('_type')}")
        elif kind is not None and kind not in subject.profile.elements:
            kind = "string" if kind == "object" else kind
            yield Hit(where, f"'{tensor.name}' is {kind}, which TensorRT {subject.profile.name} does not have")

    for tensor in subject.graph.inputs:
        yield from checked(tensor, f"input {tensor.name}")
    for node in subject.nodes:
        for tensor in [*node.inputs, *node.outputs]:
            yield from checked(tensor, node.name)


RULES = (
    Rule("Q12", "the opset is one that the parser reads, and one family of small types is used", "error",
         "onnx-tensorrt, docs/operators.md", "write the graph at the opset of its profile", _opset),
    Rule("U1", "every operator is imported", "error", "onnx-tensorrt, docs/operators.md and the importers' table",
         "write it in operators of that table, or load a plugin that implements it", _operators),
    Rule("U2", "every element type is converted", "error", "onnx-tensorrt, convertDtype",
         "Cast it to a type of the profile, or cut that part off the model", _elements),
)  # fmt: skip
