"""What is checked and put in order when a graph comes in: types of inputs and outputs, constants among the outputs,
and names of free dimensions that stand for two sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_graphsurgeon as gs

from nmcompile.errors import GraphError
from nmcompile.ir.names import names, unused
from nmcompile.ir.proto import Dim

Shapes = Mapping[str, tuple[int, ...]]  # by name of an input


def check_types(graph: gs.Graph) -> None:
    """GraphError unless inputs and outputs are tensors, and inputs of a known type and number of dimensions."""
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for tensor in tensors:
            if not isinstance(tensor, gs.Constant) and tensor.type not in (None, "tensor_type"):
                name = str(tensor.type).removesuffix("_type").replace("_", " ")
                raise GraphError(f"{kind} '{tensor.name}' is of the type {name}, only tensors are supported; "
                                 "export the model without it")  # fmt: skip
    for tensor in graph.inputs:
        if tensor.dtype is None:
            raise GraphError(f"input '{tensor.name}' has no element type; export the model again")
        if tensor.shape is None:
            raise GraphError(f"input '{tensor.name}' has no shape, not even a number of dimensions; export the model "
                             "with the rank of each input, for example by dynamic_axes")  # fmt: skip


def compute_constant_outputs(graph: gs.Graph) -> None:
    """An output that is a constant becomes the result of an Identity, so that there is a node that makes it."""
    for place, constant in enumerate(graph.outputs):
        if not isinstance(constant, gs.Constant):
            continue
        taken = names(graph)
        name, values = constant.name, constant.values
        constant.name = unused(taken, f"{name}_value")
        made = gs.Variable(name, values.dtype, list(values.shape))
        graph.nodes.append(gs.Node("Identity", unused({*taken, constant.name}, f"{name}_copy"), {}, [constant], [made]))
        for index in range(place, len(graph.outputs)):
            if graph.outputs[index] is constant:
                graph.outputs[index] = made


def part_dims(graph: gs.Graph, samples: Iterable[Shapes]) -> bool:
    """Give each axis a name of its own where one name stands for two sizes in a sample; whether any did.

    A common slip of exporters' users: {0: "n", 1: "n"} for [batch, tokens]. onnxruntime does not mind.
    """
    shapes: dict[str, list[Dim]] = {t.name: list(t.shape) for t in graph.inputs if t.shape is not None}
    wrong: set[str] = set()
    for sample in samples:
        sizes: dict[str, int] = {}
        for name, dims in shapes.items():
            if len(sample.get(name, ())) != len(dims):
                continue
            for dim, size in zip(dims, sample[name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    wrong.add(dim)
    if not wrong:
        return False
    taken = {dim for dims in shapes.values() for dim in dims if isinstance(dim, str)}
    own: dict[tuple[str, int], str] = {}
    for name in sorted(wrong):
        for axis in range(max(map(len, shapes.values()))):
            own[name, axis] = name if axis == 0 else unused(taken, f"{name}_{axis}")
            taken.add(own[name, axis])
    edges = {id(t) for t in [*graph.inputs, *graph.outputs]}
    for tensor in {id(t): t for t in [*graph.tensors().values(), *graph.inputs, *graph.outputs]}.values():
        if isinstance(tensor, gs.Constant) or tensor.shape is None:
            continue
        kept = id(tensor) in edges  # what lies between is inferred again
        tensor.shape = [(own[dim, axis] if kept and (dim, axis) in own else None) if dim in wrong else dim
                        for axis, dim in enumerate(tensor.shape)]  # fmt: skip
    return True
