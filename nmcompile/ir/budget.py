"""What a model may unfold to when it is read: nodes after its functions are inlined, bytes of sparse weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx

from nmcompile.errors import BudgetError, GraphError

NODES = 100_000  # of a graph and all graphs in it, functions inlined
UNFOLDED = 256 << 20  # bytes that inlined functions may take, and as many times what the model takes ...
COPIES = 16
SPARSE = 64 << 20  # bytes that all sparse weights may take when they are made dense, and ...
DENSER = 64  # ... so many times what they take when sparse
RANK = 64  # dimensions of an array, numpy's limit
ELEMENTS = 1 << 62


@dataclass
class Sparse:
    """Bytes that sparse weights may still take."""

    left: int = field(default=SPARSE)

    def take(self, name: str, dense: int, stored: int) -> None:
        """BudgetError when `dense` bytes are too many for a weight that is stored in `stored` bytes."""
        self.left += DENSER * stored - dense
        if self.left < 0:
            raise BudgetError(f"sparse initializer '{name}' is of {stored:,} bytes and would take "
                              f"{dense / 1e6:,.0f} MB dense, too large to be made dense; store it densely")  # fmt: skip


def check_dims(name: str, dims: Iterable[int], kind: str = "initializer") -> None:
    """GraphError unless an array can have these sizes."""
    sizes, count = list(dims), 1
    if any(size < 0 for size in sizes):
        raise GraphError(f"{kind} '{name}': negative size in {sizes[:8]}; export the model again")
    if len(sizes) > RANK:
        raise GraphError(f"{kind} '{name}' has {len(sizes)} dimensions, at most {RANK} can be read; "
                         "the file is damaged, export the model again")  # fmt: skip
    for size in sizes:
        count *= max(size, 1)
    if count > ELEMENTS:
        raise GraphError(f"{kind} '{name}': no array is as large as {sizes[:8]}; the file is damaged, "
                         "export the model again")  # fmt: skip


def check_size(model: onnx.ModelProto) -> Sparse:
    """BudgetError when the model has, or its functions unfold to, more nodes or bytes than can be worked on.

    Returns what its sparse weights may take.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    nodes: dict[tuple[str, str], int] = {}
    sizes: dict[tuple[str, str], int] = {}

    def unfolded(body: Iterable[onnx.NodeProto], within: tuple[tuple[str, str], ...]) -> tuple[int, int]:
        count = total = 0
        for node in body:
            key = (node.domain, node.op_type)
            if key in within:
                raise GraphError(f"the model's functions cannot be inlined: '{node.op_type}' calls itself; "
                                 "export it without them")  # fmt: skip
            if key in functions and key not in nodes:
                nodes[key], sizes[key] = unfolded(functions[key].node, (*within, key))
            count += 1 + nodes.get(key, 0)
            total += sizes.get(key, 0) + (node.ByteSize() if functions else 0)
            for sub in _subgraphs(node):
                inner = unfolded(sub.node, within)
                count, total = count + inner[0], total + inner[1]
        return count, total

    try:
        count, total = unfolded(model.graph.node, ())
    except RecursionError:
        raise GraphError("the model's functions or graphs are nested too deep; export it without them") from None
    if count > NODES:
        raise BudgetError(f"the model has {count:,} nodes with its functions inlined, more than the {NODES:,} that are "
                          "compiled; is the file damaged?")  # fmt: skip
    if functions and total > UNFOLDED + COPIES * model.ByteSize():
        raise BudgetError(f"the model's functions unfold to {total / 1e6:,.0f} MB; export it without them")
    return Sparse()


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs
