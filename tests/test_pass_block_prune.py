"""BlockPrune: whole blocks of outputs x inputs go."""

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
from nmcompile.passes import BlockPrune


def blocks(weight: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """[blocks, weights of a block]"""
    tall, wide = weight.shape
    return weight.reshape(tall // rows, rows, wide // cols, cols).swapaxes(1, 2).reshape(-1, rows * cols)


def test_before_and_after(golden: Callable[[str], str]) -> None:
    before, after, report = prunes(BlockPrune(sparsity=0.75))
    assert g.to_text(before) == golden("block_prune/before")
    assert g.to_text(after) == golden("block_prune/after")
    assert report.changed == 2 and report.notes == DENSE
    assert report.detail == {"pattern": "2x4", "density": {UP: 0.25, DOWN: 0.25}}


@pytest.mark.parametrize(("rows", "cols"), [(2, 4), (4, 1), (1, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_least_blocks_go(rows: int, cols: int, sparsity: float) -> None:
    before, after, _ = prunes(BlockPrune(sparsity=sparsity, block=f"{rows}x{cols}"))
    gone = int(sparsity * 128 / (rows * cols) + 0.5) * rows * cols
    assert zeros(after) == {UP: gone, DOWN: gone, POOLER: 0, HEAD: 0}
    for name in (UP, DOWN):
        size = np.abs(blocks(weights(before)[name], rows, cols)).sum(1)
        kept = blocks(weights(after)[name], rows, cols) != 0
        assert (kept.all(1) | ~kept.any(1)).all()
        if gone < 128:
            assert size[~kept.any(1)].max() <= size[kept.any(1)].min()


def test_the_pattern_can_be_found_again() -> None:
    text = "(float[B,S,64] x) => (float[B,S,64] y) <float[64,64] w> { h = MatMul(x, w)  y = Relu(h) }"
    for block in ("2x4", "4x1"):
        found = sp.detect(weights(prunes(BlockPrune(block=block), text)[1])["MatMul_0"])
        assert found is not None and str(found.pattern) == block


def test_a_block_over_the_edge_is_a_block_of_what_there_is() -> None:
    text = "(float[B,S,10] x) => (float[B,S,7] y) <float[10,7] w> { h = MatMul(x, w)  y = Relu(h) }"
    _, after, report = prunes(BlockPrune(sparsity=0.5), text)  # 4 x 3 blocks
    weight = np.pad(weights(after)["MatMul_0"], ((0, 1), (0, 2)))
    assert np.count_nonzero(blocks(weight, 2, 4).any(1)) == 6
    assert report.changed == 1


def test_a_global_ranking_compares_layers() -> None:
    graph = parse(MODEL)
    layers = {layer.name: layer for layer in g.linear_layers(graph)}
    g.set_weight(graph, layers[DOWN], layers[DOWN].weight / 10)
    after, _ = apply(BlockPrune(sparsity=0.5, ranking="global"), graph)
    assert zeros(after) == {UP: 0, DOWN: 128, POOLER: 0, HEAD: 0}
    again, second = apply(BlockPrune(sparsity=0.5, ranking="global"), after)
    assert second.changed == 0 and same(again, after)


def test_zeros_that_are_there_stay() -> None:
    _, after, _ = prunes(BlockPrune(sparsity=0.75, block="4x4"))
    again, report = apply(BlockPrune(sparsity=0.5, block="4x4"), after)
    assert report.changed == 0 and same(again, after)
    again, _ = apply(BlockPrune(sparsity=0.875, block="4x4"), after)
    assert all((weights(again)[name][weights(after)[name] == 0] == 0).all() for name in (UP, DOWN))


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (BlockPrune(block="2:4"), "block=2:4 is not a block; write outputs x inputs, for example 2x4"),
        (BlockPrune(block="0x4"), "a block needs at least one output and one input"),
        (BlockPrune(sparsity=1.5), "sparsity=1.5 is not a share of zeros"),
        (BlockPrune(include=("decoder*",)), "include=decoder* matches no linear layer"),
        (BlockPrune(solver="wanda"), "needs calibration data"),
    ],
)
def test_errors_name_the_option(pass_: BlockPrune, message: str) -> None:
    with pytest.raises(PassError) as error:
        apply(pass_, parse(MODEL))
    assert message in str(error.value)


def test_wanda_ranks_blocks_by_their_inputs() -> None:
    _, by_size, _ = prunes(BlockPrune(sparsity=0.5))
    _, by_wanda, _ = prunes(BlockPrune(sparsity=0.5, solver="wanda"))
    assert zeros(by_wanda) == zeros(by_size) and not same(by_wanda, by_size)


def test_shared_weights_and_graph_outputs() -> None:
    _, after, report = prunes(BlockPrune(sparsity=0.5), SHARED)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 32, "MatMul_2": 32})
    _, after, report = prunes(BlockPrune(sparsity=0.5, include=("*",)), TO_OUTPUT)
    assert (report.changed, zeros(after)) == (1, {"MatMul_0": 64})
