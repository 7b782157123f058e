"""Writes ONNX nodes in the words of one opset: what random_graph_masks and random_graph_model are written with."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

BATCH, TOKENS = "batch", "sequence"
ELEMENT = {
    "int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL,
}  # fmt: skip
LOWEST = float(np.finfo(np.float32).min)


class Nodes:
    """Nodes and constants in the order in which they are called for; names tell the operator and its place."""

    def __init__(self, opset: int, seed: int, sizes: str, folded: bool, swapped: bool) -> None:
        self.opset, self.sizes, self.folded, self.swapped = opset, sizes, folded, swapped
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.domains: set[str] = set()

    def __call__(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.several(op, 1, *inputs, domain=domain, **attributes)[0]

    def several(self, op: str, count: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        stem = f"{op.lower()}_{len(self.nodes)}"
        outputs = [stem] if count == 1 else [f"{stem}_{i}" for i in range(count)]
        self.domains |= {domain} - {""}
        self.nodes.append(helper.make_node(op, inputs, outputs, name=stem, domain=domain, **attributes))
        return outputs

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None, stem: str = "c") -> str:
        name = f"{stem}_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def integer(self, value: int, dtype: str = "int64") -> str:
        return self.constant(value, dtype)

    def real(self, value: float) -> str:
        return self.constant(value, np.float32)

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self.inputs.setdefault(name, helper.make_tensor_value_info(name, ELEMENT[dtype], shape))
        return name

    def output(self, x: str, name: str, shape: Sequence[int | str]) -> None:
        self.nodes.append(helper.make_node("Identity", [x], [name], name=f"{name}_out"))
        self.outputs.append(helper.make_tensor_value_info(name, ELEMENT["float32"], shape))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "drawn", list(self.inputs.values()), self.outputs, self.initializers)
        others = [helper.make_opsetid(domain, 1) for domain in sorted(self.domains)]
        sets = [helper.make_opsetid("", self.opset), *others]
        ir = next(version for opset, version in ((23, 11), (21, 10), (0, 8)) if self.opset >= opset)
        return helper.make_model(graph, opset_imports=sets, ir_version=ir)

    # ---- operators whose form depends on the opset ----

    def axes(self, op: str, x: str, *axes: int) -> str:
        """Squeeze or Unsqueeze."""
        return self(op, x, axes=list(axes)) if self.opset < 13 else self(op, x, self.ints(*axes))

    def reduce(self, op: str, x: str, axis: int, keep: bool = False) -> str:
        """ReduceSum, ReduceMean or ReduceMax over one axis."""
        new = self.opset >= (13 if op == "ReduceSum" else 18)
        return self(op, x, self.ints(axis), keepdims=int(keep)) if new else self(op, x, axes=[axis], keepdims=int(keep))

    def cast(self, x: str, dtype: str) -> str:
        return self("Cast", x, to=ELEMENT[dtype])

    def at_most(self, a: str, b: str) -> str:
        """a <= b."""
        return self("LessOrEqual", a, b) if self.opset >= 12 else self("Not", self("Greater", a, b))

    def least(self, a: str, b: str) -> str:
        """The lesser of two integers, which Min takes from opset 12 on."""
        return self("Min", a, b) if self.opset >= 12 else self("Where", self("Less", a, b), a, b)

    def slice(self, x: str, start: str, end: str, axis: int) -> str:
        """x[start:end] along an axis; start and end are scalars."""
        return self("Slice", x, *(self.axes("Unsqueeze", value, 0) for value in (start, end)), self.ints(axis))

    def size(self, x: str, axis: int) -> str:
        """A size as a scalar."""
        if self.sizes == "range" and self.opset >= 15:
            return self.axes("Squeeze", self("Shape", x, start=axis, end=axis + 1), 0)
        shape = self("Shape", x)
        if self.sizes == "slice":
            return self.axes("Squeeze", self("Slice", shape, self.ints(axis), self.ints(axis + 1), self.ints(0)), 0)
        return self("Gather", shape, self.integer(axis), axis=0)

    def split(self, x: str, count: int, axis: int) -> list[str]:
        if self.opset < 18:
            return self.several("Split", count, x, axis=axis)
        return self.several("Split", count, x, axis=axis, num_outputs=count)

    def shape(self, *sizes: str | int) -> str:
        """A shape made of scalars and numbers."""
        parts = [self.ints(n) if isinstance(n, int) else self.axes("Unsqueeze", n, 0) for n in sizes]
        return self("Concat", *parts, axis=0)

    def range(self, count: str) -> str:
        return self("Range", self.integer(0), count, self.integer(1))

    # ---- layers ----

    def table(self, rows: int, width: int) -> str:
        """Of embeddings, in values that half precision holds."""
        return self.constant(self.rng.standard_normal((rows, width)).astype(np.float16), np.float32, "table")

    def linear(self, x: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        weight = (self.rng.standard_normal((inputs, outputs)) * gain / sqrt(inputs)).astype(np.float32)
        if self.folded:
            stored = self.constant(weight, stem="weight")
        else:
            stored = self("Transpose", self.constant(weight.T.copy(), stem="weight"), perm=[1, 0])
        bias = self.constant(self.rng.standard_normal(outputs) * 0.1, np.float32, "bias")
        y = self("MatMul", x, stored)
        return self("Add", bias, y) if self.swapped else self("Add", y, bias)

    def norm(self, x: str, width: int, fused: bool) -> str:
        gain = self.constant(1 + 0.1 * self.rng.standard_normal(width), np.float32, "gain")
        bias = self.constant(0.1 * self.rng.standard_normal(width), np.float32, "bias")
        if fused and self.opset >= 17:
            return self("LayerNormalization", x, gain, bias, axis=-1)
        centred = self("Sub", x, self.reduce("ReduceMean", x, -1, keep=True))
        variance = self.reduce("ReduceMean", self("Pow", centred, self.real(2.0)), -1, keep=True)
        scaled = self("Div", centred, self("Sqrt", self("Add", variance, self.real(1e-5))))
        return self("Add", self("Mul", scaled, gain), bias)

    def gelu(self, x: str, kind: str) -> str:
        if kind == "Relu" or (kind == "Gelu" and self.opset >= 20):
            return self(kind, x)
        half = self("Mul", x, self("Add", self("Erf", self("Div", x, self.real(sqrt(2)))), self.real(1.0)))
        return self("Mul", half, self.real(0.5))
