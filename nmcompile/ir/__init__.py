"""Reads, writes, checks and edits models: the only place that knows GraphSurgeon's quirks. Import its names from here.

onnx_file reads and writes files; graph_model, graph_proto and graph_tensor turn messages into graphs and back;
graph_edit walks and rewires, graph_linear finds linear layers, provenance and lineage know where constants come from,
graph_integer has 8-bit products computed alike on every CPU, graph_run runs, graph_text prints, graph_verify checks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir import onnx_file as files
from nmcompile.ir import tensor as tensors
from nmcompile.ir.bodies import bodies
from nmcompile.ir.edit import (
    cleanup,
    constant,
    consumers,
    copy,
    extract,
    is_output,
    model_facts,
    producer,
    rewire,
    sort,
)
from nmcompile.ir.entry import check_types, compute_constant_outputs, part_dims
from nmcompile.ir.forecast import RANK_ONE, by_name, forecast
from nmcompile.ir.integer import exact_products, may_saturate
from nmcompile.ir.lineage import Lineage
from nmcompile.ir.linear import (
    Linear,
    bias_of,
    dequantized,
    layer_keys,
    linear_layers,
    per_feature,
    reorder,
    set_bias,
    set_weight,
    weight_of,
)
from nmcompile.ir.model import DOMAINS, export_model, import_model, weightless
from nmcompile.ir.names import fresh, names, unused
from nmcompile.ir.pairs import Pair, read_pair
from nmcompile.ir.proto import Dim, Export, annotate
from nmcompile.ir.provenance import (
    Broadcast,
    Cast,
    Operation,
    Reshape,
    Scale,
    Slice,
    Source,
    Take,
    Transpose,
    changed,
    computed,
    derived,
    permuted,
    source,
    with_source,
)
from nmcompile.ir.run import LARGEST, random_feeds, run, runner
from nmcompile.ir.tensor import LARGE, Array
from nmcompile.ir.text import to_text
from nmcompile.ir.verify import verify
from nmcompile.tensorinfo import TensorInfo

__all__ = [
    "LARGE",
    "LARGEST",
    "Broadcast",
    "Cast",
    "Lineage",
    "Linear",
    "Operation",
    "Pair",
    "Reshape",
    "Scale",
    "Slice",
    "Source",
    "Take",
    "TensorInfo",
    "Transpose",
    "admit",
    "bias_of",
    "changed",
    "cleanup",
    "computed",
    "constant",
    "consumers",
    "copy",
    "dequantized",
    "derived",
    "exact_products",
    "extract",
    "fresh",
    "infer_shapes",
    "inputs",
    "is_output",
    "layer_keys",
    "linear_layers",
    "load",
    "may_saturate",
    "names",
    "outputs",
    "per_feature",
    "permuted",
    "producer",
    "random_feeds",
    "read_pair",
    "reorder",
    "rewire",
    "run",
    "runner",
    "save",
    "separate_dims",
    "set_bias",
    "set_weight",
    "source",
    "to_model",
    "to_text",
    "unused",
    "verify",
    "weight_of",
    "weightless",
    "with_source",
]


FREE = 2  # size of free dimensions at which a graph is forecast when it comes in
PROPAGATES = "propagates"  # fact of a graph: shape inference may follow values, as none of them is huge


# ---- reading and writing -----------------------------------------------------------------------------------


def load(model: str | os.PathLike[str] | onnx.ModelProto | gs.Graph) -> gs.Graph:
    """A graph of the model at a path, in a ModelProto (left as it is), or of another graph (copied).

    Weights are read-only arrays, mapped where they are in an external file. Functions are inlined, Constant
    nodes become constants, every node gets a name of its own, shapes are inferred. GraphError: one line that
    names what is wrong with the file or the graph.
    """
    try:
        graph = copy(model) if isinstance(model, gs.Graph) else _read(model)
        _name_nodes(graph)
        sort(graph)
        verify(graph, "load")
        infer_shapes(graph)
    except UnicodeDecodeError:  # protobuf hands out such text as bytes, and fails when it is to be written
        raise GraphError(f"{_where(model)}holds text that is not UTF-8, it is damaged; export it again") from None
    except GraphError as error:
        text, where = " ".join(str(error).split()), _where(model)  # a damaged name may hold line breaks
        raise type(error)(text if where.rstrip(": ") in text else where + text) from error.__cause__
    return graph


def admit(model: str | os.PathLike[str] | onnx.ModelProto | gs.Graph) -> gs.Graph:
    """As `load`, for a model that is to be compiled, run or compared: inputs and outputs must be tensors of a known
    type, inputs of a known rank, and an output that is a constant gets a node that makes it."""
    graph = load(model)
    try:
        check_types(graph)
    except GraphError as error:
        raise GraphError(_where(model) + str(error)) from None
    compute_constant_outputs(graph)
    return graph


def _where(model: object) -> str:
    return f"{os.fspath(model)}: " if isinstance(model, (str, os.PathLike)) else ""


def _read(model: str | os.PathLike[str] | onnx.ModelProto) -> gs.Graph:
    if isinstance(model, onnx.ModelProto):
        return import_model(model, {})
    return import_model(*files.read(Path(model)))


def _name_nodes(graph: gs.Graph) -> None:
    """Give every unnamed node, and every second one of a name, a name of its own."""
    taken = names(graph)
    seen: set[str] = set()
    counts: dict[str, int] = {}  # of a name, up to which it is taken with a number behind it

    def numbered(stem: str) -> str:
        if stem not in taken:
            return stem
        counts[stem] = counts.get(stem, 0) + 1
        while f"{stem}_{counts[stem]}" in taken:
            counts[stem] += 1
        return f"{stem}_{counts[stem]}"

    def visit(inner: gs.Graph) -> None:
        for node in inner.nodes:
            if not node.name or node.name in seen:
                node.name = numbered(node.name or f"{node.op}_{len(seen)}")
                taken.add(node.name)
            seen.add(node.name)
            for sub in bodies(node):
                visit(sub)

    visit(graph)


def save(graph: gs.Graph, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Write the graph to `path`: all of it or nothing. external=True puts weights into `NAME.data` beside it,
    None does so from 1.9 GB. GraphError when the folder cannot be written."""
    export = Export(aside=LARGE)
    model = export_model(graph, export)
    files.write(Path(path), model, export.weights, external=external)


