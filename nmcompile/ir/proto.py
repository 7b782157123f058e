"""Between onnx's protobuf messages and GraphSurgeon's graphs.

GraphSurgeon's own importer and exporter lose types of sequences, attributes of rarer kinds and empty lists,
copy weights several times, and write a captured outer weight into every subgraph that reads it; hence these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir import tensor as tensors
from nmcompile.ir.bodies import bodies, inner_graphs
from nmcompile.ir.budget import Sparse, check_dims
from nmcompile.ir.provenance import Source, with_source
from nmcompile.ir.tensor import Array

Dim = int | str | None
AttributeType = onnx.AttributeProto.AttributeType


# ---- from protobuf -----------------------------------------------------------------------------------------


def import_graph(
    proto: onnx.GraphProto, weights: Mapping[str, Array], imports: Iterable[Any], budget: Sparse | None = None
) -> gs.Graph:
    """The graph of a message; `weights` holds initializers that stand outside it, `budget` what sparse ones may take.

    GraphError: a tensor with two producers, an initializer given twice, a value that does not fit its type.
    """
    opsets = [onnx.helper.make_opsetid(item.domain, item.version) for item in imports]
    return _graph(proto, weights, {}, opsets, budget or Sparse())


def _graph(
    proto: onnx.GraphProto, weights: Mapping[str, Array], outer: dict[str, gs.Tensor], opsets: Any, budget: Sparse
) -> gs.Graph:
    local: dict[str, gs.Tensor] = {}
    for initializer in proto.initializer:
        _declare(local, _constant(initializer.name, _value(initializer, weights)), "initializer")
    for sparse in proto.sparse_initializer:
        _declare(local, _constant(sparse.values.name, tensors.dense(sparse, budget)), "initializer")
    inputs = []
    for info in proto.input:
        check_dims(info.name, (max(dim.dim_value, 0) for dim in info.type.tensor_type.shape.dim), "input")
        if info.name in local and isinstance(local[info.name], gs.Constant):
            continue  # up to IR version 3 every initializer is listed as an input
        _declare(local, _variable(info), "input")
        inputs.append(local[info.name])
    produced = {name for node in proto.node for name in node.output if name}
    infos = {info.name: info for info in [*proto.value_info, *proto.output]}
    nodes = []

    def tensor(name: str) -> gs.Tensor:
        if not name:
            return gs.Variable.empty()
        found = local.get(name)
        if found is None and name not in produced:
            found = outer.get(name)
        if found is None:
            found = local[name] = _variable(infos[name]) if name in infos else gs.Variable(name)
        return found

    opset = _default_opset(opsets)
    made: set[str] = set()
    given = {info.name for info in proto.input}
    for node in proto.node:
        for name in node.output:
            if name and (name in made or name in given or isinstance(local.get(name), gs.Constant)):
                raise GraphError(f"tensor '{name}' is produced twice, the second time by node '{node.name}' "
                                 f"({node.op_type}); give each result a name of its own")  # fmt: skip
            made.add(name)
        _check_operator(node, opset)
        values = tensors.constant_value(node, budget)
        if values is not None:
            earlier = local.get(node.output[0])
            constant = gs.Constant(node.output[0], values) if earlier is None else earlier.to_constant(values)
            local[constant.name] = with_source(constant, Source((constant.name,)))
            continue
        ins = [tensor(name) for name in node.input]
        outs = [tensor(name) for name in node.output]
        attrs = {a.name: _attribute(a, outer, local, opsets, budget) for a in node.attribute}
        nodes.append(gs.Node(node.op_type, node.name, attrs, ins, outs, domain=node.domain or None))
    outputs = [tensor(info.name) for info in proto.output]
    return gs.Graph(nodes, inputs, outputs, proto.name, proto.doc_string or None, opset, opsets)


def _constant(name: str, values: Array) -> gs.Constant:
    return with_source(gs.Constant(name, values), Source((name,)))


def _declare(local: dict[str, gs.Tensor], tensor: gs.Tensor, kind: str) -> None:
    if tensor.name in local:
        raise GraphError(f"{kind} '{tensor.name}' is declared twice; give each a name of its own")
    local[tensor.name] = tensor


def _default_opset(opsets: Iterable[Any]) -> int:
    return next((int(item.version) for item in opsets if item.domain in ("", "ai.onnx")), 0)


def _check_operator(node: onnx.NodeProto, opset: int) -> None:
    """GraphError unless the node has as many inputs and outputs, and attributes of the types, as its operator
    asks.

    Operators of other domains, and those that this opset does not know, pass.
    """
    if not all(isinstance(text, str) for text in (node.op_type, node.domain, node.name, *node.output)):
        raise GraphError(f"a node {node.op_type!r} holds text that is not UTF-8, the model is damaged")
    if node.domain not in ("", "ai.onnx"):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, max(opset, 1), "")
    except onnx.defs.SchemaError:
        return
    where = f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
    for kind, count, low, high in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not low <= count <= high:
            wanted = low if low == high else f"{low} to {high}"
            raise GraphError(f"{where} has {count} {kind}, the operator takes {wanted}; export the model again")
    for index, formal in enumerate(schema.inputs):
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not node.input[index]:
            raise GraphError(f"{where} lacks its input {index} ({formal.name}); export the model again")
    given = {a.name: a for a in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given:
            if attribute.required:
                raise GraphError(f"{where} lacks the attribute {name}; export the model again")
        elif given[name].type != _number(attribute.type) and not given[name].ref_attr_name:
            raise GraphError(f"{where}: the attribute {name} is of the wrong type; export the model again")


def _number(kind: Any) -> int:
    """Number of a schema's attribute type."""
    return int(kind.value)


