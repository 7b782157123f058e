"""INT8 by hand: activation ranges of a float encoder, and the notation of INT8 that DeepSparse recognises."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nmcompile.ort_options import open_foreign

Array = NDArray[Any]
Ranges = dict[str, tuple[float, float]]


def run_float(
    model: onnx.ModelProto | str, feeds: Mapping[str, Array], names: Sequence[str] | None = None
) -> list[Array]:
    """Outputs of the model in onnxruntime."""
    session = open_foreign(model if isinstance(model, str) else model.SerializeToString())
    return list(session.run(names, dict(feeds)))


def ranges(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> Ranges:
    """Least and greatest value of everything that is an operand of a MatMul; 0 is always within."""
    constants = {item.name for item in model.graph.initializer}
    names = sorted({name for node in model.graph.node if node.op_type == "MatMul" for name in node.input} - constants)
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return {
        name: (min(0.0, float(array.min())), max(0.0, float(array.max())))
        for name, array in zip(names, run_float(probed, feeds, names), strict=True)
    }


def u8_parameters(span: tuple[float, float]) -> tuple[float, int]:
    """Scale and zero point that spread a range, which holds 0, over 0 to 255."""
    least, most = span
    scale = max((most - least) / 255, 1e-8)
    return scale, round(-least / scale)


def integer_form(model: onnx.ModelProto, found: Ranges) -> onnx.ModelProto:
    """Every MatMul in INT8, in the notation of SparseML's exports.

    MatMul(x, W) -> Add(bias)   ->   QuantizeLinear(x) -> MatMulInteger(W s8) -> Add(bias s32) -> Cast -> Mul(scale)
    MatMul(a, b)                ->   QuantizeLinear(a), QuantizeLinear(b) -> MatMulInteger -> Cast -> Mul(scale)

    DeepSparse 1.8 runs this in INT8; Q/DQ pairs around a MatMul it runs in float. Activations are u8, weights s8, with
    one scale per tensor: that is what it is fastest with.
    """
    return _Integers(model, found).model()


class _Integers:
    def __init__(self, model: onnx.ModelProto, found: Ranges) -> None:
        self.source, self.found = model, found
        self.constants = {item.name: item for item in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.quantized: set[str] = set()

    def model(self) -> onnx.ModelProto:
        readers = defaultdict(list)
        for node in self.source.graph.node:
            for name in node.input:
                readers[name].append(node)
        done: set[str] = set()
        for node in self.source.graph.node:
            if node.name in done:
                continue
            if node.op_type != "MatMul":
                self.nodes.append(node)
            elif node.input[1] in self.constants:
                (add,) = readers[node.output[0]]  # a linear layer has a bias, and nothing else reads the product
                done.add(add.name)
                self.linear(node, add)
            else:
                self.product(node)
        read = {name for node in self.nodes for name in node.input}
        result = onnx.ModelProto()
        result.CopyFrom(self.source)
        del result.graph.node[:], result.graph.initializer[:]
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(item for name, item in self.constants.items() if name in read)
        return result

    def constant(self, name: str, value: Array | np.generic) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def u8(self, name: str) -> tuple[str, str, float]:
        """(quantized, its zero point, its scale) of an activation."""
        scale, zero = u8_parameters(self.found[name])
        point = self.constant(f"{name}.zero", np.uint8(zero))
        if name not in self.quantized:
            self.quantized.add(name)
            self.op("QuantizeLinear", [name, self.constant(f"{name}.scale", np.float32(scale)), point], f"{name}.u8")
        return f"{name}.u8", point, scale

    def linear(self, node: onnx.NodeProto, add: onnx.NodeProto) -> None:
        x, zero, scale = self.u8(node.input[0])
        (bias_name,) = (name for name in add.input if name != node.output[0])
        weight, bias = (numpy_helper.to_array(self.constants[name]) for name in (node.input[1], bias_name))
        step = max(float(np.abs(weight).max()) / 127, 1e-12)
        s8 = self.constant(f"{node.input[1]}.s8", np.rint(weight / step).astype(np.int8))
        s32 = self.constant(f"{bias_name}.s32", np.rint(bias / (scale * step)).astype(np.int32))
        inputs = [x, s8, zero, self.constant("zero_s8", np.int8(0))]
        total = self.op("Add", [self.op("MatMulInteger", inputs, f"{node.name}.product"), s32], f"{node.name}.total")
        self.scaled(total, scale * step, add.output[0])

    def product(self, node: onnx.NodeProto) -> None:
        (a, a_zero, a_scale), (b, b_zero, b_scale) = (self.u8(name) for name in node.input)
        self.scaled(self.op("MatMulInteger", [a, b, a_zero, b_zero], f"{node.name}.product"), a_scale * b_scale,
                    node.output[0])  # fmt: skip

    def scaled(self, total: str, scale: float, output: str) -> None:
        wide = self.op("Cast", [total], f"{total}.float", to=TensorProto.FLOAT)
        self.op("Mul", [wide, self.constant(f"{output}.step", np.float32(scale))], output)
