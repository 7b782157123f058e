"""Placement and ranges first, rounding last: what stands between, and that nothing changes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse
from pruning_cases import DOWN, HEAD, MODEL, POOLER, SHARED, UP, calibrated

from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.calibrate import Calibration, open_data
from nmcompile.errors import PassError
from nmcompile.passes import InsertQdq
from nmcompile.pipeline import Pipeline
from nmcompile.qdq import output_error
from nmcompile.qdq.placed import Placed, placed, rounded
from nmcompile.qdq.placement import needs, place
from nmcompile.qdq.scheme import CPU, TENSORRT, Scheme
from nmcompile.recipes import canonical_passes

BERT = Path(__file__).resolve().parent.parent / "models" / "bert-torchscript.onnx"
SCHEMES = {
    "cpu": replace(CPU, clip="output", bias=True),
    "cpu 7 bits": replace(CPU, weight_bits=7, attention="float"),
    "tensorrt": replace(TENSORRT, clip="output", bias=True),
    "tensorrt int8": replace(TENSORRT, attention="int8", clip="mse"),
}


def feeds(graph: gs.Graph) -> list[dict[str, np.ndarray]]:
    dims = {dim: 4 for info in g.inputs(graph) for dim in info.shape if isinstance(dim, str)}
    return [g.random_feeds(g.inputs(graph), seed, dims) for seed in (5, 6)]


def prepared(graph: gs.Graph, scheme: Scheme) -> Placed:
    """The graph with its pairs placed, by statistics of two seeded batches."""
    calibration = Calibration(open_data(feeds(graph), g.inputs(graph)))
    return placed(graph, scheme, calibration.collect(graph, needs(place(graph, scheme), scheme)))


@pytest.fixture(scope="module")
def bert() -> gs.Graph:
    return Pipeline(canonical_passes()).run(g.load(BERT))[0]


def assert_same_bits(a: gs.Graph, b: gs.Graph, source: gs.Graph) -> None:
    for feed in feeds(source):
        for name, values in g.run(a, feed).items():
            np.testing.assert_array_equal(g.run(b, feed)[name].view(np.uint32), values.view(np.uint32))


def rounds_weights(graph: gs.Graph) -> list[np.ndarray]:
    """The constants behind a QuantizeLinear."""
    values = [g.constant(node.inputs[0]) for node in graph.nodes if node.op == "QuantizeLinear"]
    return [value for value in values if value is not None]


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_changes_no_bit_of_the_outputs(name: str, bert: gs.Graph) -> None:
    before = g.to_text(bert)
    found = prepared(bert, SCHEMES[name])
    weights = rounds_weights(found.graph)
    assert len(weights) == len(found.layers) > 0 and all(weight.dtype == np.float32 for weight in weights)
    middle = g.to_text(found.graph)
    after = rounded(found)
    assert_same_bits(found.graph, after, bert)
    assert not rounds_weights(after)
    assert g.to_text(bert) == before and g.to_text(found.graph) == middle


@pytest.mark.parametrize("name", SCHEMES)
def test_the_pass_is_both_steps(name: str, bert: gs.Graph) -> None:
    scheme = SCHEMES[name]
    calibration = Calibration(open_data(feeds(bert), g.inputs(bert)))
    by_pass, _ = Pipeline([InsertQdq.of(scheme)], calibration=calibration).run(bert)
    taken = replace(scheme, softmax=scheme.softmax and scheme.attention == "int8")
    assert g.to_model(rounded(prepared(bert, taken))).SerializeToString() == g.to_model(by_pass).SerializeToString()


def test_ranges_and_scales_are_known_by_layer() -> None:
    graph = parse(MODEL)
    found = prepared(graph, Scheme(bias=True))
    assert list(found.layers) == [UP, DOWN] and set(found.kept) == {POOLER, HEAD}
    constants = found.graph.tensors()
    for layer in g.linear_layers(graph):
        if layer.name not in found.layers:
            continue
        known = found.layers[layer.name]
        np.testing.assert_array_equal(constants[known.weight].values, layer.weight.T)
        np.testing.assert_array_equal(known.scales, q8.weight_scales(layer.weight))
        (site,) = [site for site in found.sites if layer.name in site.readers]
        assert (site.tensor, site.params) == (layer.x.name, known.activation)
        assert known.levels == 127 and known.activation.dtype == "uint8"


def test_weights_that_training_moved_are_rounded_at_the_placed_scales() -> None:
    graph = parse(MODEL)
    found = prepared(graph, Scheme(clip="output"))  # which has rounded the weights of before
    assert found.integers
    layer, weight = found.layers[UP], found.graph.tensors()[found.layers[UP].weight]
    weight.values = np.asarray(weight.values * np.float32(1.5))  # beyond the levels too
    (after,) = [item for item in g.linear_layers(rounded(found)) if item.name == UP]
    levels = np.clip(np.rint(weight.values.T / layer.scales[:, None]), -127, 127)
    assert np.abs(levels).max() == 127
    np.testing.assert_array_equal(after.weight, (levels * layer.scales[:, None]).astype(np.float32))


def test_a_weight_without_its_pair_is_an_error() -> None:
    found = prepared(parse(MODEL), Scheme())
    pair = next(node for node in found.graph.nodes if node.name == found.layers[UP].quantizer)
    pair.name = "other"
    with pytest.raises(PassError, match=f"layer '{UP}': its weight no longer stands behind .* round the graph"):
        rounded(found)


def test_a_shared_weight_has_one_pair() -> None:
    graph = parse(SHARED)
    found = prepared(graph, Scheme(clip="output"))
    first, second = found.layers.values()
    assert first.quantizer == second.quantizer and first.activation != second.activation
    assert_same_bits(found.graph, rounded(found), graph)


@pytest.mark.parametrize(("text", "shapes"), [(MODEL, [(16, 8), (8, 16)]), (SHARED, [(8, 8)])])
def test_a_weight_is_rounded_once(text: str, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For its ranges, its biases and the graph together."""
    seen: list[tuple[int, ...]] = []
    real = q8.round_weight

    def counted(weight: np.ndarray, scales: np.ndarray, levels: int) -> np.ndarray:
        seen.append(weight.shape)
        return real(weight, scales, levels)

    monkeypatch.setattr(q8, "round_weight", counted)
    calibrated(InsertQdq(clip="output", bias=True), parse(text))
    assert seen == shapes


