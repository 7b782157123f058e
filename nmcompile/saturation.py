"""Whether onnxruntime's 8-bit products saturate on this CPU: asked of onnxruntime, not read off the CPU's features."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from nmcompile.ort_options import session_options

INPUTS, OUTPUTS = 64, 32  # several vectors of any CPU


@cache
def saturates(*, exact: bool = False) -> bool:
    """Whether a u8 x s8 product of the largest values comes out too small: in a session as onnxruntime opens it by
    itself, or `exact`, as nmcompile opens it (nmcompile.ort_options)."""
    options = session_options() if exact else ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(_product().SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((1, INPUTS), 255, np.uint8)})[0]
    return bool((np.asarray(found) != INPUTS * 255 * 127).any())


def _product() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.full((INPUTS, OUTPUTS), 127, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, OUTPUTS])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
