"""Walks and edits GraphSurgeon graphs: copy, rewire, clean up, cut out.

Tensors compare by name and nodes by structure, and neither can be hashed: everything here goes by `id`. A
subgraph (body of If, Loop, Scan) captures an outer tensor by holding the same object.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.bodies import bodies, inner_graphs
from nmcompile.ir.names import fresh

Array = npt.NDArray[Any]
SOURCE = "source"  # attribute of a constant: where it comes from (nmcompile.ir.provenance)
CARRIED = ("doc_string", "opset", "import_domains", "producer_name", "producer_version", "ir_version")


def model_facts(graph: gs.Graph) -> dict[str, Any]:
    """What a ModelProto holds beside its graph: domain, model_version, doc_string, metadata (dict)."""
    facts: dict[str, Any] = graph.__dict__.setdefault("model_facts", {})  # its __getattr__ logs an error
    return facts


# ---- copying -----------------------------------------------------------------------------------------------


def copy(graph: gs.Graph) -> gs.Graph:
    """A graph of new nodes and tensors that shares the weights' arrays only; subgraphs are copied too."""
    return _copy(graph, graph.nodes, graph.inputs, graph.outputs, {})


def _copy(
    graph: gs.Graph,
    nodes: Iterable[gs.Node],
    inputs: Iterable[gs.Tensor],
    outputs: Iterable[gs.Tensor],
    made: dict[int, gs.Tensor],
) -> gs.Graph:
    def tensor(old: gs.Tensor) -> gs.Tensor:
        if not old.name:
            return gs.Variable.empty()
        if id(old) not in made:
            made[id(old)] = _copy_tensor(old)
        return made[id(old)]

    new_inputs = [tensor(t) for t in inputs]
    new_nodes = []
    for node in nodes:
        ins, outs = [tensor(t) for t in node.inputs], [tensor(t) for t in node.outputs]
        attrs = {
            name: _copy(value, value.nodes, value.inputs, value.outputs, made) if isinstance(value, gs.Graph)
            else list(value) if isinstance(value, list) else value
            for name, value in node.attrs.items()
        }  # fmt: skip
        new_nodes.append(gs.Node(node.op, node.name, attrs, ins, outs, domain=node.domain))
    new = gs.Graph(new_nodes, new_inputs, [tensor(t) for t in outputs], name=graph.name)
    for name in CARRIED:
        setattr(new, name, getattr(graph, name))
    if new.import_domains is not None:
        new.import_domains = list(new.import_domains)
    model_facts(new).update(model_facts(graph))
    return new


def _copy_tensor(tensor: gs.Tensor) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        copied = gs.Constant(tensor.name, tensor.values)
        if SOURCE in tensor.__dict__:
            copied.__dict__[SOURCE] = tensor.__dict__[SOURCE]
        return copied
    shape = None if tensor.shape is None else list(tensor.shape)
    new = gs.Variable(tensor.name, tensor.dtype, shape, getattr(tensor, "type", "tensor_type"))
    if hasattr(tensor, "type_proto"):
        new.type_proto = tensor.type_proto
    return new


# ---- asking ------------------------------------------------------------------------------------------------


def constant(tensor: gs.Tensor) -> Array | None:
    """The value of a constant, also behind Identity nodes; None for what is computed."""
    source = source_constant(tensor)
    return None if source is None else np.asarray(source.values)


def source_constant(tensor: gs.Tensor) -> gs.Constant | None:
    """The gs.Constant itself, also behind Identity nodes."""
    seen = 0
    while not isinstance(tensor, gs.Constant):
        node = producer(tensor)
        seen += 1
        if node is None or node.op != "Identity" or seen > 1000:
            return None
        tensor = node.inputs[0]
    return tensor


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes the tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read the tensor, each once, those inside subgraphs too."""
    return list({id(node): node for node in tensor.outputs}.values())


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the tensor is an output of the graph, or of a subgraph that captures it."""
    if any(t is tensor for t in graph.outputs):
        return True
    return any(t is tensor for sub in inner_graphs(graph) for t in sub.outputs)


def subgraph_tensors(node: gs.Node) -> Iterator[gs.Tensor]:
    """Every tensor that the node's subgraphs mention, at any depth: captured ones among them."""
    for sub in bodies(node):
        yield from sub.outputs
        for inner in sub.nodes:
            yield from inner.inputs
            yield from subgraph_tensors(inner)


# ---- editing -----------------------------------------------------------------------------------------------


