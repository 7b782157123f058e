"""Rule T1: in a strongly typed network nothing is cast for you, so types are followed through the graph as TensorRT
does it: a DQ gives the type of its scale, a Cast what it says, everything else the type of its inputs, which agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.findings import Hit, Rule, Subject
from nmcompile.backends.tensorrt.walk import DQ, MOVES, Q

Types = dict[int, str | None]  # by the tensor's id

# Operators whose inputs ONNX lets differ and TensorRT's layer does not.
AGREE = {"Pow": (0, 1)}
READS_INT8 = MOVES | {"Cast", "Concat", "Slice", "Gather", "Split", "Expand", "Shape", "Size"}


def _strong(subject: Subject) -> Iterator[Hit]:
    types: Types = {}
    yield from _graph(subject.graph, int(subject.graph.opset or subject.profile.opset), types)
    for tensor in subject.graph.outputs:
        found, declared = types.get(id(tensor)), walk.kind(tensor)
        if found is not None and declared is not None and found != declared:
            what = f"it is {found}, but declared as {declared}"
            yield Hit(f"output {tensor.name}", what, f"Cast it to {declared}, or declare it as {found}")


def _graph(graph: gs.Graph, opset: int, types: Types) -> Iterator[Hit]:
    types.update({id(tensor): walk.kind(tensor) for tensor in graph.inputs})
    for node in graph.nodes:
        for sub in node.subgraphs():
            yield from _graph(sub, opset, types)
        schema = _schema(node, opset)
        formal = [] if schema is None else _formal(schema.inputs, len(node.inputs))
        variables = set() if schema is None else {item.type_param_str for item in schema.type_constraints}
        groups: dict[str, list[gs.Tensor]] = {}
        for tensor, name in zip(node.inputs, formal, strict=False):
            if name in variables and not tensor.is_empty():
                groups.setdefault(name, []).append(tensor)
        yield from _check(node, groups, types)
        results = [] if schema is None else _formal(schema.outputs, len(node.outputs))
        for index, tensor in enumerate(node.outputs):
            name = results[index] if index < len(results) else ""
            types[id(tensor)] = _result(node, tensor, groups.get(name, ()), types)


def _check(node: gs.Node, groups: dict[str, list[gs.Tensor]], types: Types) -> Iterator[Hit]:
    if node.op in (Q, DQ):  # their scales are rule Q8's matter
        return
    for tensor in node.inputs:
        if not isinstance(tensor, gs.Constant) and _type(tensor, types) == "int8" and node.op not in READS_INT8:
            yield Hit(node.name, f"{node.op} reads the INT8 tensor '{tensor.name}'", "put a DQ before it")
            return
    members = list(groups.values())
    if node.op in AGREE:
        members.append([node.inputs[index] for index in AGREE[node.op]])
    for group in members:
        known = [(tensor, kind) for tensor in group if (kind := _type(tensor, types)) is not None]
        other = next(((tensor, kind) for tensor, kind in known if kind != known[0][1]), None)
        if other is not None:
            first = f"'{known[0][0].name}' is {known[0][1]}"
            yield Hit(node.name, f"{node.op} mixes types: {first}, '{other[0].name}' is {other[1]}")
            return


def _result(node: gs.Node, tensor: gs.Tensor, group: Sequence[gs.Tensor], types: Types) -> str | None:
    if node.op == Q:
        zero = walk.given(node, 2)
        return "int8" if zero is None else _type(zero, types)
    if node.op == DQ:
        return _type(node.inputs[1], types)
    if node.op == "Cast":
        return _element(int(node.attrs.get("to", 0)))
    if node.op == "CastLike":
        return _type(node.inputs[1], types)
    known = (kind for item in group if (kind := _type(item, types)) is not None)
    return next(known, walk.kind(tensor))


def _type(tensor: gs.Tensor, types: Types) -> str | None:
    return types[id(tensor)] if id(tensor) in types else walk.kind(tensor)


def _element(number: int) -> str | None:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number)).name
    except (KeyError, TypeError, ValueError):
        return None


def _schema(node: gs.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        return None


def _formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> list[str]:
    """The type variable of each of `count` inputs or outputs; those of a mixed list have none."""
    names = [item.type_str for item in parameters]
    if not parameters or parameters[-1].option != onnx.defs.OpSchema.FormalParameterOption.Variadic:
        return names[:count]
    last = names[-1] if parameters[-1].is_homogeneous else ""
    return [*names[:-1], *[last] * (count - len(names) + 1)][:count]


RULES = (
    Rule("T1", "types agree without casts that nobody wrote", "error",
         "TensorRT developer guide, strongly typed networks; NvInfer.h, NetworkDefinitionCreationFlag",
         "Cast one of them", _strong, ("10", "11")),
)  # fmt: skip