def to_model(graph: gs.Graph) -> onnx.ModelProto:
    """The graph as one message, weights included; GraphError above protobuf's 2 GB."""
    export = Export(aside=LARGE)
    model = export_model(graph, export)
    if sum(values.nbytes for values in export.weights.values()) > files.INLINE_LIMIT:
        raise GraphError("the model is larger than the 2 GB that one message holds; save it to a file instead")
    for name, values in export.weights.items():
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(tensors.header(name, values))
        tensor.raw_data = bytes(tensors.raw_bytes(values))
    return model


# ---- shapes ------------------------------------------------------------------------------------------------


def infer_shapes(graph: gs.Graph) -> None:
    """Bring the shapes and types of all tensors up to date by onnx's shape inference, in place.

    Weights are described but not passed. A size that inference cannot tell stays as it was annotated. BudgetError:
    the model asks for more memory or turns of a loop than its size accounts for, even at the smallest sizes.
    """
    model, weights = weightless(graph)
    facts = model_facts(graph)
    if PROPAGATES not in facts:  # once for a graph and its copies: passes keep what it computes
        found = forecast(model, weights, {}, sizes=by_name(model.graph.input, FREE))
        facts[PROPAGATES] = not found.skipped and found.vectors <= RANK_ONE
    produced = {name for node in model.graph.node if node.domain in DOMAINS for name in node.output}
    infos = [info for info in model.graph.value_info if info.name not in produced]  # stale ones would win
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    try:
        propagates = facts[PROPAGATES] and not _long_ranges(graph)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=propagates)
    except Exception:
        return
    _annotate(graph, inferred.graph)


def _long_ranges(graph: gs.Graph) -> bool:
    """Whether inference may write a Range out that is longer than anything a model has: one of a constant end, or of a
    size of the inputs."""
    if not any(node.op == "Range" for node in graph.nodes):
        return False
    ends = [constant(x) for node in graph.nodes if node.op == "Range" for x in node.inputs]
    sizes = [dim for tensor in graph.inputs for dim in tensor.shape or () if isinstance(dim, int)]
    return any(size > RANK_ONE for size in sizes) or any(
        end is not None and end.size and bool((np.abs(end.astype(np.float64)) > RANK_ONE).any()) for end in ends)


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


def separate_dims(graph: gs.Graph, samples: Iterable[Mapping[str, Array]]) -> gs.Graph:
    """The graph, or a copy in which no name of a free dimension stands for two sizes of one of the samples."""
    shapes = [{name: np.shape(values) for name, values in sample.items()} for sample in samples]
    parted = copy(graph)
    if not part_dims(parted, shapes):
        return graph
    infer_shapes(parted)
    return parted


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