def rewire(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old` read `new`, but for the node that makes `new` out of `old`.

    Where `old` is a graph output, `new` takes over its name and `old` gets another; an input, a constant or a
    second output keeps its own name and an Identity stands between.
    """
    if old is new:
        return
    makers = {id(node) for node in new.inputs}
    for node in consumers(old):
        if id(node) in makers:
            continue
        for index, tensor in enumerate(list(node.inputs)):
            if tensor is old:
                node.inputs[index] = new
    for sub in inner_graphs(graph):
        sub.outputs[:] = [new if t is old else t for t in sub.outputs]
    places = [index for index, tensor in enumerate(graph.outputs) if tensor is old]
    if not places:
        return
    name = old.name
    old.name = fresh(graph, f"{name}_before")
    if isinstance(new, gs.Constant) or not new.inputs or any(t is new for t in [*graph.inputs, *graph.outputs]):
        copied = gs.Variable(name, new.dtype, new.shape)
        graph.nodes.append(gs.Node("Identity", fresh(graph, f"{name}_copy"), {}, [new], [copied]))
        new = copied
    new.name = name
    if new.dtype is None:
        new.dtype = old.dtype
    if new.shape is None:
        new.shape = old.shape
    for index in places:
        graph.outputs[index] = new


def cleanup(graph: gs.Graph) -> None:
    """Drop nodes that no output needs and sort the rest, in subgraphs too; inputs and outputs stay.

    The order is that of `graph.nodes` wherever the edges allow it. GraphError names a node on a cycle.
    """
    for sub in [body for node in graph.nodes for body in bodies(node)]:
        cleanup(sub)
    alive = _cone(graph, graph.outputs, frozenset())
    kept = [node for node in graph.nodes if id(node) in alive]
    for node in graph.nodes:
        if id(node) not in alive:
            for inner in [*_inner_nodes(node), node]:
                inner.inputs.clear()
                inner.outputs.clear()
    graph.nodes[:] = _sorted(kept)


def sort(graph: gs.Graph) -> None:
    """Put producers before readers, in subgraphs too; drops nothing."""
    for sub in [body for node in graph.nodes for body in bodies(node)]:
        sort(sub)
    graph.nodes[:] = _sorted(graph.nodes)


def _inner_nodes(node: gs.Node) -> Iterator[gs.Node]:
    for sub in bodies(node):
        for inner in sub.nodes:
            yield inner
            yield from _inner_nodes(inner)


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from node.inputs
    yield from subgraph_tensors(node)


def _cone(graph: gs.Graph, outputs: Iterable[gs.Tensor], cut: Collection[int]) -> set[int]:
    """Ids of the nodes that compute `outputs`, no further up than the tensors whose ids are in `cut`."""
    own = {id(node) for node in graph.nodes}
    alive: set[int] = set()
    todo = [t for t in outputs if id(t) not in cut]
    while todo:
        for node in todo.pop().inputs:
            if id(node) in own and id(node) not in alive:
                alive.add(id(node))
                todo += [t for t in _reads(node) if id(t) not in cut]
    return alive


def _sorted(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """Producers before readers; among those that are ready the earliest first (Kahn 1962)."""
    place = {id(node): index for index, node in enumerate(nodes)}
    readers: list[set[int]] = [set() for _ in nodes]
    waiting = [0] * len(nodes)
    for index, node in enumerate(nodes):
        before = {place[id(maker)] for t in _reads(node) for maker in t.inputs if id(maker) in place}
        waiting[index] = len(before)
        for maker in before:
            readers[maker].add(index)
    ready = [index for index, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        stuck = next(nodes[index] for index, count in enumerate(waiting) if count)
        raise GraphError(f"node '{stuck.name}' ({stuck.op}) is on or behind a cycle of nodes; break it")
    return order


# ---- cutting out -------------------------------------------------------------------------------------------


def extract(graph: gs.Graph, outputs: Sequence[str], inputs: Sequence[str] | None = None) -> gs.Graph:
    """A copy of the part that computes `outputs` from the graph's inputs, or from the tensors named in
    `inputs`.

    Its inputs are those that are needed, in the given order. GraphError names a tensor that does not exist,
    or a graph input that is needed but not among `inputs`.
    """
    tensors = {t.name: t for node in reversed(graph.nodes) for t in [*node.inputs, *node.outputs]}
    tensors.update({t.name: t for t in [*graph.outputs, *graph.inputs]})
    for name in [*outputs, *(inputs or ())]:
        if name not in tensors or not name:
            raise GraphError(f"the graph has no tensor '{name}'; name one of its tensors")
    ends = [tensors[name] for name in outputs]
    starts = list(graph.inputs) if inputs is None else [tensors[name] for name in inputs]
    cut = {id(t) for t in starts}
    alive = _cone(graph, ends, cut)
    nodes = [node for node in graph.nodes if id(node) in alive]
    read = {id(t) for node in nodes for t in _reads(node)} | {id(t) for t in ends}
    missing = [t.name for t in graph.inputs if id(t) in read and id(t) not in cut]
    if missing:
        raise GraphError(f"input '{missing[0]}' is needed for '{outputs[0]}'; name it among the inputs")
    made: dict[int, gs.Tensor] = {}
    for tensor in starts:
        made[id(tensor)] = gs.Variable(tensor.name, tensor.dtype, tensor.shape) if isinstance(
            tensor, gs.Constant) else _copy_tensor(tensor)  # fmt: skip
    part = _copy(graph, nodes, [t for t in starts if id(t) in read], ends, made)
    for tensor in part.inputs:  # a node kept for another of its outputs must not make this one as well
        for node in list(tensor.inputs):
            place = next(index for index, t in enumerate(node.outputs) if t is tensor)
            node.outputs[place] = gs.Variable(fresh(part, f"{tensor.name}_unused"), tensor.dtype, tensor.shape)
    return part
