"""Reads, writes, checks and edits models: the only place that knows GraphSurgeon's quirks.

graph_proto turns messages into graphs and back, onnx_file reads and writes files, graph_edit walks and
rewires, graph_linear finds linear layers, graph_run runs, graph_text prints, graph_verify checks. Import them
from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from nmcompile import onnx_file as files
from nmcompile.errors import GraphError
from nmcompile.graph_edit import (
    cleanup,
    constant,
    consumers,
    copy,
    extract,
    fresh,
    is_output,
    model_facts,
    names,
    producer,
    rewire,
    sort,
    unused,
)
from nmcompile.graph_linear import Linear, dequantized, linear_layers, set_weight
from nmcompile.graph_proto import Dim, Export, annotate, export_graph, import_graph
from nmcompile.graph_run import random_feeds, run, runner
from nmcompile.graph_text import to_text
from nmcompile.graph_verify import verify
from nmcompile.onnx_file import Array
from nmcompile.tensorinfo import TensorInfo

__all__ = [
    "Linear",
    "TensorInfo",
    "cleanup",
    "constant",
    "consumers",
    "copy",
    "dequantized",
    "extract",
    "fresh",
    "infer_shapes",
    "inputs",
    "is_output",
    "linear_layers",
    "load",
    "outputs",
    "producer",
    "random_feeds",
    "rewire",
    "run",
    "runner",
    "save",
    "set_weight",
    "to_model",
    "to_text",
    "verify",
]

OLDEST_OPSET = 11
OLDEST_IR = 8  # written files: initializers are no longer listed as inputs, which came with IR version 4
DOMAINS = ("", "ai.onnx")


# ---- reading and writing -----------------------------------------------------------------------------------


def load(model: str | os.PathLike[str] | onnx.ModelProto | gs.Graph) -> gs.Graph:
    """A graph of the model at a path, in a ModelProto (left as it is), or of another graph (copied).

    Weights are read-only arrays, mapped where they are in an external file. Functions are inlined, Constant
    nodes become constants, every node gets a name of its own, shapes are inferred. GraphError: one line that
    names what is wrong with the file or the graph.
    """
    if isinstance(model, gs.Graph):
        graph = copy(model)
    else:
        weights: Mapping[str, Array] = {}
        if isinstance(model, onnx.ModelProto):
            proto = model
        else:
            proto, weights = files.read(Path(model))
        graph = _from_proto(proto, weights)
    _name_nodes(graph)
    sort(graph)
    verify(graph, "load")
    infer_shapes(graph)
    return graph


def _from_proto(model: onnx.ModelProto, weights: Mapping[str, Array]) -> gs.Graph:
    opset = next((item.version for item in model.opset_import if item.domain in DOMAINS), None)
    if opset is None:
        if any(node.domain in DOMAINS for node in model.graph.node) or not model.opset_import:
            raise GraphError("the model imports no ONNX operator set; export it again")
        opset = onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise GraphError(
            f"the model uses opset {opset}, the oldest supported is {OLDEST_OPSET}; export it anew"
        )
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise GraphError(f"the model uses opset {opset}, the installed onnx knows {newest}; update onnx")
    plain = model
    if model.functions:
        plain, weights = _inline(model, weights)
    graph = import_graph(plain.graph, weights, plain.opset_import)
    graph.opset = opset
    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.ir_version = model.ir_version
    facts = model_facts(graph)
    facts["metadata"] = {item.key: item.value for item in model.metadata_props}
    facts["domain"], facts["model_version"] = model.domain, model.model_version
    facts["doc_string"] = model.doc_string
    return graph


def _inline(
    model: onnx.ModelProto, weights: Mapping[str, Array]
) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
    """The model with its own functions in the place of their calls, and all its initializers, which stay
    outside."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {
        name: weights[name] if name in weights else files.to_array(tensor) for name, tensor in held.items()
    }
    graph = model.graph
    bare = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    bare.graph.name = graph.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(bare.graph, field).extend(getattr(graph, field))
    for name, tensor in held.items():  # declared, so that the inliner knows the names that are taken
        bare.graph.initializer.append(files.declared(name, tensor.data_type, tensor.dims))
    try:
        return onnx.inliner.inline_local_functions(bare, convert_version=True), arrays
    except Exception as error:  # the binding raises RuntimeError and its own types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(
            f"the model's functions cannot be inlined: {reason}; export it without them"
        ) from None


