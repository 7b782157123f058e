"""SimplifyMasks: one form for TensorRT, with what it assumes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, parse

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.canonical import attentions, build_attention
from nmcompile.mask_form import build_mask
from nmcompile.masks import LOWEST, Mask
from nmcompile.passes import SimplifyMasks

QKV = "(float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, int64[B,S] mask) => (float[B,S,8] y) { y = Identity(q) }"
INFINITE = float("-inf")


def attention(mask: Mask, guarded: bool = False) -> gs.Graph:
    graph = parse(QKV)
    b, (q, k, v, padding) = Builder(graph, "layer"), graph.inputs
    mask = Mask(padding if mask.padding is not None else None, mask.causal, mask.test, mask.lowest, mask.triangle)
    g.rewire(graph, graph.outputs[0], build_attention(b, q, k, v, 2, 0.3, build_mask(b, mask, q), guarded))
    g.cleanup(graph)
    return graph


PADDED = gs.Variable("mask")


@pytest.mark.parametrize(
    ("mask", "guarded", "rules"),
    [
        (Mask(PADDED, test="linear"), False, {"binary", "some-token"}),
        (Mask(PADDED, test="linear", causal=True, lowest=-1e4, triangle=LOWEST), False, {"binary", "some-token"}),
        (Mask(PADDED, test="positive", lowest=-1e4), False, {"binary", "some-token"}),
        (Mask(PADDED, test="count"), False, {"prefix", "some-token"}),
        (Mask(PADDED, lowest=INFINITE), True, {"some-token"}),
        (Mask(causal=True, lowest=INFINITE), True, set()),
    ],
)
def test_other_forms_become_the_plain_one(mask: Mask, guarded: bool, rules: set[str]) -> None:
    graph = attention(mask, guarded)
    after, report = apply(SimplifyMasks(), graph)
    (found,) = attentions(after)
    assert found.mask.key == found.mask.plain.key and not found.guarded and str(found.mask) == str(mask)
    assert report.changed == 1 and {item["rule"] for item in report.detail["assumes"]} == rules  # type: ignore[attr-defined]
    feeds = g.random_feeds(g.inputs(graph), 3, {"B": 2, "S": 5}) | {"mask": np.array([[1, 1, 1, 0, 0], [1] * 5])}
    np.testing.assert_allclose(g.run(after, feeds)["y"], g.run(graph, feeds)["y"], atol=1e-6)
    assert apply(SimplifyMasks(), after)[1].changed == 0


@pytest.mark.parametrize("mask", [Mask(), Mask(PADDED), Mask(PADDED, True), Mask(causal=True)])
def test_the_plain_form_stays(mask: Mask) -> None:
    graph = attention(mask)
    after, report = apply(SimplifyMasks(), graph)
    assert report.changed == 0 and not report.detail and g.to_text(after) == g.to_text(graph)
