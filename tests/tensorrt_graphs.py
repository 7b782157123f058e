"""Graphs as they are emitted for TensorRT, clean by its rules, for tests to break in one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt.profiles import profile

Edit = Callable[["Net"], None]
VERSIONS = ("8.6", "10", "11")


class Net:
    """A graph in the making, or being broken; `float` is the type it computes in."""

    def __init__(self, version: str, graph: gs.Graph | None = None) -> None:
        self.profile = profile(version)
        self.float = np.dtype(np.float16 if self.profile.strong else np.float32)
        self.graph = gs.Graph(opset=self.profile.opset, name="net") if graph is None else graph

    # ---- building

    def input(self, name: str, shape: list[object], dtype: npt.DTypeLike = np.float32) -> gs.Variable:
        tensor = gs.Variable(name, np.dtype(dtype), shape)
        self.graph.inputs.append(tensor)
        return tensor

    def output(self, tensor: gs.Tensor) -> None:
        self.graph.outputs.append(tensor)

    def constant(self, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> gs.Constant:
        return gs.Constant(g.fresh(self.graph, name), np.asarray(values, dtype or self.float))

    def op(self, op: str, name: str, *inputs: gs.Tensor, domain: str | None = None, **attrs: object) -> gs.Variable:
        result = gs.Variable(f"{name}:0")
        self.graph.nodes.append(gs.Node(op, name, dict(attrs), list(inputs), [result], domain=domain))
        return result

    def cast(self, name: str, x: gs.Tensor, to: int) -> gs.Tensor:
        """A Cast in typed graphs, nothing in those of 8.6."""
        return self.op("Cast", name, x, to=to) if self.profile.strong else x

    def pair(self, name: str, x: gs.Tensor, scale: npt.ArrayLike = 0.05, **attrs: Any) -> gs.Variable:
        """Q and DQ, `NAME/q` and `NAME/dq`."""
        values = np.asarray(scale, self.float)
        shared = self.constant(f"{name}/scale", values)
        zero = self.constant(f"{name}/zero", np.zeros(values.shape), np.int8)
        small = self.op("QuantizeLinear", f"{name}/q", x, shared, zero, **attrs)
        return self.op("DequantizeLinear", f"{name}/dq", small, shared, zero, **attrs)

    def weight(self, name: str, k: int, n: int, sparse: bool = True) -> gs.Variable:
        """A constant [K, N], Q and DQ along its outputs, `NAME/weight/q` and so on."""
        values = seeded(k, n, sparse)
        stored = self.constant(f"{name}/weight", values)
        scale = np.abs(stored.values.astype(np.float32)).max(axis=0) / 127 * 1.001
        return self.pair(f"{name}/weight", stored, scale, axis=1)

    def linear(self, name: str, x: gs.Tensor, k: int, n: int, sparse: bool = True) -> gs.Variable:
        y = self.op("MatMul", f"{name}/MatMul", x, self.weight(name, k, n, sparse))
        return self.op("Add", f"{name}/bias", y, self.constant(f"{name}/b", np.full(n, 0.1)))

    def gelu(self, name: str, x: gs.Tensor) -> gs.Variable:
        half = self.op("Div", f"{name}/div", x, self.constant(f"{name}/sqrt2", 2**0.5))
        one = self.op("Add", f"{name}/add", self.op("Erf", f"{name}/erf", half), self.constant(f"{name}/one", 1.0))
        return self.op("Mul", f"{name}/half", self.op("Mul", f"{name}/mul", x, one), self.constant(f"{name}/.5", 0.5))

    def norm(self, name: str, x: gs.Tensor, size: int) -> gs.Tensor:
        gain = self.constant(f"{name}/gain", np.ones(size), np.float32)
        shift = self.constant(f"{name}/shift", np.zeros(size), np.float32)
        y = self.op("LayerNormalization", f"{name}/norm", self.cast(f"{name}/wide", x, 1), gain, shift, axis=-1)
        return self.cast(f"{name}/narrow", y, 10)

    # ---- breaking

    def node(self, name: str) -> gs.Node:
        return next(node for node in self.graph.nodes if node.name == name)

    def out(self, name: str) -> gs.Tensor:
        return self.node(name).outputs[0]

    def branch(self, tensor: gs.Tensor) -> None:
        """The tensor as one more output."""
        self.graph.outputs.append(tensor)

    def skip(self, name: str) -> None:
        """Let all that reads the pair NAME read what it quantizes."""
        g.rewire(self.graph, self.out(f"{name}/dq"), self.node(f"{name}/q").inputs[0])

    def finished(self) -> gs.Graph:
        g.cleanup(self.graph)
        return g.load(self.graph)


def seeded(k: int, n: int, sparse: bool) -> npt.NDArray[np.float32]:
    """[K, N], no value near zero; with `sparse` two of every four along K are zero."""
    rng = np.random.default_rng(k + n)
    values = rng.choice([-1.0, 1.0], (k, n)) * rng.uniform(0.1, 1.0, (k, n))
    if sparse:
        values[0::4], values[3::4] = 0, 0
    return values.astype(np.float32)


@cache
def _block(version: str, heads: int, length: int | str) -> gs.Graph:
    net, width = Net(version), 256
    size = width // heads
    x = net.cast("enter", net.input("x", ["B", length, width]), 10)
    xq = net.pair("x", x)

    def by_head(name: str, perm: list[int]) -> gs.Tensor:
        y = net.pair(f"{name}/out", net.linear(name, xq, width, width))
        shape = net.constant(f"{name}/shape", [0, 0, heads, size], np.int64)
        return net.op("Transpose", f"{name}/transpose", net.op("Reshape", f"{name}/reshape", y, shape), perm=perm)

    q, k, v = by_head("query", [0, 2, 1, 3]), by_head("key", [0, 2, 3, 1]), by_head("value", [0, 2, 1, 3])
    q = net.op("Mul", "scale", q, net.constant("scale/value", size**-0.5))
    mask = net.cast("mask/narrow", net.input("mask", ["B", 1, 1, length]), 10)
    scores = net.op("Add", "masked", net.op("MatMul", "scores", q, k), mask)
    context = net.op("MatMul", "context", net.op("Softmax", "softmax", scores, axis=-1), v)
    context = net.op("Transpose", "merge", context, perm=[0, 2, 1, 3])
    context = net.op("Reshape", "flat", context, net.constant("flat/shape", [0, 0, width], np.int64))
    y = net.pair("out/out", net.linear("out", net.pair("context/flat", context), width, width))
    y = net.norm("first", net.op("Add", "first/residual", y, x), width)
    up = net.pair("up/out", net.gelu("gelu", net.linear("up", net.pair("y", y), width, 512)))
    down = net.pair("down/out", net.linear("down", up, 512, width))
    last = net.norm("second", net.op("Add", "second/residual", down, y), width)
    net.output(net.cast("leave", last, 1))
    return net.finished()


def block(version: str, heads: int = 4, length: int | str = "S") -> Net:
    """An encoder layer, 2:4 and INT8 throughout, attention's products float. Layers query, key, value, out, up, down;
    pairs x, y, LAYER/weight, LAYER/out, context/flat; norms first and second."""
    return Net(version, g.copy(_block(version, heads, length)))


def int8_attention(net: Net) -> Net:
    """Pairs right before both products."""
    for name, product, index in (("q8", "scores", 0), ("k8", "scores", 1), ("p8", "context", 0), ("v8", "context", 1)):
        node = net.node(product)
        node.inputs[index] = net.pair(name, node.inputs[index])
    return net


def layer(version: str, k: int = 256, n: int = 256, sparse: bool = True, out: bool = True,
          shape: list[object] | None = None) -> Net:  # fmt: skip
    """x -> pair `x` -> linear `one` -> pair `one/out` if `out`."""
    net = Net(version)
    x = net.cast("enter", net.input("x", [*(shape or ["B", "S"]), k]), 10)
    y = net.linear("one", net.pair("x", x), k, n, sparse)
    net.output(net.cast("leave", net.pair("one/out", y) if out else y, 1))
    return net


def conv(version: str) -> Net:
    """A 3x3 convolution `conv` [256, 256] between pairs, its bias a constant."""
    net = Net(version)
    x = net.pair("x", net.cast("enter", net.input("x", ["B", 256, 8, 8]), 10))
    values = seeded(256, 256 * 9, True).T.reshape(256, 3, 3, 256).transpose(0, 3, 1, 2)  # [outputs, inputs, 3, 3]
    stored = net.constant("conv/weight", values)
    scale = np.abs(values).reshape(256, -1).max(axis=1) / 127 * 1.001
    bias = net.constant("conv/b", np.full(256, 0.1))
    y = net.op("Conv", "conv", x, net.pair("conv/weight", stored, scale, axis=0), bias, pads=[1, 1, 1, 1])
    net.output(net.cast("leave", net.pair("out", net.op("Relu", "relu", y)), 1))
    return net


def gemm(version: str, transposed: bool) -> Net:
    """A Gemm `gemm` [256, 256] between pairs, its weight stored as [K, N] or, transposed, as [N, K]."""
    net = Net(version)
    x = net.pair("x", net.cast("enter", net.input("x", ["B", 256]), 10))
    values = seeded(256, 256, True)
    axis = 0 if transposed else 1
    stored = net.constant("gemm/weight", values.T if transposed else values)
    scale = np.abs(values).max(axis=0) / 127 * 1.001
    weight = net.pair("gemm/weight", stored, scale, axis=axis)
    y = net.op("Gemm", "gemm", x, weight, net.constant("gemm/b", np.full(256, 0.1)), transB=int(transposed))
    net.output(net.cast("leave", net.pair("out", y), 1))
    return net
