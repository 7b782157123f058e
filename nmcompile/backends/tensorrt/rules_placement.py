"""Rules P1 to P6: Q/DQ pairs stand where TensorRT fuses them, and types are those it computes with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.attention import fused_attentions
from nmcompile.backends.tensorrt.findings import Hit, Rule, Subject
from nmcompile.backends.tensorrt.gemms import after_bias
from nmcompile.backends.tensorrt.walk import DQ, Q

ACTIVATIONS = frozenset({"Relu", "Gelu", "Tanh", "Sigmoid", "Erf", "HardSwish", "LeakyRelu", "Elu", "Selu", "Mish"})
CURVES = frozenset({"Erf", "Tanh", "Sigmoid"})  # what the composed GELU and SiLU are made of
NORMALISATIONS = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization"})
# Operators that take INT8 in and give INT8 out, or join a product that does.
FUSIBLE = ACTIVATIONS | walk.CARRIES | {
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Mul", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat",
    "Slice", "Split", "Resize", "Pad", "Clip", "Expand",
}  # fmt: skip
FUSED_HEADS = (16, 32, 64)  # head sizes of INT8 fused attention
LONGEST = 512  # tokens of INT8 fused attention
INT32 = np.iinfo(np.int32)


def _shared(subject: Subject) -> Iterator[Hit]:
    sources: dict[int, list[gs.Node]] = {}
    for node in subject.of(Q):
        source = walk.behind(node.inputs[0], frozenset({"Identity"}))
        if not isinstance(source, gs.Constant):
            sources.setdefault(id(source), []).append(node)
    for first, *others in sources.values():
        for node in others:
            yield Hit(node.name, f"'{node.inputs[0].name}' is quantized by node '{first.name}' already")


def _inside_epilogue(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        y, biased = gemm.node.outputs[0], after_bias(gemm)
        pairs = [(y, pair) for pair in walk.readers(y, Q)]
        pairs += [(biased, pair) for pair in walk.readers(biased, Q) if biased is not y]
        for source, pair in pairs:
            for dequantize in walk.readers(pair.outputs[0], DQ):
                for node in g.consumers(dequantize.outputs[0]):
                    if source is y and _adds_constant(node):
                        yield Hit(pair.name, f"it stands between '{gemm.name}' and its bias '{node.name}'")
                    elif _starts_activation(node):
                        yield Hit(pair.name, f"it stands between '{gemm.name}' and its activation '{node.name}'")


def _adds_constant(node: gs.Node) -> bool:
    return node.op == "Add" and any(walk.rooted(tensor) for tensor in node.inputs)


def _starts_activation(node: gs.Node) -> bool:
    """An activation, or the first node of a composed one: x / sqrt(2) -> Erf, x^3 -> ... -> Tanh."""
    if node.op in ACTIVATIONS or node.op == "Pow":
        return True
    if node.op not in ("Mul", "Div") or not any(walk.rooted(tensor) for tensor in node.inputs):
        return False
    return any(user.op in CURVES for user in g.consumers(node.outputs[0]))


def _attention(subject: Subject) -> Iterator[Hit]:
    for found in fused_attentions(subject.graph):
        bare = [name for name, paired in found.pairs if not paired]
        size, length = found.head_size, found.length
        if len(bare) == len(found.pairs):
            if size is not None and not (16 <= size <= 256 and size % 8 == 0):
                what = f"heads of {size} are not fused in FP16, which takes multiples of 8 from 16 to 256"
                yield Hit(found.softmax.name, what, "expect separate products and Softmax", "note")
        elif bare:
            yield Hit(found.softmax.name, f"attention is INT8 in part: no Q/DQ pair right before {', '.join(bare)}")
        elif not found.int8_out:
            yield Hit(found.softmax.name, "attention is INT8, but for the result of its second product")
        elif size is not None and size not in FUSED_HEADS:
            yield Hit(found.softmax.name, f"INT8 attention with heads of {size}, not 16, 32 or 64, is not fused")
        elif length is not None and length > LONGEST:
            yield Hit(found.softmax.name, f"INT8 attention over {length} tokens, more than {LONGEST}, is not fused")


def _stranded(subject: Subject) -> Iterator[Hit]:
    for node in subject.nodes:
        if node.op in FUSIBLE | NORMALISATIONS | {Q, DQ, "Softmax", "Gather"} or not node.outputs:
            continue
        data = [tensor for tensor in node.inputs if not tensor.is_empty() and not walk.rooted(tensor)]
        makers = [g.producer(tensor) for tensor in data]
        if not data or any(maker is None or maker.op != DQ for maker in makers):
            continue
        users = [user for tensor in node.outputs for user in g.consumers(tensor)]
        if users and all(user.op == Q for user in users) and not g.is_output(subject.graph, node.outputs[0]):
            yield Hit(node.name, f"{node.op} computes in float between DQ and Q")


def _float_parts(subject: Subject) -> Iterator[Hit]:
    chosen = {id(after_bias(gemm)) for gemm in subject.gemms if gemm.weight.pattern}  # INT8 out, for rule S5
    for node in subject.of(*NORMALISATIONS, "Softmax"):
        for index, tensor in enumerate(node.inputs):
            dequantize = walk.dequantized(tensor)
            pair = walk.quantized(dequantize) if dequantize is not None else None
            epilogue = pair is not None and id(walk.behind(pair.inputs[0], walk.CARRIES)) in chosen
            if dequantize is not None and not (index == 0 and epilogue):
                yield Hit(node.name, f"input '{tensor.name}' of {node.op} is quantized")
    for node in subject.of("Gather"):
        if walk.dequantized(node.inputs[0]) is not None and walk.rooted(node.inputs[0]):
            yield Hit(node.name, f"the table '{node.inputs[0].name}' is quantized")
    for gemm in subject.gemms:
        biases = [(gemm.node, gemm.node.inputs[2])] if gemm.node.op == "Gemm" and walk.given(gemm.node, 2) else []
        for user in g.consumers(gemm.node.outputs[0]):
            if user.op == "Add":
                biases += [(user, tensor) for tensor in user.inputs if walk.rooted(tensor)]
        for reader, bias in biases:
            if walk.dequantized(bias) is not None:
                yield Hit(reader.name, f"the bias '{bias.name}' of '{gemm.name}' is quantized")


def _wide_types(subject: Subject) -> Iterator[Hit]:
    graph = subject.graph
    for tensor in [*graph.inputs, *graph.outputs]:
        if walk.kind(tensor) == "int64" and not subject.profile.int64:
            what = f"'{tensor.name}' is INT64, the engine takes and gives INT32"
            yield Hit(f"tensor {tensor.name}", what, "feed and read it as INT32", "note")
    for tensor in graph.inputs:
        if walk.kind(tensor) == "float64":
            yield Hit(f"input {tensor.name}", f"'{tensor.name}' is FP64, which TensorRT narrows to FP32")
    for node in subject.nodes:
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant):
                continue
            if walk.kind(tensor) == "float64":
                yield Hit(node.name, f"the constant '{tensor.name}' is FP64, which TensorRT narrows to FP32")
            elif walk.kind(tensor) == "int64" and not subject.profile.int64 and not (node.op == "Slice" and index == 2):
                values = np.asarray(tensor.values)  # the end of a Slice is often the largest integer: cut, it means it
                if values.size and (values.max() > INT32.max or values.min() < INT32.min):
                    yield Hit(node.name, f"the constant '{tensor.name}' holds integers beyond 32 bits, which are cut")
        for tensor in node.outputs:
            made = g.producer(tensor) is not None and all(walk.kind(t) != "float64" for t in node.inputs)
            if walk.kind(tensor) == "float64" and made:
                yield Hit(node.name, f"its result '{tensor.name}' is FP64, which TensorRT narrows to FP32")


_GUIDE = "TensorRT developer guide, Q/DQ layer-placement recommendations"

RULES = (
    Rule("P1", "a tensor is quantized once", "warning", f"{_GUIDE}; products that share a Q are merged",
         "let all its readers share one Q and its scale", _shared),
    Rule("P2", "no Q/DQ pair between product, bias and activation", "warning", f"{_GUIDE}; TensorRT issue 3127",
         "move the pair behind the activation", _inside_epilogue),
    Rule("P3", "attention is INT8 as a whole, or not at all", "warning", "TensorRT issues 2981, 3243, 3714 and 4167",
         "put pairs before both products' operands and behind the second, or none: it runs slower than FP16 otherwise",
         _attention),
    Rule("P4", "no float operator alone between DQ and Q", "warning", f"{_GUIDE}; TensorRT issue 3147",
         "take the pairs around it out", _stranded),
    Rule("P5", "biases, normalisations, Softmax and embeddings stay float", "warning", f"{_GUIDE}; TensorRT issue 4084",
         "let it read the float tensor", _float_parts),
    Rule("P6", "no element type that the engine narrows", "warning", "onnx-tensorrt, docs/operators.md",
         "Cast to FP32 or INT32 in the model", _wide_types),
)  # fmt: skip
