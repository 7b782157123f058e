"""read_pair: quantize/dequantize pairs mean what the standard says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from nmcompile import ir as g

INT8, INT16, FLOAT8 = (int(getattr(onnx.TensorProto, name)) for name in ("INT8", "INT16", "FLOAT8E4M3FN"))


def pair(zero: np.ndarray | None = None, again: np.ndarray | None = None, scales: tuple[float, float] = (0.5, 0.5),
         **attrs: object) -> gs.Tensor:  # fmt: skip
    x = gs.Variable("x", np.dtype(np.float32), ["B", 4])
    small, wide = gs.Variable("q"), gs.Variable("y", np.dtype(np.float32))
    zeros = [[] if z is None else [gs.Constant(f"z{i}", z)] for i, z in enumerate((zero, again))]
    first, second = (gs.Constant(f"s{i}", np.array(s, np.float32)) for i, s in enumerate(scales))
    gs.Node("QuantizeLinear", "q", attrs, [x, first, *zeros[0]], [small])
    gs.Node("DequantizeLinear", "d", {}, [small, second, *zeros[1]], [wide])
    return wide


def test_zero_points() -> None:
    eight = np.array(3, np.int8)
    assert g.read_pair(pair(eight, eight)) == g.Pair(g.read_pair(pair(eight, eight)).x, 0.5, 3, True)  # type: ignore[union-attr]
    unsigned = g.read_pair(pair(np.array([128], np.uint8), np.array([128], np.uint8)))
    assert unsigned is not None and (unsigned.zero, unsigned.signed) == (128, False)


@pytest.mark.parametrize(("attrs", "signed"), [({}, False), ({"output_dtype": INT8}, True)])
def test_no_zero_point_is_0_of_the_type_that_is_given(attrs: dict[str, Any], signed: bool) -> None:
    """Taken for uint8 whatever output_dtype says, every negative value became 0."""
    found = g.read_pair(pair(**attrs))
    assert found is not None and (found.zero, found.signed) == (0, signed)


@pytest.mark.parametrize(
    "other",
    [
        pair(output_dtype=INT16),
        pair(output_dtype=FLOAT8),
        pair(np.array(0, np.int16), np.array(0, np.int16)),
        pair(np.array(1, np.int8), np.array(2, np.int8)),
        pair(scales=(0.5, 0.25)),
        pair(block_size=2),
        pair(np.zeros(4, np.int8), np.zeros(4, np.int8)),
    ],
    ids=["int16", "float8", "int16 zero", "zeros differ", "scales differ", "blocks", "per channel"],
)
def test_others_are_none(other: gs.Tensor) -> None:
    assert g.read_pair(other) is None
