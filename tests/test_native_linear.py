"""The linear steps against numpy, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from native_reference import (
    ACTIVATIONS,
    ISAS,
    Net,
    block_weight,
    dense_weight,
    gather_weight,
    quantize,
    ragged_mask,
    sparse,
)

pytestmark = pytest.mark.emulated


def linear(
    x: np.ndarray,
    w: np.ndarray,
    weight: dict[str, Any],
    *,
    on: tuple[str, int] = ("", 1),
    activation: str = "none",
    layout: str = "f32",
    residual: bool = False,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The engine's result and numpy's, of one linear step with all it can do after the product; on: ISA and threads."""
    rng = np.random.default_rng(1)
    n, k = (int(size) for size in w.shape)
    zx, sx, sy, zy = 117, 0.03, 0.11, 90 if layout == "u8" else -3
    w_scale = (rng.random(n) * 0.002 + 0.001).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    more = rng.standard_normal((*x.shape[:2], n)).astype(np.float32)
    net = Net(*on)
    q = net.u8(net.enter(k), k, sx, zx)
    r = net.enter(n) if residual else -1
    y = net.program.buffer(n, layout)
    net.program.linear(
        x=q, y=y, weight=weight, w_scale=w_scale, bias=bias, x_scale=sx, x_zero_point=zx,
        activation=activation, residual=r, y_scale=sy, y_zero_point=0 if layout == "f32" else zy,
    )  # fmt: skip
    out = net.float_of(y, n) if layout == "u8" else y
    got = net.run([x, more] if residual else [x], out, mask)

    total = (quantize(x, sx, zx) - zx) @ w.T.astype(np.int64)
    want = ACTIVATIONS[activation](total * (np.float32(sx) * w_scale).astype(np.float64) + bias)
    want = want + more if residual else want
    if layout == "u8":
        want = quantize(want, sy, zy)
    if mask is not None:
        want = want * (mask != 0)[..., None]
    return got, want


