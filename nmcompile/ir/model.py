"""Between whole ModelProto messages and graphs: versions, functions, metadata."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir import tensor as tensors
from nmcompile.ir.bodies import inner_graphs
from nmcompile.ir.budget import check_size
from nmcompile.ir.edit import model_facts
from nmcompile.ir.proto import Export, export_graph, import_graph
from nmcompile.ir.tensor import Array

OLDEST_OPSET = 11
OLDEST_IR = 8  # written files: initializers are no longer listed as inputs, which came with IR version 4
DOMAINS = ("", "ai.onnx")


def import_model(model: onnx.ModelProto, weights: Mapping[str, Array]) -> gs.Graph:
    """The graph of a model; `weights` holds initializers that stand outside the message."""
    opset = next((item.version for item in model.opset_import if item.domain in DOMAINS), None)
    if opset is None:
        if any(node.domain in DOMAINS for node in model.graph.node) or not model.opset_import:
            raise GraphError("the model imports no ONNX operator set; export it again")
        opset = onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise GraphError(f"the model uses opset {opset}, the oldest supported is {OLDEST_OPSET}; export it anew")
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise GraphError(f"the model uses opset {opset}, the installed onnx knows {newest}; update onnx")
    plain = model
    budget = check_size(model)
    if model.functions:
        plain, weights = _inline(model, weights)
    graph = import_graph(plain.graph, weights, plain.opset_import, budget)
    graph.opset = opset
    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.ir_version = model.ir_version
    facts = model_facts(graph)
    facts["metadata"] = {item.key: item.value for item in model.metadata_props}
    facts["domain"], facts["model_version"] = model.domain, model.model_version
    facts["doc_string"] = model.doc_string
    return graph


def _inline(model: onnx.ModelProto, weights: Mapping[str, Array]) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
    """The model with its own functions in the place of their calls, and all its initializers, which stay
    outside."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {name: weights[name] if name in weights else tensors.to_array(tensor) for name, tensor in held.items()}
    graph = model.graph
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(bare.graph, field).extend(getattr(graph, field))
    for name, tensor in held.items():  # declared, so that the inliner knows the names that are taken
        bare.graph.initializer.append(tensors.declared(name, tensor.data_type, tensor.dims))
    try:
        return onnx.inliner.inline_local_functions(bare, convert_version=True), arrays
    except Exception as error:  # the binding raises RuntimeError and its own types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(f"the model's functions cannot be inlined: {reason}; export it without them") from None


def weightless(graph: gs.Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The graph as a message whose large weights are only declared, as external, and these weights."""
    export = Export(aside=tensors.LARGE, declared=True)
    return export_model(graph, export), export.weights


def export_model(graph: gs.Graph, export: Export) -> onnx.ModelProto:
    """The message around the graph; what `export` keeps aside is left out."""
    opsets = _imports(graph)
    model = onnx.ModelProto(graph=export_graph(graph, export), opset_import=opsets)
    needed = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    model.ir_version = max(graph.ir_version or 0, needed, OLDEST_IR)
    model.producer_name, model.producer_version = graph.producer_name or "", graph.producer_version or ""
    facts = model_facts(graph)
    model.domain, model.doc_string = facts.get("domain", ""), facts.get("doc_string", "")
    model.model_version = facts.get("model_version", 0)
    for key, value in facts.get("metadata", {}).items():
        model.metadata_props.add(key=key, value=value)
    return model


def _imports(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The graph's opset, and a version for every other domain its nodes use."""
    versions = {item.domain: item.version for item in graph.import_domains or () if item.domain not in DOMAINS}
    for inner in [graph, *inner_graphs(graph)]:
        for node in inner.nodes:
            if (node.domain or "") not in DOMAINS:
                versions.setdefault(node.domain, 1)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in {"": graph.opset, **versions}.items()]
