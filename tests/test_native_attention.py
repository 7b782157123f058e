"""Fused attention against softmax(q k^T) v in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from native_reference import ISAS, Net, attention, dense_weight, quantize, ragged_mask

pytestmark = pytest.mark.emulated

Q, K, V = (0.0213, 131), (0.0257, 0), (0.0307, 0)  # of inputs in steps of 0.03: no ties


def inputs(rng: np.random.Generator, batch: int, length: int, rows: int) -> list[np.ndarray]:
    return [rng.standard_normal((batch, length, rows)).astype(np.float32) for _ in range(3)]


def attention_in_bytes(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, scale: float, causal: bool, mask: np.ndarray | None
) -> np.ndarray:
    """`attention` with probabilities rounded to bytes, 255 for the greatest, as the int8 kernel has them."""
    out = np.zeros(q.shape)
    for b in range(len(q)):
        real = np.arange(q.shape[1]) if mask is None else np.nonzero(mask[b])[0]
        for h in np.split(np.arange(q.shape[2]), heads) if len(real) else []:
            scores = q[b][np.ix_(real, h)] @ k[b][np.ix_(real, h)].T * scale
            if causal:
                scores = np.where(np.tri(len(real), dtype=bool), scores, -np.inf)
            p = np.rint(255 * np.exp(scores - scores.max(axis=-1, keepdims=True)))
            out[b][np.ix_(real, h)] = p / p.sum(axis=-1, keepdims=True) @ v[b][np.ix_(real, h)]
    return out


def int8_attention(
    xs: list[np.ndarray],
    heads: int,
    *,
    isa: str = "",
    threads: int = 1,
    causal: bool = False,
    mask: np.ndarray | None = None,
    layout: str = "f32",
    sharpness: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    rows = xs[0].shape[2]
    scale = sharpness / np.sqrt(rows / heads)
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
    want = attention_in_bytes(q, k, v, heads, scale, causal, mask)
    if layout == "u8":
        want = np.clip(want, -y_zero * y_scale, (255 - y_zero) * y_scale)
    return got, want


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 128, 129, 200])
def test_int8(isa: str, causal: bool, length: int) -> None:
    rng = np.random.default_rng(length)
    got, want = int8_attention(inputs(rng, 2, length, 24), 2, isa=isa, causal=causal)
    np.testing.assert_allclose(got, want, atol=0.01)  # a byte of a probability may be off by one


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [4, 12, 32, 64, 68])
def test_int8_depths(isa: str, depth: int) -> None:
    rng = np.random.default_rng(depth)
    got, want = int8_attention(inputs(rng, 2, 40, depth * 2), 2, isa=isa)
    np.testing.assert_allclose(got, want, atol=0.01)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["f32", "u8"])
def test_int8_of_ragged_sequences(isa: str, causal: bool, layout: str) -> None:
    rng = np.random.default_rng(7)
    mask = ragged_mask(rng, 5, 70)
    got, want = int8_attention(inputs(rng, 5, 70, 32), 4, isa=isa, causal=causal, mask=mask, layout=layout)
    np.testing.assert_allclose(got, want, atol=0.01 if layout == "f32" else 0.02)


def test_int8_of_a_thousand_tokens() -> None:
    rng = np.random.default_rng(8)
    for causal in (False, True):
        got, want = int8_attention(inputs(rng, 1, 1000, 16), 1, causal=causal)
        np.testing.assert_allclose(got, want, atol=0.01)


def mask_of(lengths: list[int]) -> np.ndarray:
    return np.asarray(np.arange(max(lengths)) < np.array(lengths)[:, None], np.int64)


RAGGED = [0, 1, 3, 15, 16, 17, 0, 63, 64, 65, 2, 7, 1, 1, 100]  # sequences begin at any token of a panel and of a quad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["f32", "u8"])
@pytest.mark.parametrize("lengths", [RAGGED, [500, 37, 600], [1, 513], [3, 2, 1, 0, 1, 2, 3]], ids=str)
def test_int8_of_sequences_of_any_length(lengths: list[int], layout: str, causal: bool) -> None:
    xs = inputs(np.random.default_rng(10), len(lengths), max(lengths), 24)
    mask = mask_of(lengths)
    results = []
    for isa in ISAS:
        got, want = int8_attention(xs, 2, isa=isa, causal=causal, mask=mask, layout=layout)
        np.testing.assert_allclose(got, want, atol=0.01 if layout == "f32" else 0.02)
        results.append(got)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


def test_int8_of_a_sequence_does_not_depend_on_its_neighbours() -> None:
    """What lies beside a sequence, in its first and last quad of keys too, weighs nothing."""
    rng = np.random.default_rng(11)
    lengths = [5, 66, 9]
    xs = inputs(rng, 3, 66, 16)
    others = inputs(rng, 3, 66, 16)
    for x, other in zip(xs, others, strict=True):
        other[1] = x[1]
    got, changed = (int8_attention(x, 2, mask=mask_of(lengths))[0] for x in (xs, others))
    np.testing.assert_array_equal(got[1], changed[1])
    assert not np.array_equal(got[0], changed[0])


@pytest.mark.parametrize("sharpness", [1e-30, 1e-9, 1e-4, 0.01, 0.3, 3.0, 50.0, 1e4, 1e12])
def test_int8_of_any_scale(sharpness: float) -> None:
    """From a plain mean to the value of the greatest score; ties share."""
    xs = inputs(np.random.default_rng(12), 1, 90, 32)
    results = []
    for isa in ISAS:
        got, want = int8_attention(xs, 2, isa=isa, sharpness=sharpness)
        np.testing.assert_allclose(got, want, atol=0.015)
        results.append(got)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("causal", [False, True])
def test_float_of_sequences_of_any_length(causal: bool) -> None:
    xs = inputs(np.random.default_rng(13), len(RAGGED), max(RAGGED), 2 * 7)
    mask = mask_of(RAGGED)
    results = [float_attention(xs, 2, isa, 1, causal, mask) for isa in ISAS]
    q, k, v = (x.astype(float) for x in xs)
    np.testing.assert_allclose(results[0], attention(q, k, v, 2, 0.4, causal, mask), atol=5e-6)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


def test_float_keeps_nan_to_its_sequence() -> None:
    lengths = [5, 66, 9]
    xs = inputs(np.random.default_rng(14), 3, 66, 8)
    for x in xs:
        x[0, 1] = x[2, 3] = np.nan
    got = float_attention(xs, 2, "", 1, False, mask_of(lengths))
    assert np.isfinite(got[1]).all()
    assert np.isnan(got[0, :5]).all()


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
