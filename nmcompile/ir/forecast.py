"""Forecasts what running a graph would take, without running it.

A model of a hundred bytes can ask for terabytes (Tile, Range, ConstantOfShape, tensors doubled by Concat, loops). The
forecast walks the graph node by node at given sizes of its inputs: onnx's shape inference of the single node gives the
size of each result, and the small tensors that sizes are computed from are computed on the way. So every size is known
before anything of that size exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from nmcompile.errors import BudgetError
from nmcompile.ir import tensor as tensors
from nmcompile.ir.values import compute

Array = npt.NDArray[Any]
Types = dict[str, onnx.TypeProto]

BASE = 256 << 20  # bytes that the tensors of any run may take at once
MICROSOFT = "com.microsoft"
GROWTH = 64  # and so many more for each byte of weights and inputs
TURNS = 1_000_000  # node runs that a loop may ask for, where their number is known beforehand
STEPS = 50_000  # nodes looked at beyond the graph's own, in loops within loops
SMALL = 1 << 16  # elements up to which values are followed
SIMULATED = 3  # turns of a loop that are looked at
RANK_ONE = 1 << 21  # elements of one-dimensional results up to which onnx may propagate their values as shapes

# Inputs whose values decide how large the results are, by operator.
CONTROL: Mapping[str, Sequence[int]] = {
    "Range": (0, 1, 2), "ConstantOfShape": (0,), "Tile": (1,), "Expand": (1,), "Reshape": (1,), "Pad": (1, 3),
    "Resize": (1, 2, 3), "Upsample": (1,), "OneHot": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,),
    "Split": (1,), "TopK": (1,), "CenterCropPad": (1,), "MaxUnpool": (2,), "AffineGrid": (1,), "HannWindow": (0,),
    "HammingWindow": (0,), "BlackmanWindow": (0,), "MelWeightMatrix": (0, 1, 2, 3, 4), "DFT": (1, 2), "STFT": (1, 3),
    "Col2Im": (1, 2), "Loop": (0, 1), "If": (0,), "ReduceSum": (1,), "ReduceMean": (1,), "ReduceMax": (1,),
    "ReduceMin": (1,), "ReduceProd": (1,), "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,), "ReduceSumSquare": (1,),
}  # fmt: skip
# Operators whose result may be of any size, whatever goes in: unless it is known, they are not run.
GROWING = frozenset({
    "Range", "ConstantOfShape", "Tile", "Expand", "Pad", "Resize", "Upsample", "OneHot", "CenterCropPad", "MaxUnpool",
    "AffineGrid", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "DFT", "STFT", "Col2Im",
    "ImageDecoder", "RandomNormal", "RandomUniform", "ConvTranspose", "CropAndResize", "ConvTransposeWithDynamicPads",
})  # fmt: skip
# Operators whose result is as large as its values say, but never much larger than what goes in.
DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit"})
ALIKE = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
                   "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding"})  # first result as first input


@dataclass
class Forecast:
    """peak: bytes of the tensors that are alive at once, weights and inputs aside, of the `limit`. unknown: the first
    node whose result is of a size that cannot be told, and may be any. open: some sizes are not known, or a loop's
    turns. vectors: elements of all one-dimensional results. skipped: values that shape inference might follow
    further."""

    limit: int = 0
    peak: int = 0
    unknown: str = ""
    open: bool = False
    vectors: int = 0
    skipped: bool = False


def forecast(
    model: onnx.ModelProto, weights: Mapping[str, Array], feeds: Mapping[str, Array], wanted: Iterable[str] = (),
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> Forecast:  # fmt: skip
    """What a run of `model` with large initializers `weights` takes; `wanted` names results kept until the end.

    Inputs are known by value (`feeds`) or by `sizes` only. GraphError names the first node that asks for more memory
    than BASE and GROWTH times what the model and its inputs take, or for more than TURNS turns of a loop.
    """
    walk = _Walk(model, weights, feeds, frozenset(wanted), sizes or {})
    walk.graph(model.graph, dict(walk.types))
    return walk.found


def by_name(infos: Iterable[onnx.ValueInfoProto], free: int) -> dict[str, list[int]]:
    """Sizes for inputs of known rank, `free` for each dimension that the model leaves open."""
    shapes = {info.name: info.type.tensor_type.shape.dim for info in infos if info.type.tensor_type.HasField("shape")}
    return {name: [dim.dim_value if dim.dim_value > 0 or (dim.HasField("dim_value") and not dim.dim_value) else free
                   for dim in dims] for name, dims in shapes.items()}  # fmt: skip


@dataclass
class _Walk:
    model: onnx.ModelProto
    weights: Mapping[str, Array]
    feeds: Mapping[str, Array]
    wanted: frozenset[str]
    sizes: Mapping[str, Sequence[int]]
    found: Forecast = field(default_factory=Forecast)
    types: Types = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    tainted: set[str] = field(default_factory=set)  # of sizes that are not known, for reasons of the data

    def __post_init__(self) -> None:
        self.opsets = {item.domain: item.version for item in self.model.opset_import}
        self.steps = STEPS + len(self.model.graph.node)
        self.alive = 0
        self.needed = needed(self.model.graph)
        given = 0
        for info in self.model.graph.input:
            kind = onnx.TypeProto.FromString(info.type.SerializeToString())
            shape = self.feeds[info.name].shape if info.name in self.feeds else self.sizes.get(info.name)
            if shape is not None and kind.HasField("tensor_type"):
                kind = onnx.helper.make_tensor_type_proto(kind.tensor_type.elem_type, [int(dim) for dim in shape])
            self.types[info.name] = kind
            given += _bytes(kind) or 0
            self._remember(info.name, self.feeds.get(info.name))
        weight = sum(values.nbytes for values in self.weights.values())
        weight += sum(_raw(tensor) for tensor in self.model.graph.initializer)
        self.found.limit = BASE + GROWTH * (given + weight)

    # ---- one graph ----------------------------------------------------------------------------------------

    def graph(self, graph: onnx.GraphProto, types: Types) -> Types:
        """Types of everything in `graph`, added to those of the enclosing ones."""
        for tensor in graph.initializer:
            types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if tensor.name in self.needed:
                whole = tensor.data_location != onnx.TensorProto.EXTERNAL
                self._remember(tensor.name, tensors.to_array(tensor) if whole else self.weights.get(tensor.name))
        last = {name: index for index, node in enumerate(graph.node) for name in _reads(node)}
        last.update({info.name: len(graph.node) for info in graph.output})
        ends: dict[int, list[str]] = {}
        for name, index in last.items():
            ends.setdefault(index, []).append(name)
        held: dict[str, int] = {}
        for index, node in enumerate(graph.node):
            self.steps -= 1
            if self.steps < 0:
                self.found.open = self.found.skipped = True
                return types
            for name, kind in self._node(node, types).items():
                types[name] = kind
                self._count(node, name, kind, held, name in last or name in self.wanted)
            for name in ends.get(index, ()):
                if name not in self.wanted:
                    self.alive -= held.pop(name, 0)
        self.alive -= sum(held.values())
        return types

    def _count(self, node: onnx.NodeProto, name: str, kind: onnx.TypeProto, held: dict[str, int], kept: bool) -> None:
        size = _bytes(kind)
        if size is None:
            self.found.open = True
            foreign = node.domain not in ("", "ai.onnx") and node.op_type not in GROWING
            if foreign or node.op_type in DATA or self.tainted.intersection(_reads(node)) or _bodies(node):
                self.tainted.add(name)
            elif node.op_type in GROWING and not self.found.unknown:
                self.found.unknown = f"{_where(node)}: the size of its result '{name}' depends on values " \
                                     "that are not known before it runs"  # fmt: skip
            return
        if len(kind.tensor_type.shape.dim) == 1:
            self.found.vectors += kind.tensor_type.shape.dim[0].dim_value
        self.found.peak = max(self.found.peak, self.alive + size)
        if self.found.peak > self.found.limit:
            dims = [dim.dim_value for dim in kind.tensor_type.shape.dim]
            raise BudgetError(
                f"{_where(node)} makes '{name}' of {dims}: the model asks for {self.found.peak / 1e6:,.0f} MB at once, "
                f"more than {self.found.limit / 1e6:,.0f} MB, which is what its weights and inputs account for; "
                "is the file damaged? If not, give smaller samples, or export the model with smaller sizes"
            )
        if kept:
            held[name] = held.get(name, 0) + size
            self.alive += size

    # ---- one node -----------------------------------------------------------------------------------------

    def _node(self, node: onnx.NodeProto, types: Types) -> Types:
        """Types of the node's results; values of those that sizes depend on are remembered."""
        names = [name for name in node.output if name]
        nothing = {name: onnx.TypeProto() for name in names}
        bodies = _bodies(node)
        if bodies:
            return nothing | self._nested(node, bodies, types)
        if node.op_type in ALIKE and node.domain == MICROSOFT and names and node.input:
            return nothing | {names[0]: types.get(node.input[0], onnx.TypeProto())}
        if node.domain not in ("", "ai.onnx"):
            return nothing | self._annotated(node)
        inputs = {name: types.get(name, onnx.TypeProto()) for name in node.input if name}
        data = {name: onnx.numpy_helper.from_array(np.asarray(self.values[name], order="C"), name)
                for name in inputs if name in self.values and self.values[name].dtype.kind in "biuf"}  # fmt: skip
        try:
            schema = onnx.defs.get_schema(node.op_type, max(self.opsets.get("", 1), 1), "")
            known = onnx.shape_inference.infer_node_outputs(
                schema, node, inputs, data, opset_imports=list(self.model.opset_import)
            )
        except Exception:  # C++ raises several kinds; at other sizes the node may be right
            return nothing
        if any(_bytes(known.get(name, onnx.TypeProto())) is None for name in names) and _known(inputs):
            known = self._by_function(node, names, inputs) or known
        known = {**known, **self._value(node, names, inputs, known)}
        return nothing | {name: kind for name, kind in known.items() if name in nothing}

    def _by_function(self, node: onnx.NodeProto, names: Sequence[str], inputs: Types) -> Types:
        """Of operators that onnx defines by others (GreaterOrEqual): inference of a model of that node alone."""
        graph = onnx.GraphProto(name="node", node=[node])
        graph.input.extend(onnx.ValueInfoProto(name=name, type=kind) for name, kind in inputs.items())
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        model = onnx.ModelProto(graph=graph, opset_import=self.model.opset_import, ir_version=self.model.ir_version)
        try:
            inferred = onnx.shape_inference.infer_shapes(model)
        except Exception:  # as above
            return {}
        return {info.name: info.type for info in inferred.graph.output}

    def _value(self, node: onnx.NodeProto, names: Sequence[str], inputs: Types, known: Types) -> Types:
        """Remember results on whose values sizes depend; the types of those that their values tell."""
        if not any(name in self.needed for name in names):
            return {}
        sizes = [_elements(known.get(name, onnx.TypeProto())) for name in names]
        if any(size is not None and size > SMALL for size in sizes):
            self.found.skipped = True
            return {}
        bounded = [0 if size is None and node.op_type in DATA else size for size in sizes]
        made = compute(node, inputs, self.values, bounded, self.model.opset_import)
        for name, value in (made or {}).items():
            self._remember(name, value)
        if node.op_type not in DATA:
            return {}
        return {name: onnx.helper.make_tensor_type_proto(tensors.element_type(value.dtype), value.shape)
                for name, value in (made or {}).items() if value.dtype.kind in "biuf"}  # fmt: skip

    def _remember(self, name: str, value: Array | None) -> None:
        if value is None or name not in self.needed:
            self.values.pop(name, None)
        elif value.size <= SMALL:
            self.values[name] = np.asarray(value)
        else:
            self.found.skipped = True

    def _annotated(self, node: onnx.NodeProto) -> Types:
        """What the model itself says of the results of an operator that onnx does not know, where that is fixed."""
        said = {info.name: info.type for info in [*self.model.graph.value_info, *self.model.graph.output]}
        return {name: said[name] for name in node.output if name in said and _bytes(said[name]) is not None}

    # ---- nodes with graphs --------------------------------------------------------------------------------

    def _nested(self, node: onnx.NodeProto, bodies: Mapping[str, onnx.GraphProto], types: Types) -> Types:
        if node.op_type == "If":
            return self._branches(node, bodies, types)
        if node.op_type == "Loop" and "body" in bodies:
            return self._loop(node, bodies["body"], types)
        self.found.open = True
        for body in bodies.values():
            self.graph(body, dict(types))
        return {}

    def _branches(self, node: onnx.NodeProto, bodies: Mapping[str, onnx.GraphProto], types: Types) -> Types:
        condition = self.values.get(node.input[0]) if node.input else None
        if condition is not None and condition.size == 1:
            chosen = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
            bodies = {name: body for name, body in bodies.items() if name == chosen}
        ends = []
        for body in bodies.values():
            inner = self.graph(body, dict(types))
            ends.append([inner.get(info.name, onnx.TypeProto()) for info in body.output])
            if len(bodies) == 1:
                for name, info in zip(node.output, body.output, strict=False):
                    self._remember(name, self.values.get(info.name))
        if not ends or any(end != ends[0] for end in ends):
            self.found.open = True
            return {}
        return dict(zip(node.output, ends[0], strict=False))

    def _loop(self, node: onnx.NodeProto, body: onnx.GraphProto, types: Types) -> Types:
        """The first turns; BudgetError where there are too many of them, known beforehand."""
        limit = self.values.get(node.input[0]) if node.input and node.input[0] else None
        turns = None if limit is None or limit.size != 1 else max(int(limit.reshape(-1)[0]), 0)
        carried = [types.get(name, onnx.TypeProto()) for name in node.input[2:]]
        values = [self.values.get(name) for name in node.input[2:]]
        condition = self.values.get(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array(True)
        inner: Types = {}
        self.found.open = True
        for turn in range(SIMULATED if turns is None else min(turns, SIMULATED)):
            scope = dict(types)
            firsts = [onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, []),
                      onnx.helper.make_tensor_type_proto(onnx.TensorProto.BOOL, [])]  # fmt: skip
            for info, kind, value in zip(body.input, [*firsts, *carried],
                                         [np.array(turn), condition, *values], strict=False):  # fmt: skip
                scope[info.name] = kind
                self._remember(info.name, value)
            inner = self.graph(body, scope)
            ends = [info.name for info in body.output]
            condition = self.values.get(ends[0]) if ends else None
            carried = [inner.get(name, onnx.TypeProto()) for name in ends[1 : 1 + len(carried)]]
            values = [self.values.get(name) for name in ends[1 : 1 + len(values)]]
            if condition is not None and condition.size == 1 and not bool(condition.reshape(-1)[0]):
                turns = turn + 1
                break
        if turns is not None and condition is not None and turns * max(len(body.node), 1) > TURNS:
            raise BudgetError(f"{_where(node)} goes round {turns:,} times, which takes too long; is the file damaged?")
        for name in node.output:
            self.values.pop(name, None)
        return {}


