"""NMPrune: n of every m consecutive inputs stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx_text import apply, parse
from pruning_cases import (
    DENSE,
    DOWN,
    HEAD,
    MODEL,
    POOLER,
    SHARED,
    TO_OUTPUT,
    UP,
    prunes,
    same,
    weights,
    zeros,
)

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.passes import NMPrune


def test_before_and_after(golden: Callable[[str], str]) -> None:
    before, after, report = prunes(NMPrune())
    assert g.to_text(before) == golden("n_m_prune/before")
    assert g.to_text(after) == golden("n_m_prune/after")
    assert report.changed == 2 and report.notes == DENSE
    assert report.detail == {"pattern": "2:4", "density": {UP: 0.5, DOWN: 0.5}}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
def test_every_group_keeps_its_largest(n: int, m: int) -> None:
    before, after, _ = prunes(NMPrune(pattern=f"{n}:{m}"))
    assert zeros(after) == {UP: 128 * (m - n) // m, DOWN: 128 * (m - n) // m, POOLER: 0, HEAD: 0}
    for name in (UP, DOWN):
        size = np.abs(weights(before)[name]).reshape(-1, m)  # [groups, m], m consecutive inputs of one output
        kept = weights(after)[name].reshape(-1, m) != 0
        assert (kept.sum(1) == n).all()
        assert (np.sort(np.where(kept, size, 0))[:, -n:] == np.sort(size)[:, -n:]).all()
    found = sp.detect(weights(after)[DOWN])
    assert n == 3 or (found is not None and (str(found.pattern), found.orientation) == (f"{n}:{m}", "inputs"))


def test_a_width_that_does_not_divide_is_said() -> None:
    text = "(float[B,S,10] x) => (float[B,S,8] y) <float[10,8] w> { h = MatMul(x, w)  y = Relu(h) }"
    _, after, report = prunes(NMPrune(), text)
    assert report.notes == ("MatMul_0: kept dense, K=10 is not a multiple of 4",)
    assert zeros(after) == {"MatMul_0": 0}
    assert zeros(prunes(NMPrune(pattern="1:2"), text)[1]) == {"MatMul_0": 40}


def test_layers_are_chosen_by_name() -> None:
    _, after, report = prunes(NMPrune(exclude=("*_0",)))
    assert [name for name, count in zeros(after).items() if count] == [DOWN]
    assert report.notes[0] == f"{UP}: kept dense, excluded by name"


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (NMPrune(pattern="2x4"), "pattern=2x4 is not n:m; write for example 2:4"),
        (NMPrune(pattern="half"), "unknown sparsity pattern 'half'"),
        (NMPrune(include=("decoder*",)), "include=decoder* matches no linear layer"),
        (NMPrune(solver="wanda"), "needs calibration data"),
    ],
)
def test_errors_name_the_option(pass_: NMPrune, message: str) -> None:
    with pytest.raises(PassError) as error:
        apply(pass_, parse(MODEL))
    assert message in str(error.value)


def test_wanda_weighs_by_the_inputs() -> None:
    _, by_size, _ = prunes(NMPrune(include=(DOWN,)))
    graph, by_wanda, _ = prunes(NMPrune(solver="wanda", include=(DOWN,)))
    assert zeros(by_wanda) == zeros(by_size) and not same(by_wanda, by_size)
    feeds = [g.random_feeds(g.inputs(graph), seed, {"B": 4, "S": 6}) for seed in (5, 6)]
    relu = np.concatenate([g.run(graph, feed, ["r"])["r"].reshape(-1, 16) for feed in feeds])
    score = (np.abs(weights(graph)[DOWN]) * np.sqrt((relu.astype(np.float64) ** 2).sum(0))).reshape(-1, 4)
    kept = weights(by_wanda)[DOWN].reshape(-1, 4) != 0
    assert (np.where(kept, score, np.inf).min(1) >= np.where(kept, 0, score).max(1)).all()


def test_a_pruned_weight_is_left_as_it_is() -> None:
    _, after, _ = prunes(NMPrune(pattern="1:4"))
    again, report = apply(NMPrune(pattern="2:4"), after)
    assert report.changed == 0 and same(again, after)


def test_shared_weights_and_graph_outputs() -> None:
    _, after, report = prunes(NMPrune(), SHARED)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 32, "MatMul_2": 32})
    _, after, report = prunes(NMPrune(include=("*",)), TO_OUTPUT)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 64})