def _value(proto: onnx.TensorProto, weights: Mapping[str, Array]) -> Array:
    found = weights.get(proto.name)
    return tensors.to_array(proto) if found is None else found


def _attribute(
    proto: onnx.AttributeProto, outer: dict[str, gs.Tensor], local: dict[str, gs.Tensor], opsets: Any, budget: Sparse
) -> object:
    if not isinstance(proto.name, str):  # protobuf hands out text that is not UTF-8 as bytes
        raise GraphError(f"an attribute has the name {proto.name!r}, the model is damaged; export it again")
    if proto.type == AttributeType.GRAPH:
        return _graph(proto.g, {}, {**outer, **local}, opsets, budget)
    if proto.type == AttributeType.TENSOR:
        return gs.Constant(proto.t.name, tensors.to_array(proto.t))
    if proto.type == AttributeType.STRING:
        return _text(proto.s, proto)
    if proto.type in (AttributeType.FLOAT, AttributeType.INT):
        return proto.f if proto.type == AttributeType.FLOAT else proto.i
    if proto.type in (AttributeType.INTS, AttributeType.FLOATS, AttributeType.STRINGS):
        values = onnx.helper.get_attribute_value(proto)
        if not values:
            return proto  # an empty list does not tell its type
        return [_text(value, proto) if isinstance(value, bytes) else value for value in values]
    _check_kept(proto)
    return proto  # a type, sparse tensor or list of tensors: kept as it is


def _check_kept(proto: onnx.AttributeProto) -> None:
    """GraphError when an attribute that is handed on as it is names another file, which a runtime would read."""
    sparse = [proto.sparse_tensor, *proto.sparse_tensors]
    parts = [*proto.tensors, *(part for tensor in sparse for part in (tensor.values, tensor.indices))]
    if proto.graphs or any(part.data_location == onnx.TensorProto.EXTERNAL or part.external_data for part in parts):
        raise GraphError(f"the attribute {proto.name} holds graphs, or tensors in other files, which is refused; "
                         "export the model again")  # fmt: skip


def _text(value: bytes, proto: onnx.AttributeProto) -> object:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _variable(info: onnx.ValueInfoProto) -> gs.Variable:
    variable = gs.Variable(info.name)
    annotate(variable, info.type)
    return variable