def test_a_least_scale_holds_where_a_range_rounded_without_it() -> None:
    graph = parse(MODEL)
    found = prepared(graph, Scheme(clip="output", least_scale=1e3))
    assert not found.integers and all((layer.scales == 1e3).all() for layer in found.layers.values())
    assert_same_bits(found.graph, rounded(found), graph)


def test_the_trial_of_least_error_is_taken_and_the_first_of_equals() -> None:
    random = np.random.default_rng(0)
    x, weights = random.standard_normal((20, 8)).astype(np.float32), [random.standard_normal((6, 8), np.float32)] * 3
    sample = output_error.Sample.of(x, weights, weights)
    ways = [q8.activation_params(-reach, reach, "int8") for reach in (9.0, 3.5, 0.5, 3.5)]
    errors = [sum(float(np.sum((q8.rounded(x, way) @ w.T - x @ w.T) ** 2) / np.sum((x @ w.T) ** 2)) for w in weights)
              for way in ways]  # fmt: skip
    best = output_error.best_trial(sample, ways)
    assert best.params is ways[int(np.argmin(errors))] and best.error == pytest.approx(min(errors), rel=1e-4)
    assert sample.trial(ways[0], best.error) is None  # given up before all layers are computed


def test_data_are_asked_for() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        placed(parse(MODEL), Scheme(), None)


def test_a_weight_that_was_written_to_in_place_is_rounded_as_it_is_now() -> None:
    graph = parse(MODEL)
    for layer in g.linear_layers(graph):
        g.set_weight(graph, layer, np.array(layer.weight))  # which may be written to
    found = prepared(graph, Scheme(clip="output"))
    assert found.integers  # they are of the weights as they were
    before = [t.values.copy() for t in rounded(found).tensors().values() if isinstance(t, gs.Constant)]
    for node in found.graph.nodes:
        if node.op == "QuantizeLinear" and isinstance(node.inputs[0], gs.Constant):
            np.negative(node.inputs[0].values, out=node.inputs[0].values)
    after = [t.values for t in rounded(found).tensors().values() if isinstance(t, gs.Constant)]
    weights = [(a, b) for a, b in zip(before, after, strict=True) if a.dtype == np.int8 and a.ndim == 2]
    assert weights and all(np.array_equal(a, -b) and a.any() for a, b in weights)
    assert_same_bits(found.graph, rounded(found), found.graph)
