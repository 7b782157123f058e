"""Rules Q1 to Q11: what QuantizeLinear and DequantizeLinear must look like to be imported."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.findings import Hit, Rule, Subject
from nmcompile.backends.tensorrt.operators import INTEGER
from nmcompile.backends.tensorrt.walk import DQ, Q

LEAST_NORMAL_HALF = 6.1e-5  # below it FP16 loses digits
HALVES = ("float16", "bfloat16")
SMALL_TYPES = ("int8", "float8_e4m3fn")  # what Q may make


def _bias(node: gs.Node) -> bool:
    """A DQ of INT32: the bias of an integer product, rule Q9's matter."""
    return node.op == DQ and walk.kind(node.inputs[0]) == "int32"


def _symmetric(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(Q, DQ):
        if _bias(node):
            continue
        data = walk.kind(node.inputs[0])
        zero = walk.given(node, 2)
        if node.op == DQ and zero is None and walk.quantized(node) is None and data not in (*SMALL_TYPES, None):
            yield Hit(node.name, f"it dequantizes {data}")
        elif zero is None:
            if node.op == Q and not subject.profile.zero_points and not node.attrs.get("output_dtype"):
                what = "without a zero point ONNX reads its result as UINT8, TensorRT as INT8"
                yield Hit(node.name, what, level="warning")
        else:
            values, kind = walk.fixed(zero), walk.kind(zero)
            if values is None:
                yield Hit(node.name, f"its zero point '{zero.name}' is computed")
            elif kind not in SMALL_TYPES:
                yield Hit(node.name, f"its zero point '{zero.name}' is {kind}")
            elif values.astype(np.float32).any():
                yield Hit(node.name, f"its zero point '{zero.name}' is not all zeros")


def _zero_points(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(Q, DQ):
        zero, scale = walk.given(node, 2), walk.fixed(node.inputs[1])
        values = None if zero is None else walk.fixed(zero)
        if zero is None and subject.profile.zero_points:
            yield Hit(node.name, "it has no zero point")
        elif values is not None and scale is not None and values.size != scale.size:
            yield Hit(node.name, f"{values.size} zero points do not fit {scale.size} scales")


def _scales(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(Q, DQ):
        tensor = node.inputs[1]
        scale, kind = walk.fixed(tensor), walk.kind(tensor)
        where = f"its scale '{tensor.name}'"
        if scale is None:
            yield Hit(node.name, f"{where} is computed")
            continue
        values = scale.astype(np.float32)
        if kind not in subject.profile.scales:
            yield Hit(node.name, f"{where} is {kind}", f"store it as {' or '.join(subject.profile.scales)}")
        elif scale.ndim > 1:
            yield Hit(node.name, f"{where} has the shape {list(scale.shape)}", "make it a scalar or one-dimensional")
        elif not (np.isfinite(values).all() and (values > 0).all()):
            yield Hit(node.name, f"{where} holds values that are not finite and above 0")
        elif kind == "float16" and values.min() < LEAST_NORMAL_HALF:
            remedy = "quantize in FP32 there, between Casts"
            yield Hit(node.name, f"{where} holds {values.min():.2g}, which FP16 rounds", remedy, "warning")


def _per_tensor(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(Q, DQ):
        scale = walk.fixed(node.inputs[1])
        if scale is None or scale.size == 1 or scale.ndim > 1:
            continue
        shape = node.inputs[0].shape
        axis = walk.axis_of(node, len(shape) if shape is not None else 0)
        if not walk.rooted(node.inputs[0]):
            yield Hit(node.name, f"it quantizes an activation by {scale.size} scales", "give it one scale")
        elif shape is not None and (axis >= len(shape) or shape[axis] != scale.size):
            what = f"{scale.size} scales do not fit axis {axis} of {list(shape)}"
            yield Hit(node.name, what, "give one scale for each output channel")


def _range(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if gemm.weight.clipped:
            yield Hit(gemm.name, f"{gemm.weight.clipped} of its weights round to values beyond +-127")


def _scalar(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(Q, DQ):
        if node.inputs[0].shape is not None and len(node.inputs[0].shape) == 0:
            yield Hit(node.name, f"its data '{node.inputs[0].name}' is a scalar")


def _integer_operators(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(*INTEGER):
        yield Hit(node.name, f"TensorRT {subject.profile.name} does not import {node.op}")


def _typed_scales(subject: Subject) -> Iterator[Hit]:
    old = (subject.graph.opset or 0) < 19
    for node in subject.of(Q, DQ):
        data, scale = walk.kind(node.inputs[0]), walk.kind(node.inputs[1])
        if old and (scale in HALVES or (node.op == Q and data in HALVES)):
            what = f"opset {subject.graph.opset} has no FP16 in {node.op}"
            yield Hit(node.name, what, f"write the graph at opset {subject.profile.opset}")
        elif not old and node.op == Q and data is not None and scale is not None and data != scale:
            yield Hit(node.name, f"it takes {data} with a scale of {scale}")


def _conv_bias(subject: Subject) -> Iterator[Hit]:
    for node in subject.of(DQ):
        if _bias(node):
            yield Hit(node.name, f"it dequantizes an INT32 bias, '{node.inputs[0].name}'")
    for node in subject.of("Conv", "ConvTranspose"):
        bias = walk.given(node, 2)
        if bias is None:
            continue
        values, maker = g.constant(bias), g.producer(bias)
        if values is None and not (maker is not None and _bias(maker)):
            yield Hit(node.name, f"its bias '{bias.name}' is computed")
        elif values is not None and (values.ndim != 1 or walk.kind(bias) not in ("float32", *HALVES)):
            yield Hit(node.name, f"its bias '{bias.name}' is {walk.kind(bias)}{list(values.shape)}")


def _weight_storage(subject: Subject) -> Iterator[Hit]:
    profile = subject.profile
    for node in subject.of(Q, DQ):
        stored = walk.behind(node.inputs[0], walk.CARRIES)
        if not isinstance(stored, gs.Constant) or _bias(node):
            continue
        if node.op == DQ and not profile.int8_weights:
            yield Hit(node.name, f"it reads the {walk.kind(stored)} constant '{stored.name}'")
        elif node.op == DQ:
            what = f"whether the INT8 constant '{stored.name}' keeps its 2:4 eligibility is not documented"
            yield Hit(node.name, what, "look for the layer in the build log, or store it as float -> Q -> DQ", "note")
        elif walk.kind(stored) not in profile.scales:
            remedy = f"store it as {' or '.join(profile.scales)}"
            yield Hit(node.name, f"it quantizes the {walk.kind(stored)} constant '{stored.name}'", remedy)


def _output_scales(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if not gemm.weight.follows:
            yield Hit(gemm.name, "the scales of its weight do not run along its output channels")
        elif (subject.profile.name == "8.6" and gemm.node.op == "MatMul" and gemm.weight.dequantize is not None
              and gemm.x.shape is not None and len(gemm.x.shape) != 2):  # fmt: skip
            what = f"per-channel scales are documented for 2-D inputs, this one has {len(gemm.x.shape)} dimensions"
            yield Hit(gemm.name, what, "see in the build log that the layer is INT8", "note")


RULES = (
    Rule("Q1", "quantization is symmetric INT8", "error",
         "NvInfer.h, IQuantizeLayer; onnx-tensorrt, QuantDequantLinearHelper",
         "give Q and DQ the constant INT8 zero point 0", _symmetric),
    Rule("Q2", "zero points are there and as many as scales", "error", "onnx-tensorrt 8.6-GA, QuantDequantLinearHelper",
         "give Q and DQ a zero point of the shape of their scale", _zero_points),
    Rule("Q3", "scales are positive constants of a type that is read", "error",
         "NvInfer.h, IQuantizeLayer; onnx-tensorrt 8.6-GA and 10.1-GA, QuantDequantLinearHelper",
         "make it a finite constant above 0", _scales),
    Rule("Q4", "activations have one scale, weights one per output channel", "error", "NvInfer.h, IQuantizeLayer",
         "quantize activations per tensor", _per_tensor),
    Rule("Q5", "weights stay within +-127", "warning", "TensorRT developer guide, quantization range",
         "take scales of max |w| / 127", _range),
    Rule("Q6", "Q and DQ take no scalars", "error", "NvInfer.h 11, IQuantizeLayer", "give the tensor one dimension",
         _scalar),
    Rule("Q7", "no integer operators from before Q/DQ", "error", "onnx-tensorrt, docs/operators.md",
         "express it by Q, DQ and the float operator", _integer_operators),
    Rule("Q8", "Q's scale has the type of its data", "error",
         "NvInfer.h, IQuantizeLayer; onnx-tensorrt 10.1-GA, QuantDequantLinearHelper",
         "store the scale in the type of the data, or Cast the data", _typed_scales, ("10", "11")),
    Rule("Q9", "biases of convolutions are float constants", "error", "onnx-tensorrt, Conv; onnxruntime issue 11535",
         "keep the bias a one-dimensional float initializer (QuantizeBias=False)", _conv_bias),
    Rule("Q10", "weights are stored in a type that Q or DQ takes", "error",
         "TensorRT developer guide 8.5 and 11, explicit quantization",
         "store the float weight and put Q and DQ behind it", _weight_storage),
    Rule("Q11", "weight scales run along the output channels", "error",
         "TensorRT developer guide 8.5, Q/DQ; TensorRT issue 1604",
         "quantize along axis 1 of a [K, N] weight, axis 0 of [N, K] and of a Conv's", _output_scales),
)  # fmt: skip