def assert_close(got: np.ndarray, want: np.ndarray, layout: str, ties: float = 0.01) -> None:
    if layout == "f32":
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6 * max(1, np.abs(want).max(initial=0)))
    else:  # a rounding tie may fall either way
        assert np.abs(got - want).max() <= 1
        assert (got != want).mean() < ties


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 63, 64, 65, 128, 200])
def test_dense_for_any_number_of_tokens(isa: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    w = rng.integers(-127, 128, (22, 19)).astype(np.int8)
    x = rng.standard_normal((1, tokens, 19)).astype(np.float32)
    assert_close(*linear(x, w, dense_weight(w), on=(isa, 1)), "f32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 20, 40, 64, 75])
def test_blocks_of_every_height(isa: str, rows: int, tokens: int) -> None:
    rng = np.random.default_rng(rows)
    w = sparse(rng, 37, 50, rows, 0.3)
    x = rng.standard_normal((1, tokens, 50)).astype(np.float32)
    got, want = linear(x, w, block_weight(w, rows), on=(isa, 1))
    assert_close(got, want, "f32")
    np.testing.assert_array_equal(got, linear(x, w, dense_weight(w), on=(isa, 1))[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 20, 40, 64, 75])
def test_gathered_inputs_of_every_height(isa: str, rows: int, tokens: int) -> None:
    rng = np.random.default_rng(rows)
    w = np.asarray(rng.integers(-127, 128, (37, 50)) * (rng.random((37, 50)) < 0.2), np.int8)
    w[8:16] = 0
    x = rng.standard_normal((1, tokens, 50)).astype(np.float32)
    got, want = linear(x, w, gather_weight(w, rows), on=(isa, 1))
    assert_close(got, want, "f32")
    np.testing.assert_array_equal(got, linear(x, w, dense_weight(w), on=(isa, 1))[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [0, 1])
def test_a_panel_far_larger_than_the_first_cache(isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    w = sparse(rng, 20, 1700, 1, 0.1)
    x = rng.standard_normal((1, 100, 1700)).astype(np.float32)
    assert_close(*linear(x, w, block_weight(w, rows) if rows else gather_weight(w, 2), on=(isa, 1), layout="u8"), "u8")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("y_scale", [0.0005, 0.003, 0.01, 0.03, 0.2])
def test_activation_tables_are_within_a_step(isa: str, activation: str, y_scale: float) -> None:
    """One input, one weight: the sum sweeps the whole range of the activation. Half a step is rounding."""
    reach = min(12.0, y_scale * 200)
    x = np.linspace(-reach, reach, 2000, dtype=np.float32).reshape(1, -1, 1)
    net = Net(isa)
    q = net.u8(net.enter(1), 1, 2 * reach / 255, 128)
    y = net.program.buffer(4, "u8")
    bias = np.linspace(-0.004, 0.004, 4, dtype=np.float32) * reach
    net.program.linear(
        x=q, y=y, weight=dense_weight(np.full((4, 1), 100, np.int8)), w_scale=np.full(4, 0.01, np.float32), bias=bias,
        x_scale=2 * reach / 255, x_zero_point=128, activation=activation, y_scale=y_scale, y_zero_point=40,
    )  # fmt: skip
    got = net.run([x], net.float_of(y, 4))
    total = (quantize(x, 2 * reach / 255, 128) - 128) * (2 * reach / 255)
    want = np.clip(ACTIVATIONS[activation](total + bias) / y_scale + 40, 0, 255)
    assert np.abs(got - want).max() < 0.5 + 0.2
    assert abs((got - np.rint(want)).mean()) < 0.03


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("y_scale", [8.0, 17.0, 33.0, 63.0, 64.5, 100.0, 3000.0, 1e6, 1e20, 3e38])
def test_activations_into_steps_wider_than_all_of_their_bend(activation: str, y_scale: float) -> None:
    """As after a layer with one large bias: GELU and its kin are relu there, to within a fraction of a step."""
    x = np.linspace(-2.5, 2.5, 500, dtype=np.float32).reshape(1, -1, 1)
    bias = np.array([0, 100, -60, 300], np.float32) * np.float32(min(y_scale, 1e30))
    results = []
    for isa in ISAS:
        net = Net(isa)
        q = net.u8(net.enter(1), 1, 5 / 255, 128)
        y = net.program.buffer(4, "u8")
        net.program.linear(
            x=q, y=y, weight=dense_weight(np.full((4, 1), 100, np.int8)), w_scale=np.full(4, 0.2, np.float32),
            bias=bias, x_scale=5 / 255, x_zero_point=128, activation=activation, y_scale=y_scale, y_zero_point=40,
        )  # fmt: skip
        results.append(net.run([x], net.float_of(y, 4)))
    total = (quantize(x, 5 / 255, 128) - 128) * (5 / 255 * 20)
    with np.errstate(over="ignore"):
        want = np.clip(ACTIVATIONS[activation](total + bias.astype(float)) / y_scale + 40, 0, 255)
    assert np.abs(results[0] - want).max() < 0.5 + 0.2
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["f32", "u8"])
@pytest.mark.parametrize("residual", [False, True])
def test_what_follows_the_product(isa: str, activation: str, layout: str, residual: bool) -> None:
    rng = np.random.default_rng(3)
    w = sparse(rng, 21, 70, 2, 0.5)
    x = rng.standard_normal((3, 30, 70)).astype(np.float32) * 2
    mask = ragged_mask(rng, 3, 30)
    got, want = linear(
        x, w, block_weight(w, 2), on=(isa, 1), activation=activation, layout=layout, residual=residual, mask=mask
    )
    by_table = not residual and activation in ("gelu", "gelu_tanh", "quick_gelu", "silu")  # in 64ths of a step
    assert_close(got, want, layout, ties=0.03 if by_table else 0.01)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [-128, -127, 127])
def test_extremes_do_not_saturate(isa: str, value: int) -> None:
    """255 * 127 twice is more than int16 holds, and 4096 of them are exact in int32."""
    k = 4096
    net = Net(isa)
    q = net.u8(net.enter(k), k, 1.0, 0)
    y = net.f32(5)
    net.program.linear(
        x=q, y=y, weight=dense_weight(np.full((5, k), value, np.int8)), w_scale=np.ones(5, np.float32),
        bias=None, x_scale=1.0, x_zero_point=0,
    )  # fmt: skip
    got = net.run([np.full((1, 3, k), 300, np.float32)], y)
    np.testing.assert_array_equal(got, np.full((1, 3, 5), 255 * value * k, np.float32))


PAIRS = [(128, 0), (64, 64), (127, 1), (127, 2), (65, 64), (127, 127), (-128, 0), (-127, -1), (-128, -1), (-128, -128),
         (127, -128), (-65, -64), (100, -100)]  # of adjacent weights: what 16 bits hold with inputs of 255, and more


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", [dense_weight, *(partial(block_weight, rows=rows) for rows in (1, 2, 4, 8, 16)),
                                    *(partial(gather_weight, rows=rows) for rows in (1, 2, 4))])  # fmt: skip
