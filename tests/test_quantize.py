"""Quantization against three-line formulas and the ONNX reference operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.helper as oh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from nmcompile.errors import InputError
from nmcompile.quantize import (
    QuantType,
    activation_params,
    dequantize,
    quantize,
    quantize_weight,
    weight_scales,
)

Array = npt.NDArray[Any]
FINITE = st.floats(-1e6, 1e6, width=32)
WEIGHTS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=FINITE)
TYPES: tuple[QuantType, ...] = ("uint8", "int8")


@given(WEIGHTS)
def test_a_weight_is_within_half_a_step_of_its_quantized_self(weight: Array) -> None:
    q, scales = quantize_weight(weight)
    assert q.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == weight.shape[:1]
    assert int(np.abs(q.astype(int)).max()) <= 127 and (scales > 0).all()
    np.testing.assert_array_equal(q[weight == 0], 0)
    error = np.abs(q * scales[:, None].astype(np.float64) - weight)
    assert (error <= scales[:, None] * 0.5001).all()


def test_the_largest_weight_of_a_row_is_127_and_a_zero_row_has_scale_1() -> None:
    weight = np.array([[1, -2, 0.5], [0, 0, 0], [-3, 3, 1e-3]], np.float32)
    q, scales = quantize_weight(weight)
    np.testing.assert_array_equal(scales, np.array([2 / 127, 1, 3 / 127], np.float32))
    np.testing.assert_array_equal(q, [[64, -127, 32], [0, 0, 0], [-127, 127, 0]])
    assert weight_scales(np.array([[1e-44]], np.float32))[0] >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="output 1"):
        weight_scales(np.array([[1.0, 2.0], [1.0, value]]))


@given(FINITE, FINITE)
def test_uint8_holds_its_range_and_an_exact_zero(a: float, b: float) -> None:
    lo, hi = min(a, b), max(a, b)
    params = activation_params(lo, hi, "uint8")
    assert 0 <= params.zero_point <= 255 and params.scale > 0
    assert params.scale == float(np.float32(params.scale))
    x = np.linspace(min(lo, 0.0), max(hi, 0.0), 33)
    back = dequantize(quantize(x, params.scale, params.zero_point, "uint8"), params.scale, params.zero_point)
    assert np.abs(back - x).max() <= params.scale * 1.001  # half a step of rounding, half of the zero point
    assert quantize(np.zeros(1), params.scale, params.zero_point, "uint8")[0] == params.zero_point


@given(FINITE, FINITE)
def test_int8_is_symmetric(a: float, b: float) -> None:
    params = activation_params(min(a, b), max(a, b), "int8")
    largest = max(abs(a), abs(b))
    assert params.zero_point == 0
    assert params.scale == pytest.approx(largest / 127 if largest else 1.0, rel=1e-6, abs=1e-37)


def test_an_empty_range_has_scale_1_and_a_wrong_one_is_refused() -> None:
    assert activation_params(0, 0, "uint8").scale == 1
    for lo, hi in [(1.0, -1.0), (0.0, np.inf), (np.nan, 1.0)]:
        with pytest.raises(InputError, match="not a range"):
            activation_params(lo, hi, "uint8")
    with pytest.raises(InputError, match="use uint8 or int8"):
        activation_params(0, 1, "int4")  # type: ignore[arg-type]


def test_rounding_is_half_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300, np.inf], np.float32)
    np.testing.assert_array_equal(quantize(x, 1.0, 0, "int8"), [0, 2, 2, 0, -2, 127, -128, 127])
    np.testing.assert_array_equal(quantize(x, 1.0, 10, "uint8"), [10, 12, 12, 10, 8, 255, 0, 255])


@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_and_dequantize_agree_with_onnx(dtype: QuantType) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 32)).astype(np.float32) * 3
    params = activation_params(-2.5, 4.0, dtype)
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.INT8
    graph = oh.make_graph(
        [
            oh.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            oh.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [oh.make_tensor_value_info("x", TensorProto.FLOAT, [16, 32])],
        [
            oh.make_tensor_value_info("q", kind, [16, 32]),
            oh.make_tensor_value_info("y", TensorProto.FLOAT, [16, 32]),
        ],
        [
            oh.make_tensor("s", TensorProto.FLOAT, [], [params.scale]),
            oh.make_tensor("z", kind, [], [params.zero_point]),
        ],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)])
    expected_q, expected_y = ReferenceEvaluator(model).run(None, {"x": x})
    q = quantize(x, params.scale, params.zero_point, dtype)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(dequantize(q, params.scale, params.zero_point), expected_y)


def test_scales_broadcast_per_channel() -> None:
    x = np.array([[1.0, 2.0], [10.0, 20.0]], np.float32)
    scale = np.array([[1.0], [10.0]], np.float32)
    q = quantize(x, scale, np.array([[0], [1]]), "int8")
    np.testing.assert_array_equal(q, [[1, 2], [2, 3]])
    np.testing.assert_array_equal(dequantize(q, scale, np.array([[0], [1]])), x)
