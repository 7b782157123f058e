"""What pruning did to each layer, as values, and layers that go back to what they were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse
from pruning_cases import DOWN, MODEL, SHARED, UP, calibrated, weights

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.contract import Context, Report
from nmcompile.errors import PassError
from nmcompile.pipeline import Pass, Pipeline
from nmcompile.prune import Records, completed, joined, undone
from nmcompile.recipes import canonical_passes
from nmcompile.spec import parse_spec

BERT = Path(__file__).parent.parent / "models" / "bert-torchscript.onnx"


@dataclass(frozen=True)
class Case:
    """A small BERT, pruned by a solver that moves weights, biases and normalisations."""

    dense: gs.Graph
    pruned: gs.Graph
    records: Records
    data: Data


def records_of(reports: tuple[Report, ...]) -> Records:
    return joined(report.records for report in reports)


@pytest.fixture(scope="module")
def case() -> Case:
    dense, _ = Pipeline(canonical_passes()).run(g.load(BERT))
    rng = np.random.default_rng(0)
    samples = ({"input_ids": rng.integers(5, 200, rng.integers(6, 24))} for _ in range(24))
    data = open_data(samples, g.inputs(dense))
    passes = parse_spec("prune(solver=obs, damping=0.05, sparsity=0.7, layers=*layer.0*:2:4)")
    pruned, reports = Pipeline(passes, calibration=Calibration(data)).run(dense)
    return Case(dense, pruned, records_of(reports), data)


def norms(graph: gs.Graph) -> Iterator[tuple[str, bytes]]:
    for node in graph.nodes:
        if node.op == "LayerNormalization":
            values = [g.constant(operand) for operand in node.inputs[1:3]]
            yield node.name, b"".join(value.tobytes() for value in values if value is not None)


def biases(graph: gs.Graph) -> dict[str, np.ndarray]:
    return {layer.name: layer.bias for layer in g.linear_layers(graph) if layer.bias is not None}


# ---- records


def test_a_record_holds_what_was_kept_and_what_was_before(case: Case) -> None:
    before, after = weights(case.dense), weights(case.pruned)
    assert len(case.records.layers) == 12 and set(case.records.changed) == set(case.records.layers)
    for name, record in case.records.layers.items():
        np.testing.assert_array_equal(record.mask, after[name] != 0)
        np.testing.assert_array_equal(record.weight, before[name])
        np.testing.assert_array_equal(record.bias, biases(case.dense)[name])
        first = "layer.0" in name
        assert (str(record.pattern), record.asked) == (("2:4", 0.5) if first else ("2x4", 0.7))
        assert record.sparsity == pytest.approx(record.asked, abs=0.002)
    assert len(case.records.norms) == 5 and {record.norm for record in case.records.layers.values()} - {None} <= set(
        case.records.norms)  # fmt: skip


def test_kept_weights_that_are_zero_are_no_part_of_the_mask() -> None:
    graph = parse(MODEL)
    layer = next(layer for layer in g.linear_layers(graph) if layer.name == UP)
    g.set_weight(graph, layer, layer.weight * (np.arange(8) != 3))  # a column of zeros, which no unit is
    _, report = calibrated(parse_spec("block-prune(sparsity=0.5, block=4x4)")[0], graph)
    assert report.records is not None
    record = report.records.layers[UP]
    assert record.sparsity == 0.5 and report.detail["density"][UP] < 0.5  # type: ignore[index]
    assert record.mask.reshape(4, 4, 2, 4).sum(axis=(1, 3)).tolist().count([16, 16]) <= 4
    assert record.mask[:, 3].any()


def test_a_shared_weight_has_a_record_under_each_layer() -> None:
    after, report = calibrated(parse_spec("block-prune(sparsity=0.5)")[0], parse(SHARED))
    assert report.records is not None and list(report.records.layers) == ["MatMul_0", "MatMul_2"]
    back = undone(after, report.records, ["MatMul_2"])
    assert np.array_equal(weights(back)["MatMul_0"], weights(parse(SHARED))["MatMul_0"])


def test_layers_that_stay_dense_have_no_record() -> None:
    _, report = calibrated(parse_spec(f"block-prune(exclude={DOWN})")[0], parse(MODEL))
    assert report.records is not None and list(report.records.layers) == [UP]
    _, report = calibrated(parse_spec("block-prune(sparsity=0)")[0], parse(MODEL))
    assert report.records is None


# ---- back again


def test_all_layers_undone_are_the_graph_before(case: Case) -> None:
    back = undone(case.pruned, case.records, list(case.records.layers))
    assert g.to_text(back) == g.to_text(case.dense) != g.to_text(case.pruned)


def test_some_layers_go_back_and_normalisations_follow_those_that_are_left(case: Case) -> None:
    left = case.records.changed[-1]
    names = [name for name in case.records.changed if name != left]
    text = g.to_text(case.pruned)
    back = undone(case.pruned, case.records, names, case.data)
    assert g.to_text(case.pruned) == text  # a copy
    for name in case.records.changed:
        source = case.pruned if name == left else case.dense
        np.testing.assert_array_equal(weights(back)[name], weights(source)[name])
        np.testing.assert_array_equal(biases(back)[name], biases(source)[name])
    dense, fitted = dict(norms(case.dense)), dict(norms(back))
    others = [name for name in dense if dense[name] != fitted[name]]
    assert others == [list(dense)[-1]]  # the one after the layer that is left
    assert fitted[others[0]] != dict(norms(case.pruned))[others[0]]  # fitted again: less was lost before it
    with pytest.raises(PassError, match="needs calibration data"):
        undone(case.pruned, case.records, names)


def test_where_no_layer_stays_changed_everything_is_as_it_was(case: Case) -> None:
    """A layer that pruning left its weights, but not its bias, goes back with the others."""
    name = case.records.changed[0]
    layers = {**case.records.layers, name: replace(case.records.layers[name], changed=False)}
    names = [other for other in layers if other != name]
    assert g.to_text(undone(case.pruned, Records(layers, case.records.norms), names)) == g.to_text(case.dense)


def test_nothing_undone_is_a_copy(case: Case) -> None:
    mask = parse_spec("magnitude-prune")[0]
    after, report = calibrated(mask, parse(MODEL))
    assert report.records is not None
    assert g.to_text(undone(after, report.records, [])) == g.to_text(after)
    assert g.to_text(undone(after, report.records, [UP, "no layer"])) != g.to_text(after)


def test_of_passes_one_after_another_the_first_says_what_was_before() -> None:
    graph = parse(MODEL)
    first, one = calibrated(parse_spec("magnitude-prune(sparsity=0.25)")[0], graph)
    second, other = calibrated(parse_spec(f"block-prune(sparsity=0.5, include={UP})")[0], first)
    records = joined([one.records, None, other.records])
    assert g.to_text(undone(second, records, list(records.layers))) == g.to_text(graph)
    np.testing.assert_array_equal(records.layers[UP].weight, weights(graph)[UP])
    assert str(records.layers[UP].pattern) == "2x4" and str(records.layers[DOWN].pattern) == "unstructured"


def test_a_pass_that_keeps_no_records_can_be_undone_too() -> None:
    @dataclass(frozen=True)
    class HalfOf(Pass):
        name: ClassVar[str] = "half-of"

        def run(self, graph: gs.Graph, context: Context) -> Report:
            for layer in g.linear_layers(graph)[:2]:
                g.set_weight(graph, layer, layer.weight * (np.arange(layer.weight.shape[1]) % 2))
            return Report(2)

    graph = parse(MODEL)
    after, _ = calibrated(HalfOf(), graph)
    records = completed(Records(), graph, after)
    assert records.changed == [UP, DOWN] and records.layers[UP].sparsity == 0.5
    assert isinstance(records.layers[UP].pattern, (sp.NM, sp.Block, sp.Unstructured))
    assert g.to_text(undone(after, records, [UP, DOWN])) == g.to_text(graph)
