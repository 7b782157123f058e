"""A graph with two layers to prune, a pooler and a head, and what the tests of the pruning passes share."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.calibrate import Calibration, open_data
from nmcompile.pipeline import Pass, Pipeline, Report

UP, DOWN, POOLER, HEAD = "MatMul_0", "MatMul_3", "MatMul_6", "MatMul_8"
DENSE = (
    f"{POOLER}: kept dense, poolers are kept dense by default",
    f"{HEAD}: kept dense, heads are kept dense by default",
)
MODEL = """(float[B,S,8] x) => (float[B,2] y)
    <float[8,16] up, float[16] bias, float[16,8] down, float[8,8] pool, float[8,2] classes> {
    h = MatMul(x, up)  a = Add(h, bias)  r = Relu(a)  d = MatMul(r, down)  n = Relu(d)
    first = Constant <value_int = 0> ()  f = Gather <axis = 1> (n, first)
    p = MatMul(f, pool)  t = Tanh(p)  y = MatMul(t, classes) }"""
SHARED = """(float[B,S,8] x) => (float[B,S,8] y) <float[8,8] w> {
    h = MatMul(x, w)  a = Relu(h)  i = MatMul(a, w)  y = Neg(i) }"""
TO_OUTPUT = "(float[B,S,8] x) => (float[B,S,16] y) <float[8,16] w> { y = MatMul(x, w) }"


def weights(graph: gs.Graph) -> dict[str, np.ndarray]:
    """Layer name -> weight [outputs, inputs]."""
    return {layer.name: layer.weight for layer in g.linear_layers(graph)}


def zeros(graph: gs.Graph) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in weights(graph).items()}


def calibrated(pass_: Pass, graph: gs.Graph, verify: bool = False) -> tuple[gs.Graph, Report]:
    """As onnx_text.apply, with statistics of two seeded batches."""
    before = g.to_text(graph)
    infos = g.inputs(graph)
    data = open_data([g.random_feeds(infos, seed, {"B": 4, "S": 6}) for seed in (5, 6)], infos)
    after, reports = Pipeline([pass_], calibration=Calibration(data), verify=verify).run(graph)
    assert g.to_text(graph) == before, f"{pass_.name} changes the caller's graph"
    return after, reports[0]


def prunes(pass_: Pass, text: str = MODEL) -> tuple[gs.Graph, gs.Graph, Report]:
    """(before, after, report) of a pass that only zeroes weights, and does nothing the second time."""
    graph = parse(text)
    after, report = calibrated(pass_, graph)
    assert [node.op for node in after.nodes] == [node.op for node in graph.nodes]
    for name, weight in weights(after).items():
        old = weights(graph)[name]
        assert ((weight == old) | (weight == 0)).all(), name
    again, second = calibrated(pass_, after)
    assert second.changed == 0 and g.to_text(again) == g.to_text(after)
    return graph, after, report


def same(a: gs.Graph, b: gs.Graph) -> bool:
    return g.to_text(a) == g.to_text(b)
