"""StoreWeights: quantized weights in float before a pair, on the grid already."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_text import apply, assert_same_outputs
from pruning_cases import MODEL, SHARED, calibrated

from nmcompile import ir as g
from nmcompile.errors import PassError
from nmcompile.passes import InsertQdq, StoreWeights
from nmcompile.pipeline import Report


@pytest.mark.parametrize("text", [MODEL, SHARED], ids=["model", "shared weight"])
def test_nothing_is_rounded_anew(text: str) -> None:
    from onnx_text import parse

    graph, _ = calibrated(InsertQdq(activations="int8", heads=True), parse(text))
    after, report = apply(StoreWeights(), graph)
    onnx.checker.check_model(g.to_model(after), full_check=True)
    weights = [node for node in graph.nodes if node.op == "DequantizeLinear" and not node.inputs[0].inputs]
    assert report.changed == len(weights) > 0
    for node in weights:
        pair = next(item for item in after.nodes if item.name == node.name)
        quantize = g.producer(pair.inputs[0])
        assert quantize is not None and quantize.op == "QuantizeLinear" and quantize.attrs == {"axis": 1}
        small = quantize.outputs[0].name
        np.testing.assert_array_equal(g.run(after, {}, [small])[small], g.constant(node.inputs[0]))
    assert_same_outputs(graph, after, atol=0)
    assert apply(StoreWeights(), after)[1] == Report()


def test_integers_may_stay() -> None:
    from onnx_text import parse

    graph, _ = calibrated(InsertQdq(activations="int8"), parse(MODEL))
    assert apply(StoreWeights(form="int8"), graph)[1] == Report()


def test_other_forms_are_refused() -> None:
    from onnx_text import parse

    with pytest.raises(PassError, match="form=half is not known; choose float or int8"):
        apply(StoreWeights(form="half"), parse(MODEL))
