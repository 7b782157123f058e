"""ScaleQueries: the factor of the scores moves into the layer of the queries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse
from pruning_cases import calibrated
from test_pass_insert_qdq import encoder

from nmcompile import ir as g
from nmcompile.passes import InsertQdq, QuantizeOutputs, ScaleQueries
from nmcompile.pipeline import Report

DIMS = {"B": 2, "S": 5}


def quantized(attention: str) -> gs.Graph:
    graph, _ = calibrated(InsertQdq(activations="int8", attention=attention, softmax=attention == "int8"), encoder())
    return calibrated(QuantizeOutputs(layers="all"), graph)[0]


def muls(graph: gs.Graph) -> int:
    return sum(node.op == "Mul" for node in graph.nodes)


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = encoder()
    after, report = apply(ScaleQueries(), graph)
    assert report == Report(changed=1) and muls(after) == 0
    assert g.to_text(after) == golden("scale_queries/after")
    assert_same_outputs(graph, after, dims=DIMS)
    before, now = ({layer.name: layer for layer in g.linear_layers(item)} for item in (graph, after))
    changed = [name for name in now if not np.array_equal(now[name].weight, before[name].weight)]
    assert len(changed) == 1
    np.testing.assert_allclose(now[changed[0]].weight, 0.5 * before[changed[0]].weight)
    assert apply(ScaleQueries(), after)[1] == Report()


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_integers_stay_as_they_are(attention: str) -> None:
    graph = quantized(attention)
    after, report = apply(ScaleQueries(), graph)
    assert report.changed == 1
    feeds = g.random_feeds(g.inputs(graph), 3, DIMS)
    names = [t.name for node in graph.nodes if node.op == "QuantizeLinear" for t in node.outputs]
    before, now = g.run(graph, feeds, names), g.run(after, feeds, names)
    for name in names:
        np.testing.assert_array_equal(before[name], now[name], err_msg=name)


@pytest.mark.parametrize(
    "change, note",
    [("t2 = Neg(q)", "queries have other readers"), ("wide = MatMul(mask2, wq)", "queries have other readers")],
    ids=["read by another node", "weight of two layers"],
)
def test_queries_with_other_readers_stay(change: str, note: str) -> None:
    from test_pass_insert_qdq import ENCODER

    extra = ", float[B,S,8] t2" if "t2" in change else ", float[B,S,8] wide"
    body = ENCODER.format(outputs=extra, k="k").replace(" }", f"  {change} }}").replace("mask2", "x")
    graph = parse(body.replace("wide = MatMul(x, wq)", "xx = Neg(x)  wide = MatMul(xx, wq)"))
    after, report = apply(ScaleQueries(), graph)
    assert report.changed == 0 and note in report.notes[0]
    assert g.to_text(after) == g.to_text(graph)