# ---- reading messages ----------------------------------------------------------------------------------------


def _where(node: onnx.NodeProto) -> str:
    return f"node '{node.name or next(iter(node.output), '')}' ({node.op_type})"


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """Names that a node and the graphs in it read."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from (info.name for info in attribute.g.output)
            for inner in attribute.g.node:
                yield from _reads(inner)


def _bodies(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def _known(types: Types) -> bool:
    return all(_elements(kind) is not None for kind in types.values())


def _elements(kind: onnx.TypeProto) -> int | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return math.prod(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None


def _bytes(kind: onnx.TypeProto) -> int | None:
    count = _elements(kind)
    if count is None:
        return None
    number = kind.tensor_type.elem_type
    if number in tensors.PLAIN:
        return count * tensors.PLAIN[number].itemsize
    return (count * tensors.BITS[number] + 7) // 8 if number in tensors.BITS else 32 * count  # a string


def _raw(tensor: onnx.TensorProto) -> int:
    return 0 if tensor.data_location == onnx.TensorProto.EXTERNAL else tensor.ByteSize()


def needed(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the tensors whose values decide about sizes, in the graph and in those within it."""
    makers: dict[str, list[str]] = {}  # name -> what it is computed from
    found: list[str] = []
    told: set[str] = set()  # whose values tell their size
    todo = [graph]
    while todo:
        for node in todo.pop().node:
            bodies = list(_bodies(node).values())
            todo += bodies
            told.update(name for name in node.output if node.op_type in DATA)
            ends = [info.name for body in bodies for info in body.output]
            for name in node.output:
                if node.op_type not in ("Shape", "Size") or told.intersection(node.input):
                    makers.setdefault(name, []).extend([*node.input, *ends])
            for body in bodies:
                for info in body.input:
                    makers.setdefault(info.name, []).extend([*node.input, *ends])
                if node.op_type == "Loop" and body.output:
                    found.append(body.output[0].name)
            if node.domain in ("", "ai.onnx"):
                found += [node.input[i] for i in CONTROL.get(node.op_type, ()) if i < len(node.input)]
    seen = set(found)
    while found:
        for name in makers.get(found.pop(), ()):
            if name not in seen:
                seen.add(name)
                found.append(name)
    return frozenset(seen - {""})
