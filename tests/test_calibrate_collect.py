"""Statistics of a graph's tensors against numpy on the tensors themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest

from nmcompile import ir as graphs
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.errors import CalibrationError

Array = npt.NDArray[Any]

# h and flat are the same values, [batch, seq, 4] and [batch * seq, 4]; log is not finite where x <= 0.
MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[batch,seq,4] x, int64[batch,seq] attention_mask) => (float[batch,seq,4] y)
<float[4,4] w = {1,0,0,1, 0,2,0,0, 0,0,3,0, 1,0,0,4}, int64[2] two = {-1, 4}>
{
   h = MatMul(x, w)
   flat = Reshape(h, two)
   log = Log(x)
   y = Relu(h)
}
"""
W = np.array([[1, 0, 0, 1], [0, 2, 0, 0], [0, 0, 3, 0], [1, 0, 0, 4]], np.float32)


@pytest.fixture
def graph() -> Any:
    return graphs.load(onnx.parser.parse_model(MODEL))


def ragged(count: int = 20) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((rng.integers(2, 6), 4)).astype(np.float32)} for _ in range(count)]


def data(graph: Any, samples: list[dict[str, Any]], batch: int = 8) -> Data:
    return open_data(samples, graphs.inputs(graph), batch=batch)


def test_one_run_serves_all_needs_and_padding_is_left_out(graph: Any) -> None:
    samples = ragged()
    x = np.concatenate([sample["x"] for sample in samples]).astype(np.float64)  # [real tokens, 4]
    h = x @ W
    every = ("range", "histogram", "squares")
    statistics = Calibration(data(graph, samples)).collect(
        graph, {"h": every, "flat": every, "x": ("squares",), "y": ("range",)}
    )
    for name in ("h", "flat"):
        np.testing.assert_allclose(statistics.range(name), (h.min(), h.max()), rtol=1e-5)
        np.testing.assert_allclose(statistics.squares(name), (h**2).sum(0), rtol=1e-5)
        assert statistics.histogram(name).total == h.size
        assert statistics.rows(name) == len(x)
    np.testing.assert_allclose(statistics.squares("x"), (x**2).sum(0), rtol=1e-6)
    assert statistics.range("y")[0] == 0
    assert statistics.count == 20


def test_the_batch_size_changes_nothing(graph: Any) -> None:
    needs = {"h": ("histogram", "squares")}
    one, many = (Calibration(data(graph, ragged(), batch)).collect(graph, needs) for batch in (1, 7))
    np.testing.assert_array_equal(one.histogram("h").counts, many.histogram("h").counts)
    np.testing.assert_allclose(one.squares("h"), many.squares("h"), rtol=1e-12)


def test_progress_counts_samples(graph: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    calibration = Calibration(data(graph, ragged()), progress=lambda *state: seen.append(state))
    calibration.collect(graph, {"h": ("range",)})
    steps = np.diff([0, *(done for _, done, _ in seen)]).tolist()
    assert {total for _, _, total in seen} == {20} and sorted(steps) == [4, 8, 8]


def test_needs_of_inputs_only_run_no_model(graph: Any) -> None:
    statistics = Calibration(data(graph, ragged())).collect(graph, {"x": ("range",)})
    assert statistics.range("x")[0] < 0 < statistics.range("x")[1]


def test_no_needs_no_statistics(graph: Any) -> None:
    assert Calibration(data(graph, ragged())).collect(graph, {}).count == 0


def test_the_graph_is_left_as_it_was(graph: Any) -> None:
    before = [tensor.name for tensor in graph.outputs]
    Calibration(data(graph, ragged())).collect(graph, {"h": ("range",)})
    assert [tensor.name for tensor in graph.outputs] == before


def test_a_tensor_that_is_not_finite_is_named(graph: Any) -> None:
    with pytest.raises(CalibrationError, match="tensor 'log' holds NaN or Inf"):
        Calibration(data(graph, ragged())).collect(graph, {"log": ("range",)})


def test_a_batch_of_padding_only_is_refused(graph: Any) -> None:
    samples = [{"x": np.ones((3, 4)), "attention_mask": [0, 0, 0]}]
    with pytest.raises(CalibrationError, match="'attention_mask' masks every token"):
        Calibration(data(graph, samples)).collect(graph, {"h": ("range",)})


def test_made_up_data_run(graph: Any) -> None:
    made_up = open_data(None, graphs.inputs(graph))
    statistics = Calibration(made_up).collect(graph, {"h": ("range", "histogram", "squares")})
    assert statistics.count == made_up.samples > 0
