"""Fused attention against softmax(q k^T) v in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from native_reference import ISAS, Net, attention, dense_weight, quantize, ragged_mask

Q, K, V = (0.0213, 131), (0.0257, 0), (0.0307, 0)  # of inputs in steps of 0.03: no ties


def inputs(rng: np.random.Generator, batch: int, length: int, rows: int) -> list[np.ndarray]:
    return [rng.standard_normal((batch, length, rows)).astype(np.float32) for _ in range(3)]


def int8_attention(
    xs: list[np.ndarray],
    heads: int,
    *,
    isa: str = "",
    threads: int = 1,
    causal: bool = False,
    mask: np.ndarray | None = None,
    layout: str = "f32",
) -> tuple[np.ndarray, np.ndarray]:
    rows = xs[0].shape[2]
    scale = 1 / np.sqrt(rows / heads)
    net = Net(isa, threads)
    buffers = []
    for layout_, (s, z) in zip(("u8", "keys", "values"), (Q, K, V), strict=True):
        x = net.u8(net.enter(rows), rows, 0.03, 128)
        y = net.program.buffer(rows, layout_)
        net.program.linear(
            x=x, y=y, weight=dense_weight(np.eye(rows, dtype=np.int8)), w_scale=np.ones(rows, np.float32),
            bias=None, x_scale=0.03, x_zero_point=128, y_scale=s, y_zero_point=z,
        )  # fmt: skip
        buffers.append(y)
    y = net.program.buffer(rows, layout)
    y_scale, y_zero = 0.02, 120
    net.program.attention(
        q=buffers[0], k=buffers[1], v=buffers[2], y=y, heads=heads, scale=scale, q_scale=Q[0],
        q_zero_point=Q[1], k_scale=K[0], v_scale=V[0], causal=causal, y_scale=y_scale, y_zero_point=y_zero,
    )  # fmt: skip
    out = net.float_of(y, rows, y_scale, y_zero) if layout == "u8" else y
    got = net.run(xs, out, mask)

    real = [(quantize(x, 0.03, 128) - 128) * 0.03 for x in xs]
    q = (quantize(real[0], *Q) - Q[1]) * Q[0]
    k, v = (quantize(x, s, z, -128, 127) * s for x, (s, z) in zip(real[1:], (K, V), strict=True))
    return got, attention(q, k, v, heads, scale, causal, mask)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 128, 129, 200])
def test_int8(isa: str, causal: bool, length: int) -> None:
    rng = np.random.default_rng(length)
    got, want = int8_attention(inputs(rng, 2, length, 24), 2, isa=isa, causal=causal)
    np.testing.assert_allclose(got, want, atol=0.02)  # probabilities are bytes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [4, 12, 32, 64, 68])
def test_int8_depths(isa: str, depth: int) -> None:
    rng = np.random.default_rng(depth)
    got, want = int8_attention(inputs(rng, 2, 40, depth * 2), 2, isa=isa)
    np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["f32", "u8"])
def test_int8_of_ragged_sequences(isa: str, causal: bool, layout: str) -> None:
    rng = np.random.default_rng(7)
    mask = ragged_mask(rng, 5, 70)
    got, want = int8_attention(inputs(rng, 5, 70, 32), 4, isa=isa, causal=causal, mask=mask, layout=layout)
    np.testing.assert_allclose(got, want, atol=0.02 if layout == "f32" else 0.03)


def test_int8_of_a_thousand_tokens() -> None:
    rng = np.random.default_rng(8)
    for causal in (False, True):
        got, want = int8_attention(inputs(rng, 1, 1000, 16), 1, causal=causal)
        np.testing.assert_allclose(got, want, atol=0.02)


def float_attention(
    xs: list[np.ndarray], heads: int, isa: str, threads: int, causal: bool, mask: np.ndarray | None
) -> np.ndarray:
    rows = xs[0].shape[2]
    net = Net(isa, threads)
    q, k, v = (net.enter(rows) for _ in range(3))
    y = net.f32(rows)
    net.program.attention_float(q=q, k=k, v=v, y=y, heads=heads, scale=0.4, causal=causal)
    return net.run(xs, y, mask)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 17, 64, 65, 128, 131, 300])
def test_float(isa: str, causal: bool, length: int) -> None:
    rng = np.random.default_rng(length)
    xs = inputs(rng, 2, length, 2 * 7)
    mask = ragged_mask(rng, 2, length) if length == 65 else None
    got = float_attention(xs, 2, isa, 1, causal, mask)
    q, k, v = (x.astype(float) for x in xs)
    want = attention(q, k, v, 2, 0.4, causal, mask)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_every_isa_and_thread_count_gives_the_same_bits(causal: bool) -> None:
    rng = np.random.default_rng(9)
    xs = inputs(rng, 3, 150, 64)
    mask = ragged_mask(rng, 3, 150)
    for layout in ("f32", "u8"):
        results = [
            int8_attention(xs, 4, isa=isa, threads=t, causal=causal, mask=mask, layout=layout)[0]
            for isa in ISAS
            for t in (1, 2)
        ]
        for result in results[1:]:
            np.testing.assert_array_equal(results[0], result)
    floats = [float_attention(xs, 4, isa, t, causal, mask) for isa in ISAS for t in (1, 2)]
    for result in floats[1:]:
        np.testing.assert_array_equal(floats[0], result)
