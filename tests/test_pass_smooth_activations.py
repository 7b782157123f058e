"""SmoothActivations: outlier channels move from activations into weights, and the graph computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, assert_same_outputs, parse
from pruning_cases import calibrated, same

from nmcompile import ir as g
from nmcompile.errors import PassError
from nmcompile.passes import SmoothActivations
from nmcompile.pipeline import Report
from nmcompile.qdq.smoothing import ALPHAS

NORM = "x = LayerNormalization <axis = -1> (a, gamma, beta)"
TWO = f"""(float[B,S,8] a) => (float[B,S,8] y, float[B,S,8] x)
    <float[8] gamma, float[8] beta, float[8,8] wq, float[8,8] wk> {{
    {NORM}  q = MatMul(x, wq)  k = MatMul(x, wk)  p = Mul(q, k)  y = Add(p, x) }}"""


def with_outlier(text: str = TWO, opset: int = 20) -> gs.Graph:
    """The graph with one channel of its normalisation a hundred times the others."""
    graph = parse(text, opset)
    norm = next(node for node in graph.nodes if "Normalization" in node.op)
    gamma = np.ones(8, np.float32)
    gamma[3] = 100
    norm.inputs[1].values = gamma
    return graph


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = with_outlier()
    assert g.to_text(graph) == golden("smooth_activations/before")
    after, report = calibrated(SmoothActivations(), graph, verify=True)
    measured = re.compile(r"#\w+|\{[^}]*\}")  # by onnxruntime: rounded as the CPU likes
    assert measured.sub("#", g.to_text(after)) == golden("smooth_activations/after")
    assert report.changed == 1 and report.notes == ()
    assert_same_outputs(graph, after, atol=2e-2)  # of values around 1e4
    again, second = calibrated(SmoothActivations(), after)
    assert second == Report() and same(again, after)


@pytest.mark.parametrize("alpha", [0.5, 0.6, 0.9])
def test_the_formula(alpha: float) -> None:
    graph = with_outlier()
    after, report = calibrated(SmoothActivations(alpha=alpha), graph)
    infos = g.inputs(graph)
    x = np.concatenate([g.run(graph, g.random_feeds(infos, seed, {"B": 4, "S": 6}), ["x"])["x"].reshape(-1, 8)
                        for seed in (5, 6)])  # fmt: skip
    old = [layer.weight for layer in g.linear_layers(graph)]
    peak = np.abs(x).max(0)
    scale = peak**alpha / np.abs(np.concatenate(old)).max(0) ** (1 - alpha)
    scale /= np.exp(np.log(scale).mean())
    layers = g.linear_layers(after)
    for layer, weight in zip(layers, old, strict=True):
        np.testing.assert_allclose(layer.weight, weight * scale, rtol=1e-4)
    factor = next(node for node in after.nodes if node.name == layers[0].x.inputs[0].name)
    np.testing.assert_allclose(factor.inputs[1].values, 1 / scale, rtol=1e-4)
    (gain,) = report.detail["peak reduced by"].values()  # type: ignore[attr-defined]
    assert gain == pytest.approx(peak.max() / (peak / scale).max(), rel=1e-3) and gain > 2


def test_rms_normalisation_too() -> None:
    text = """(float[B,S,8] a) => (float[B,S,8] y) <float[8] gamma, float[8,8] w> {
        x = RMSNormalization <axis = -1> (a, gamma)  h = MatMul(x, w)  y = Relu(h) }"""
    graph = with_outlier(text, 23)
    after, report = calibrated(SmoothActivations(), graph)
    assert report.changed == 1
    assert_same_outputs(graph, after, atol=1e-3)


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM}  h = MatMul(x, w)  r = Relu(h)  s = MatMul(r, w)  y = Relu(s)",  # the weight has another reader
        f"{NORM}  y = MatMul(x, w)",  # a head
        "x = Relu(a)  h = MatMul(x, w)  y = Relu(h)",  # no normalisation
    ],
    ids=["shared weight", "graph output", "no normalisation"],
)
def test_what_is_left_alone(body: str) -> None:
    text = f"(float[B,S,8] a) => (float[B,S,8] y) <float[8] gamma, float[8] beta, float[8,8] w> {{ {body} }}"
    graph = parse(text)
    after, report = calibrated(SmoothActivations(), graph)
    assert report == Report() and same(after, graph)


def test_a_channel_of_zeros() -> None:
    graph = with_outlier()
    weight = g.linear_layers(graph)[0].weight.copy()
    weight[:, 5] = 0
    for layer in g.linear_layers(graph):
        g.set_weight(graph, layer, weight)
    after, _ = calibrated(SmoothActivations(), graph, verify=True)
    assert all(np.isfinite(layer.weight).all() for layer in g.linear_layers(after))


@pytest.mark.parametrize("alpha", [1.0, -1.0])
def test_alpha_is_between_0_and_1(alpha: float) -> None:
    with pytest.raises(PassError, match="is not between 0 and 1"):
        calibrated(SmoothActivations(alpha=alpha), with_outlier())


def test_alpha_may_be_chosen_by_the_error_of_the_outputs() -> None:
    graph = with_outlier()
    _, report = calibrated(SmoothActivations(alpha=0.0), graph, verify=True)
    assert report.changed == 1
    (alpha,) = report.detail["alpha"].values()  # type: ignore[attr-defined]
    name = g.linear_layers(graph)[0].x.name
    infos = g.inputs(graph)
    x = np.concatenate([g.run(graph, g.random_feeds(infos, seed, {"B": 4, "S": 6}), [name])[name].reshape(-1, 8)
                        for seed in (5, 6)])  # fmt: skip
    weights = [layer.weight for layer in g.linear_layers(graph)]

    def lost(alpha: float) -> float:
        """Eight bits on both sides, by three lines of numpy."""
        s = np.abs(x).max(0) ** alpha / np.abs(np.concatenate(weights)).max(0) ** (1 - alpha)
        s /= np.exp(np.log(s).mean())
        step = (max((x / s).max(), 0) - min((x / s).min(), 0)) / 255
        small, total = np.rint(x / s / step) * step, 0.0
        for w in weights:
            row = np.abs(w * s).max(1, keepdims=True) / 127
            error = small @ (np.rint(w * s / row) * row).T - x @ w.T
            total += (error**2).sum() / ((x @ w.T) ** 2).sum()
        return float(total)

    assert lost(alpha) <= 1.1 * min(map(lost, ALPHAS)) and lost(alpha) < lost(0.3)


def test_it_needs_calibration() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        apply(SmoothActivations(), with_outlier())