def annotate(variable: gs.Variable, kind: onnx.TypeProto) -> None:
    """Set a variable's dtype and shape, or keep the whole type when it is no tensor's
    (`variable.type_proto`)."""
    which = kind.WhichOneof("value")
    if which == "tensor_type":
        variable.type = "tensor_type"
        if kind.tensor_type.elem_type:
            variable.dtype = _dtype(kind.tensor_type.elem_type)
        variable.shape = shape_of(kind)
    elif which is not None:
        variable.type = which
        variable.type_proto = kind


def shape_of(kind: onnx.TypeProto) -> list[Dim] | None:
    """Sizes, names of free dimensions, None for what is not known; None without even a rank."""
    if not kind.tensor_type.HasField("shape"):
        return None
    return [_dim(dim) for dim in kind.tensor_type.shape.dim]


def _dim(dim: Any) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None  # exporters write -1 for a free dimension
    name = str(dim.dim_param)
    return name if name and not name.startswith("unk__") else None  # unk__7: made up by shape inference


def _dtype(number: int) -> np.dtype[Any] | int:
    try:
        return tensors.PLAIN.get(number) or np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    except (KeyError, TypeError, ValueError):
        if number not in onnx.TensorProto.DataType.values():
            raise GraphError(f"element type {number} is not known; update onnx or export the model again") from None
        return number


# ---- to protobuf -------------------------------------------------------------------------------------------


@dataclass
class Export:
    """How constants are written: those of `aside` bytes and more are left out, their values gathered in
    `weights`.

    declared: whether what is left out keeps an initializer that says where its values are (`note`), or none
    at all.
    """

    aside: int | None = None
    declared: bool = False
    weights: dict[str, Array] = field(default_factory=dict)


def export_graph(graph: gs.Graph, export: Export, outer: frozenset[int] | None = None) -> onnx.GraphProto:
    """The message of a graph; `outer` holds the ids of constants that enclosing graphs declare, None at the
    top."""
    proto = onnx.GraphProto(name=graph.name or "graph", doc_string=graph.doc_string or "")
    declared = outer or frozenset()
    constants = {id(t): t for t in _own_constants(graph) if id(t) not in declared}
    for tensor in constants.values():
        _initializer(proto, tensor, export, top=outer is None)
    for node in graph.nodes:
        proto.node.append(_node(node, graph, export, declared | constants.keys()))
    proto.input.extend(_info(tensor) for tensor in graph.inputs)
    proto.output.extend(_info(tensor) for tensor in graph.outputs)
    edges = {t.name for t in [*graph.inputs, *graph.outputs]}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.name not in edges and _annotated(tensor):
                proto.value_info.append(_info(tensor))
    return proto


def _own_constants(graph: gs.Graph) -> list[gs.Tensor]:
    """Constants the graph declares: those it reads, and of its subgraphs' those that are shared or large.

    A large one is declared outside so that it can be kept apart; not when its name means something else
    elsewhere.
    """
    found = {id(t): t for t in _direct_constants(graph)}
    inner = [t for node in graph.nodes for sub in bodies(node) for t in all_constants(sub)]
    uses = Counter(id(t) for t in inner)
    meanings: dict[str, set[int]] = {}
    for tensor in [*found.values(), *inner, *_variables(graph)]:
        meanings.setdefault(tensor.name, set()).add(id(tensor))
    for tensor in inner:
        wanted = uses[id(tensor)] > 1 or tensor.values.nbytes >= tensors.LARGE
        if wanted and len(meanings[tensor.name]) == 1:
            found[id(tensor)] = tensor
    return list(found.values())


def _variables(graph: gs.Graph) -> list[gs.Tensor]:
    """What nodes compute and inputs bring, in subgraphs too."""
    graphs = [graph, *inner_graphs(graph)]
    return [t for one in graphs for t in [*one.inputs, *(y for node in one.nodes for y in node.outputs)]]


