"""Reordering what stands between two layers: what is gained, and that no output changes by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.cpu import cluster
from nmcompile.backends.cpu.pack import BLOCKS, fills

FFN = """(float[batch,tokens,64] x) => (float[batch,tokens,64] y)
    <float[64,256] w1, float[256] b1, float[256,64] w2, float[64] b2, float[64] gamma, float[64] beta> {
    h = MatMul(x, w1)  hb = Add(h, b1)  a = Gelu(hb)  o = MatMul(a, w2)  ob = Add(o, b2)  r = Add(ob, x)
    y = LayerNormalization <axis = -1> (r, gamma, beta) }"""


def hidden_blocks(rng: np.random.Generator, n: int, k: int, rows: int, share: float) -> np.ndarray:
    """Filled blocks rows x 4 of int8 [n, k] before anything is shuffled."""
    keep = rng.random((n // rows, k // 4)) < share
    return np.asarray(np.kron(keep, np.ones((rows, 4))) * rng.integers(1, 127, (n, k)), np.int8)


def pair(n: int = 256, k: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two layers of 4x4 blocks whose inner order has been shuffled."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    return hidden_blocks(rng, n, k, 4, 0.15)[order], hidden_blocks(rng, k, n, 4, 0.15)[:, order]


def test_shuffled_blocks_are_found_again() -> None:
    first, second = pair()
    order = cluster.best_order(first, second)
    assert order is not None and sorted(order) == list(range(256))
    four = BLOCKS[2]
    assert fills(first[order])[four] < 0.5 * fills(first)[four]
    assert fills(second[:, order])[four] < 0.5 * fills(second)[four]


def test_the_order_is_the_same_every_time() -> None:
    np.testing.assert_array_equal(*(cluster.best_order(*pair()) for _ in range(2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_what_fits_its_blocks_stays(rows: int) -> None:
    rng = np.random.default_rng(0)
    assert cluster.best_order(hidden_blocks(rng, 256, 64, rows, 0.2), hidden_blocks(rng, 64, 256, rows, 0.2)) is None


def test_dense_layers_stay() -> None:
    assert cluster.best_order(np.ones((256, 64), np.int8), np.ones((64, 256), np.int8)) is None


@pytest.mark.parametrize("n", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("unit", [1, 4])
def test_every_row_stays_once(n: int, unit: int) -> None:
    support = np.random.default_rng(n).random((n, 70)) < 0.2
    order = cluster.clustered(support, unit)
    assert sorted(order) == list(range(n * unit))
    assert all(order[i] % unit == i % unit for i in range(len(order)))  # units stay whole


def test_equal_rows_become_neighbours() -> None:
    support = np.kron(np.eye(6, dtype=bool), np.ones((8, 1), bool))  # six kinds of rows, eight of each
    shuffled = np.random.default_rng(0).permutation(48)
    order = cluster.clustered(support[shuffled])
    groups = (shuffled[order] // 8).reshape(6, 8)
    assert (groups == groups[:, :1]).all()


def model(seed: int = 0) -> Any:
    """A feed-forward layer with shuffled blocks."""
    graph = parse(FFN)
    first, second = pair(seed=seed)
    for layer, weight in zip(g.linear_layers(graph), (first, second), strict=True):
        g.set_weight(graph, layer, weight.astype(np.float32) / 500)
    return graph


def compiled(graph: Any, path: Path) -> tuple[nmcompile.Result, np.ndarray]:
    result = nmcompile.compile(graph, path, preset="fast", measure=False)
    x = np.random.default_rng(1).standard_normal((3, 21, 64)).astype(np.float32)
    return result, nmcompile.load(path).run({"x": x})["y"]


def test_a_reordered_plan_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered, y = compiled(model(), tmp_path / "ordered.plan")
    assert [layer.get("reordered") for layer in ordered.layers] == [True, True]
    monkeypatch.setattr(cluster, "best_order", lambda *_: None)
    plain, reference = compiled(model(), tmp_path / "plain.plan")
    assert [layer.get("reordered") for layer in plain.layers] == [None, None]
    np.testing.assert_array_equal(y, reference)
    kernels = [{layer["kernel"] for layer in result.layers} for result in (ordered, plain)]
    assert kernels[0] <= {"blocks 2x4", "blocks 4x4"} and not kernels[0] & kernels[1]


def test_a_value_that_something_else_reads_keeps_its_order(tmp_path: Path) -> None:
    graph = model()
    inner = next(node for node in graph.nodes if node.op == "Gelu").outputs[0]
    graph.outputs.append(inner)
    result, _ = compiled(graph, tmp_path / "model.plan")
    assert not any(layer.get("reordered") for layer in result.layers)
