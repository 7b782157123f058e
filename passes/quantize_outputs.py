"""QuantizeOutputs: let linear layers hand on eight bits, where their products are faster for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile import sparsity as sp
from nmcompile.contract import Context, Pass, Report
from nmcompile.qdq.pairs import quantized
from nmcompile.qdq.scheme import METHODS, OUTPUTS, Scheme, known

PATTERN = sp.NM(2, 4)
# what a product computes before it rounds: activations, and the parts of a SiLU
EPILOGUE = frozenset({"Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Mul", "Add", "Sub", "Div", "Clip", "LeakyRelu",
                      "HardSwish", "HardSigmoid", "Softplus", "Elu"})  # fmt: skip
COMMUTING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class QuantizeOutputs(Pass):
    """Quantize what quantized linear layers give, behind their activation, symmetric int8 per tensor.

    Add(MatMul(DQ(Q(x)), DQ(W)), b)   ->   DQ(Q(Add(MatMul(DQ(Q(x)), DQ(W)), b)))

    TensorRT takes its sparse INT8 products only where the result is INT8 too (Model-Optimizer pull request 1664).
    layers: sparse, those whose weights are 2:4; all; or none. A layer that only feeds a Q already, also behind its
    activation, is as it should be. Where the pair would leave less than `least_sqnr` dB between a layer's output and
    its rounding error, the layer keeps its float output, with a note.
    """

    layers: str = "sparse"
    clip: str = "min-max"
    percentile: float = 99.99
    least_sqnr: float = 20.0
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: Scheme) -> QuantizeOutputs:
        """The pass of a scheme: no layer reads what it quantizes, so that no error of outputs chooses its ranges."""
        return cls(layers=scheme.outputs, clip=scheme.method)

    @property
    def scheme(self) -> Scheme:
        """The options as a scheme; PassError for one that is not known."""
        known("layers", self.layers, OUTPUTS)
        known("clip", self.clip, METHODS)
        return Scheme(activations="int8", clip=self.clip, percentile=self.percentile, outputs=self.layers,
                      keep=self.exclude)  # fmt: skip

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        scheme = self.scheme
        return {end.name: (*scheme.kinds, "squares") for _, end in _chosen(graph, scheme)}

    def run(self, graph: gs.Graph, context: Context) -> Report:
        found: dict[str, object] = {}
        notes, scheme = [], self.scheme
        for layer, end in _chosen(graph, scheme):
            statistics, name = context.statistics, end.name
            low, high = statistics.clip(name, scheme.method, scheme.percentile, scheme.dtype)
            params = q8.activation_params(low, high, scheme.dtype)
            power = float(np.mean(statistics.squares(name))) / max(statistics.rows(name), 1)
            sqnr = 10 * np.log10(max(power, 1e-30) / (params.scale**2 / 12))  # of uniform rounding errors
            if sqnr < self.least_sqnr:
                notes.append(f"{layer.name}: its output stays float, eight bits would leave {sqnr:.1f} dB; "
                             "TensorRT will likely run it dense")  # fmt: skip
                continue
            _quantize(graph, end, params)
            found[layer.name] = f"scale {params.scale:.6g}, {sqnr:.1f} dB"
        if found:
            g.cleanup(graph)
        return Report(changed=len(found), detail={"outputs": found} if found else {}, notes=tuple(notes))


def _chosen(graph: gs.Graph, scheme: Scheme) -> Iterator[tuple[g.Linear, gs.Tensor]]:
    """Layers, and the ends of what TensorRT computes together with them."""
    for layer in g.linear_layers(graph) if scheme.outputs != "none" else ():
        if not layer.quantized or any(fnmatchcase(layer.name, glob) for glob in scheme.keep):
            continue
        end = _end(graph, layer.y)
        if g.is_output(graph, end) or _only_quantized(end):
            continue
        if scheme.outputs == "all" or is_sparse(layer.weight):
            yield layer, end


def is_sparse(weight: np.ndarray) -> bool:
    """Whether a weight [N, K] is 2:4 along its inputs: of every four in a row, two at least are zero."""
    if weight.shape[1] % PATTERN.m:
        return False
    kept = np.count_nonzero(weight.reshape(weight.shape[0], -1, PATTERN.m), axis=2)
    return bool((kept <= PATTERN.n).all())


def _only_quantized(tensor: gs.Tensor) -> bool:
    """Whether all that reads the tensor is a Q, at once or behind a change of shape."""
    users = g.consumers(tensor)
    return bool(users) and all(
        user.op == "QuantizeLinear" or (user.op in COMMUTING and _only_quantized(user.outputs[0])) for user in users
    )


def _end(graph: gs.Graph, y: gs.Tensor) -> gs.Tensor:
    """The tensor behind the activation of `y`: of what is computed elementwise from y and constants alone, the one
    that everything else reads; y itself where there is no such one."""
    inside, end = {id(y): y}, y
    while True:
        users = [node for t in inside.values() for node in g.consumers(t) if node.op in EPILOGUE]
        reach = [node.outputs[0] for node in users if id(node.outputs[0]) not in inside
                 and all(id(x) in inside or x.is_empty() or g.constant(x) is not None for x in node.inputs)]
        if not reach:
            return end
        inside |= {id(t): t for t in reach}
        read = [t for t in inside.values() if g.is_output(graph, t)
                or any(id(node.outputs[0]) not in inside for node in g.consumers(t))]  # fmt: skip
        end = read[0] if len(read) == 1 else end


def _quantize(graph: gs.Graph, tensor: gs.Tensor, params: q8.QuantParams) -> None:
    readers = g.consumers(tensor)
    wide = quantized(graph, tensor, params)
    for node in readers:
        node.inputs = [wide if t is tensor else t for t in node.inputs]