def _name_nodes(graph: gs.Graph) -> None:
    """Give every unnamed node, and every second one of a name, a name of its own."""
    taken = names(graph)
    seen: set[str] = set()

    def visit(inner: gs.Graph) -> None:
        for node in inner.nodes:
            if not node.name or node.name in seen:
                node.name = unused(taken, node.name or f"{node.op}_{len(seen)}")
                taken.add(node.name)
            seen.add(node.name)
            for sub in node.subgraphs():
                visit(sub)

    visit(graph)


def save(graph: gs.Graph, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Write the graph to `path`: all of it or nothing. external=True puts weights into `NAME.data` beside it,
    None does so from 1.9 GB. GraphError when the folder cannot be written."""
    export = Export(aside=files.LARGE)
    model = _model(graph, export)
    files.write(Path(path), model, export.weights, external=external)


def to_model(graph: gs.Graph) -> onnx.ModelProto:
    """The graph as one message, weights included; GraphError above protobuf's 2 GB."""
    export = Export(aside=files.LARGE)
    model = _model(graph, export)
    if sum(values.nbytes for values in export.weights.values()) > files.INLINE_LIMIT:
        raise GraphError(
            "the model is larger than the 2 GB that one message holds; save it to a file instead"
        )
    for name, values in export.weights.items():
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(files.header(name, values))
        tensor.raw_data = bytes(files.raw_bytes(values))
    return model


def weightless(graph: gs.Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The graph as a message whose large weights are only declared, as external, and these weights."""
    export = Export(aside=files.LARGE, declared=True)
    return _model(graph, export), export.weights


def _model(graph: gs.Graph, export: Export) -> onnx.ModelProto:
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
    versions = {
        item.domain: item.version for item in graph.import_domains or () if item.domain not in DOMAINS
    }
    for inner in [graph, *graph.subgraphs(recursive=True)]:
        for node in inner.nodes:
            if (node.domain or "") not in DOMAINS:
                versions.setdefault(node.domain, 1)
    return [
        onnx.helper.make_opsetid(domain, version) for domain, version in {"": graph.opset, **versions}.items()
    ]


# ---- shapes ------------------------------------------------------------------------------------------------


def infer_shapes(graph: gs.Graph) -> None:
    """Bring the shapes and types of all tensors up to date by onnx's shape inference, in place.

    Weights are described but not passed. A size that inference cannot tell stays as it was annotated.
    """
    model, _ = weightless(graph)
    produced = {name for node in model.graph.node if node.domain in DOMAINS for name in node.output}
    infos = [info for info in model.graph.value_info if info.name not in produced]  # stale ones would win
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    except Exception:
        return
    _annotate(graph, inferred.graph)


def _annotate(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    types = {info.name: info.type for info in [*proto.value_info, *proto.output]}
    for node, message in zip(graph.nodes, proto.node, strict=True):
        for tensor in node.outputs:
            if tensor.name in types and isinstance(tensor, gs.Variable):
                _update(tensor, types[tensor.name])
        inner = {a.name: a.g for a in message.attribute if a.type == onnx.AttributeProto.GRAPH}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph) and name in inner:
                _annotate(value, inner[name])


def _update(tensor: gs.Variable, kind: onnx.TypeProto) -> None:
    before: list[Dim] | None = tensor.shape
    annotate(tensor, kind)
    if tensor.shape is None or before is None or len(before) != len(tensor.shape):
        tensor.shape = before if tensor.shape is None else tensor.shape
        return
    tensor.shape = [old if new is None else new for old, new in zip(before, tensor.shape, strict=True)]


def inputs(graph: gs.Graph) -> tuple[TensorInfo, ...]:
    """Names, types and shapes of what the graph takes."""
    return _infos(graph.inputs)


def outputs(graph: gs.Graph) -> tuple[TensorInfo, ...]:
    """Names, types and shapes of what the graph gives."""
    return _infos(graph.outputs)


def _infos(tensors: Iterable[gs.Tensor]) -> tuple[TensorInfo, ...]:
    found = []
    for tensor in tensors:
        try:
            dtype: np.dtype[Any] = np.dtype(tensor.dtype if tensor.dtype is not None else np.float32)
        except TypeError:
            dtype = np.dtype(object)
        found.append(TensorInfo(tensor.name, dtype, tuple(tensor.shape or ())))
    return tuple(found)