def test_pairs_of_weights_at_the_edge_of_16_bits(isa: str, weight: Callable[[np.ndarray], dict[str, Any]]) -> None:
    rows = np.minimum(np.array([[*a, *b] for a in PAIRS for b in PAIRS]), 127).astype(np.int8)  # [169, 4]
    w = np.concatenate([rows, np.roll(rows, 5, 0), np.zeros_like(rows), rows[::-1]], axis=1)
    x = np.repeat([[-300.0, 300.0, 0.0, 300.0]], 4 * 20, 0).reshape(1, 20, 16).astype(np.float32)  # 0, 255, 117, 255
    x[0, 10:] = 300
    got, want = linear(x, w, weight(w), on=(isa, 1))
    assert_close(got, want, "f32")
    np.testing.assert_array_equal(got, linear(x, w, dense_weight(w), on=("scalar", 1))[0])


@pytest.mark.parametrize("layout", ["f32", "u8"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 40), (1, 90)])
@pytest.mark.parametrize("residual", [False, True])
def test_every_isa_and_thread_count_gives_the_same_bits(
    layout: str, activation: str, shape: tuple[int, int], residual: bool
) -> None:
    rng = np.random.default_rng(5)
    w = sparse(rng, 130, 96, 4, 0.5)
    x = rng.standard_normal((*shape, 96)).astype(np.float32) * 3
    weights = [dense_weight(w), *(block_weight(w, rows) for rows in (1, 2, 4, 8, 16))]
    weights += [gather_weight(w, rows) for rows in (1, 2, 4)]
    results = [
        linear(x, w, weight, on=(isa, threads), activation=activation, layout=layout, residual=residual)[0]
        for isa in ISAS
        for threads in (1, 2)
        for weight in (weights if isa == ISAS[0] else weights[threads::2])
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("full", [slice(0, 3), slice(60, 75), slice(145, 150), slice(0, 0)])
def test_threads_share_uneven_rows(threads: int, full: slice) -> None:
    rng = np.random.default_rng(6)
    w = np.zeros((150, 200), np.int8)
    w[full] = rng.integers(-127, 128, w[full].shape)
    x = rng.standard_normal((1, 300, 200)).astype(np.float32)
    assert_close(*linear(x, w, block_weight(w, 1), on=("", threads)), "f32")
    assert_close(*linear(x, w, dense_weight(w), on=("", threads)), "f32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n,k,tokens", [(2, 7, 1), (9, 33, 17), (64, 20, 100)])
def test_linear_float(isa: str, threads: int, n: int, k: int, tokens: int) -> None:
    rng = np.random.default_rng(n)
    w = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    x = rng.standard_normal((1, tokens, k)).astype(np.float32)
    more = rng.standard_normal((1, tokens, n)).astype(np.float32)
    net = Net(isa, threads)
    a, r, y = net.enter(k), net.enter(n), net.f32(n)
    net.program.linear_float(x=a, y=y, weight=w, bias=bias, activation="silu", residual=r)
    want = ACTIVATIONS["silu"](x.astype(float) @ w.T + bias) + more
    np.testing.assert_allclose(net.run([x, more], y), want, atol=1e-5, rtol=1e-5)