def _direct_constants(graph: gs.Graph) -> list[gs.Tensor]:
    found = {id(t): t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    found.update({id(t): t for t in graph.outputs if isinstance(t, gs.Constant)})
    return list(found.values())


def all_constants(graph: gs.Graph) -> list[gs.Tensor]:
    """Constants read by the graph or by its subgraphs, each once per subgraph."""
    inner = [t for node in graph.nodes for sub in bodies(node) for t in all_constants(sub)]
    return [*_direct_constants(graph), *inner]


def _initializer(proto: onnx.GraphProto, tensor: gs.Constant, export: Export, top: bool) -> None:
    values: Array = tensor.values
    plain = values.dtype in tensors.ELEMENT_TYPE
    if top and plain and export.aside is not None and values.nbytes >= export.aside:
        export.weights[tensor.name] = values
        if export.declared:
            kind = tensors.element_type(values.dtype)
            proto.initializer.append(tensors.declared(tensor.name, kind, values.shape))
        return
    proto.initializer.append(tensors.message(tensor.name, values))


def _node(node: gs.Node, graph: gs.Graph, export: Export, known: frozenset[int]) -> onnx.NodeProto:
    proto = onnx.NodeProto(op_type=node.op, name=node.name or "", domain=node.domain or "")
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    for name, value in node.attrs.items():
        if value is None:
            continue
        try:
            proto.attribute.append(_export_attribute(name, value, node, graph, export, known))
        except (TypeError, ValueError) as error:
            raise GraphError(f"node '{node.name}' ({node.op}): attribute {name}={value!r} cannot be written "
                             f"({str(error).splitlines()[0]}); give it an ONNX type") from None  # fmt: skip
    return proto


def _export_attribute(
    name: str, value: Any, node: gs.Node, graph: gs.Graph, export: Export, known: frozenset[int]
) -> onnx.AttributeProto:
    if isinstance(value, onnx.AttributeProto):
        return value
    if isinstance(value, gs.Graph):
        return onnx.helper.make_attribute(name, export_graph(value, export, known))
    if isinstance(value, gs.Tensor):
        return onnx.helper.make_attribute(name, tensors.message(value.name, value.values))
    if isinstance(value, np.ndarray):
        return onnx.helper.make_attribute(name, tensors.message("", value))
    if isinstance(value, (np.dtype, type)):
        value = tensors.element_type(np.dtype(value))
    kind = _declared_type(node, graph, name)
    if kind == AttributeType.FLOAT and isinstance(value, (int, np.integer)):
        value = float(value)  # alpha=1 would be written as an integer, which runtimes refuse
    if kind == AttributeType.FLOATS and isinstance(value, (list, tuple)):
        value = [float(item) for item in value]
    return onnx.helper.make_attribute(name, value, attr_type=kind)


def _declared_type(node: gs.Node, graph: gs.Graph, name: str) -> int | None:
    """The attribute's type by the operator's schema, None when that is not known."""
    try:
        schema = onnx.defs.get_schema(node.op, max(int(graph.opset or 1), 1), node.domain or "")
    except onnx.defs.SchemaError:
        return None
    attribute = schema.attributes.get(name)
    return None if attribute is None else _number(attribute.type)


def _annotated(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and (tensor.dtype is not None or tensor.type not in (None, "tensor_type"))


def _info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    kind = getattr(tensor, "type_proto", None)
    if kind is not None:
        return onnx.ValueInfoProto(name=tensor.name, type=kind)
    if tensor.dtype is None:
        return onnx.ValueInfoProto(name=tensor.name)
    info = onnx.ValueInfoProto(name=tensor.name)
    info.type.tensor_type.elem_type = tensors.element_type(tensor.dtype)
    if tensor.shape is not None:
        info.type.tensor_type.shape.SetInParent()
        for dim in tensor.shape:
            item = info.type.tensor_type.shape.dim.add()
            if isinstance(dim, str):
                item.dim_param = dim
            elif dim is not None and dim >= 0:
                item.dim_value = int(dim)
    return info
