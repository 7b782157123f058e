"""MagnitudePrune: exact counts of zeros, which layers, by which criterion and ranking."""

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
from nmcompile.errors import PassError
from nmcompile.passes import MagnitudePrune


def test_before_and_after(golden: Callable[[str], str]) -> None:
    before, after, report = prunes(MagnitudePrune(sparsity=0.75))
    assert g.to_text(before) == golden("magnitude_prune/before")
    assert g.to_text(after) == golden("magnitude_prune/after")
    assert report.changed == 2 and report.notes == DENSE
    assert report.detail == {"pattern": "unstructured", "density": {UP: 0.25, DOWN: 0.25}}


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.1, 13), (0.5, 64), (0.8, 102), (0.99, 127)])
def test_the_least_weights_go(sparsity: float, count: int) -> None:
    before, after, report = prunes(MagnitudePrune(sparsity=sparsity))
    assert zeros(after) == {UP: count, DOWN: count, POOLER: 0, HEAD: 0}
    assert report.changed == (2 if count else 0)
    for name in (UP, DOWN):
        size, kept = np.abs(weights(before)[name]), weights(after)[name] != 0
        assert not count or size[~kept].max() <= size[kept].min()


def test_a_global_ranking_compares_layers() -> None:
    graph = parse(MODEL)
    layers = {layer.name: layer for layer in g.linear_layers(graph)}
    g.set_weight(graph, layers[DOWN], layers[DOWN].weight / 10)
    after, report = apply(MagnitudePrune(sparsity=0.6, ranking="global"), graph)
    found = zeros(after)
    assert found[UP] + found[DOWN] == int(0.6 * 256)
    assert found[DOWN] > 110 > 50 > found[UP]
    assert (found[POOLER], found[HEAD]) == (0, 0)
    both = np.concatenate([np.abs(weights(graph)[name]).ravel() for name in (UP, DOWN)])
    kept = np.concatenate([(weights(after)[name] != 0).ravel() for name in (UP, DOWN)])
    assert both[~kept].max() <= both[kept].min()
    assert apply(MagnitudePrune(sparsity=0.6, ranking="global"), after)[1].changed == 0
    assert report.changed == 2


@pytest.mark.parametrize(
    ("include", "exclude", "pruned"),
    [((), ("*_3",), [UP]), ((UP,), (), [UP]), (("*",), (), [UP, DOWN, POOLER, HEAD]),
     (("*",), (UP, HEAD), [DOWN, POOLER]),
     ((POOLER, "*_8"), (), [POOLER, HEAD])],
)  # fmt: skip
def test_layers_are_chosen_by_name(
    include: tuple[str, ...], exclude: tuple[str, ...], pruned: list[str]
) -> None:
    _, after, report = prunes(MagnitudePrune(sparsity=0.5, include=include, exclude=exclude))
    assert [name for name, count in zeros(after).items() if count] == pruned
    notes = dict(note.split(": kept dense, ") for note in report.notes)
    assert sorted([*pruned, *notes]) == sorted([UP, DOWN, POOLER, HEAD])
    assert all(notes[name] == "excluded by name" for name in notes if name in exclude)


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (
            MagnitudePrune(include=("decoder*",)),
            "include=decoder* matches no linear layer; the graph has MatMul_0, ",
        ),
        (MagnitudePrune(sparsity=1.0), "sparsity=1.0 is not a share of zeros"),
        (MagnitudePrune(sparsity=-0.1), "sparsity=-0.1 is not a share of zeros"),
        (MagnitudePrune(solver="taylor"), "solver=taylor is not known; choose one of magnitude, wanda, obs, admm"),
        (MagnitudePrune(ranking="layer"), "ranking=layer is not known; choose one of uniform, global, sensitivity"),
        (MagnitudePrune(solver="wanda"), "needs calibration data"),
    ],
)
def test_errors_name_the_option(pass_: MagnitudePrune, message: str) -> None:
    with pytest.raises(PassError) as error:
        apply(pass_, parse(MODEL))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_zeros_that_are_there_stay() -> None:
    graph = parse(MODEL)
    layers = {layer.name: layer for layer in g.linear_layers(graph)}
    holes = np.arange(128).reshape(16, 8) % 2 == 0
    g.set_weight(graph, layers[UP], layers[UP].weight * holes)
    after, report = apply(MagnitudePrune(sparsity=0.4, include=(UP,)), graph)
    assert report.changed == 0 and same(after, graph)
    after, report = apply(MagnitudePrune(sparsity=0.75, include=(UP,)), graph)
    assert zeros(after)[UP] == 96 and not weights(after)[UP][~holes].any()


def test_wanda_weighs_by_the_inputs() -> None:
    pass_ = MagnitudePrune(sparsity=0.5, solver="wanda", include=(UP,))
    graph, after, _ = prunes(pass_)
    infos = g.inputs(graph)
    x = np.concatenate([g.random_feeds(infos, seed, {"B": 4, "S": 6})["x"].reshape(-1, 8) for seed in (5, 6)])
    score = np.abs(weights(graph)[UP]) * np.sqrt((x.astype(np.float64) ** 2).sum(0))
    kept = weights(after)[UP] != 0
    assert kept.sum() == 64 and score[~kept].max() <= score[kept].min() * (1 + 1e-6)


def test_a_shared_weight_is_pruned_once_and_stays_shared() -> None:
    _, after, report = prunes(MagnitudePrune(sparsity=0.5), SHARED)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 32, "MatMul_2": 32})
    assert len({layer.node.inputs[1].name for layer in g.linear_layers(after)}) == 1


def test_a_layer_that_makes_a_graph_output() -> None:
    _, after, report = prunes(MagnitudePrune(sparsity=0.5), TO_OUTPUT)
    assert (report.changed, zeros(after)) == (0, {"MatMul_0": 0})
    assert report.notes == ("MatMul_0: kept dense, heads are kept dense by default",)
    _, after, report = prunes(MagnitudePrune(sparsity=0.5, include=("*",)), TO_OUTPUT)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 64})


def test_a_quantized_layer_is_kept() -> None:
    text = """(float[B,S,8] x) => (float[B,S,4] y) <int8[8,4] w> { scale = Constant <value_float = 0.5> ()
        d = DequantizeLinear(w, scale)  m = MatMul(x, d)  y = Relu(m) }"""
    graph = parse(text)
    after, report = apply(MagnitudePrune(), graph)
    assert report.notes == ("MatMul_1: kept dense, already quantized",) and same(after, graph)
