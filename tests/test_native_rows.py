"""Lookups, normalisation, elementwise steps and what moves tokens in and out, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from native_reference import ACTIVATIONS, ISAS, Net, dense_weight, quantize, ragged_mask

from nmcompile import _native

pytestmark = pytest.mark.emulated

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 128, 200]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape), np.float32)


def normalised(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, eps: float, rms: bool) -> np.ndarray:
    x = x.astype(float)
    x = x if rms else x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gamma
    return np.asarray(y if beta is None else y + beta)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_layer_norm(isa: str, rms: bool, rows: int, length: int) -> None:
    rng = np.random.default_rng(rows)
    x, gamma, beta = floats(rng, 1, length, rows), floats(rng, rows), None if rms else floats(rng, rows)
    net = Net(isa)
    a, q = net.enter(rows), net.program.buffer(rows, "u8")
    net.program.layer_norm(x=a, gamma=gamma, beta=beta, eps=1e-5, rms=rms, y=a, q=q, scale=0.02, zero_point=100)
    net.program.leave(x=net.float_of(q, rows), slot=1)
    net.program.leave(x=a, slot=0)
    net.program.prepare()
    y, bytes_ = net.program.run([x])
    want = normalised(x, gamma, beta, 1e-5, rms)
    np.testing.assert_allclose(y, want, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(bytes_, quantize(y, 0.02, 100))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("parts", ["mul", "add", "both"])
def test_layer_norm_scales_what_it_quantizes(isa: str, parts: str) -> None:
    rng = np.random.default_rng(1)
    x, gamma, mul, add = floats(rng, 2, 40, 10), floats(rng, 10), floats(rng, 10), floats(rng, 10)
    q_mul, q_add = None if parts == "add" else mul, None if parts == "mul" else add
    net = Net(isa)
    a, q = net.enter(10), net.program.buffer(10, "u8")
    net.program.layer_norm(
        x=a, gamma=gamma, beta=None, eps=1e-5, y=a, q=q, scale=0.03, zero_point=120, q_mul=q_mul, q_add=q_add
    )
    net.program.leave(x=net.float_of(q, 10), slot=1)
    net.program.leave(x=a, slot=0)
    net.program.prepare()
    y, bytes_ = net.program.run([x])
    np.testing.assert_allclose(y, normalised(x, gamma, None, 1e-5, False), atol=2e-5, rtol=2e-5)
    scaled = y.astype(float) * (1 if q_mul is None else q_mul) + (0 if q_add is None else q_add)
    np.testing.assert_array_equal(bytes_, quantize(scaled, 0.03, 120))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", LENGTHS)
def test_quantize(isa: str, length: int) -> None:
    x = floats(np.random.default_rng(length), 1, length, 6) * 4
    net = Net(isa)
    got = net.run([x], net.float_of(net.u8(net.enter(6), 6, 0.05, 30), 6))
    np.testing.assert_array_equal(got, quantize(x, 0.05, 30))


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_half_to_even(isa: str) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, 254.5, 255.5, 1e30, -1e30], np.float32).reshape(1, 1, -1)
    net = Net(isa)
    got = net.run([x], net.float_of(net.u8(net.enter(8), 8, 1.0, 0), 8))
    np.testing.assert_array_equal(got[0, 0], [0, 2, 2, 0, 254, 255, 255, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_unary(isa: str, op: str) -> None:
    x = np.linspace(-12, 12, 24 * 101, dtype=np.float32).reshape(1, 101, 24)
    x[0, 0, :4] = [0, -1000, 1000, 88]
    net = Net(isa)
    a, y = net.enter(24), net.f32(24)
    net.program.unary(x=a, y=y, op=op)
    with np.errstate(over="ignore"):
        want = ACTIVATIONS[op](x.astype(float))
    np.testing.assert_allclose(net.run([x], y), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_binary(isa: str, op: str) -> None:
    rng = np.random.default_rng(1)
    a, b = floats(rng, 3, 30, 5), floats(rng, 3, 30, 5)
    mask = ragged_mask(rng, 3, 30)
    net = Net(isa)
    left, right = net.enter(5), net.enter(5)
    net.program.binary(a=left, b=right, y=left, op=op)
    want = {"add": a + b, "sub": a - b, "mul": a * b}[op] * (mask != 0)[..., None]
    np.testing.assert_array_equal(net.run([a, b], left, mask), want)


@pytest.mark.parametrize("isa", ISAS)
def test_affine(isa: str) -> None:
    rng = np.random.default_rng(2)
    x, mul, add = floats(rng, 2, 40, 5), floats(rng, 5), floats(rng, 5)
    for m, s in ((mul, add), (None, add), (mul, None)):
        net = Net(isa)
        a, y = net.enter(5), net.f32(5)
        net.program.affine(x=a, y=y, mul=m, add=s)
        want = x.astype(float) * (1 if m is None else m) + (0 if s is None else s)
        np.testing.assert_allclose(net.run([x], y), want, atol=1e-6)


def test_embed_sums_its_tables() -> None:
    rng = np.random.default_rng(3)
    words, places, kinds = floats(rng, 50, 20), floats(rng, 90, 20).astype(np.float16), floats(rng, 2, 20)
    ids, segments = rng.integers(0, 50, (4, 70)), rng.integers(0, 2, (4, 70), np.int32)
    mask = ragged_mask(rng, 4, 70)
    p = _native.Program()
    y = p.buffer(20, "f32")
    p.embed(
        y=y, tables=[words, places, kinds, kinds],
        sources=[("input", 0), ("position", 3), ("input", 1), ("constant", 1)],
    )  # fmt: skip
    p.leave(x=y, slot=0)
    p.prepare()
    want = words[ids] + places[np.arange(70) + 3] + kinds[segments] + kinds[1]
    for given, keep in ((None, np.ones((4, 70, 1))), (mask, (mask != 0)[..., None])):
        np.testing.assert_allclose(p.run([ids, segments], given)[0], want * keep, atol=1e-6)
    for dtype in (np.int32, np.bool_, np.float32):
        same = p.run([ids, segments], mask.astype(dtype))[0]
        np.testing.assert_array_equal(same, p.run([ids, segments], mask)[0])


def test_half_precision_tables_are_read_exactly() -> None:
    table = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    p = _native.Program()
    y = p.buffer(64, "f32")
    p.embed(y=y, tables=[table], sources=[("input", 0)])
    p.leave(x=y, slot=0)
    p.prepare()
    got = p.run([np.arange(1024).reshape(1, -1)])[0][0]
    np.testing.assert_array_equal(got, table.astype(np.float32))


def test_cumulative_positions_as_in_roberta() -> None:
    table = np.arange(20, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    ids = np.array([[5, 6, 7, 1, 1], [1, 8, 1, 9, 9]])
    p = _native.Program()
    y = p.buffer(3, "f32")
    p.embed(y=y, tables=[table], sources=[("cumulative", 0, 1)])
    p.leave(x=y, slot=0)
    p.prepare()
    real = ids != 1
    np.testing.assert_array_equal(p.run([ids])[0][..., 0], np.cumsum(real, 1) * real + 1)


def test_first_takes_position_zero() -> None:
    rng = np.random.default_rng(4)
    x = floats(rng, 70, 5, 9)
    mask = np.ones((70, 5), np.int64)
    mask[3] = 0
    mask[5, 0] = 0
    net = Net()
    a, y = net.enter(9), net.f32(9, "first")
    net.program.first(x=a, y=y)
    want = x[:, 0].copy()
    want[[3, 5]] = 0
    np.testing.assert_array_equal(net.run([x], y, mask), want)


def test_add_positions() -> None:
    rng = np.random.default_rng(5)
    x, table = floats(rng, 3, 33, 6), floats(rng, 33, 6)
    net = Net()
    a = net.enter(6)
    net.program.add_positions(x=a, y=a, table=table)
    np.testing.assert_array_equal(net.run([x], a), x + table)
    with pytest.raises(ValueError, match=r"position 33 is outside 0\.\.32"):
        net.program.run([floats(rng, 1, 34, 6)])


def test_patches_and_class_token() -> None:
    rng = np.random.default_rng(6)
    images, row, table = floats(rng, 3, 2, 12, 18), floats(rng, 24), floats(rng, 13, 24)
    p = _native.Program()
    x, y, top = p.buffer(24, "f32"), p.buffer(24, "f32", "tokens1"), p.buffer(24, "f32", "first")
    p.patches(y=x, slot=0, channels=2, patch_h=4, patch_w=3)
    p.prepend(x=x, y=y, row=row)
    p.first(x=y, y=top)
    p.add_positions(x=y, y=y, table=np.concatenate([table, floats(rng, 6, 24)]))
    p.leave(x=y, slot=0)
    p.leave(x=top, slot=1)
    p.prepare()
    tokens = images.reshape(3, 2, 3, 4, 6, 3).transpose(0, 2, 4, 1, 3, 5).reshape(3, 18, 24)
    out, first = p.run([images])
    np.testing.assert_array_equal(out[:, 0], np.tile(row + table[0], (3, 1)))
    np.testing.assert_array_equal(out[:, 1:13], tokens[:, :12] + table[1:13])
    np.testing.assert_array_equal(first, np.tile(row, (3, 1)))
    with pytest.raises(ValueError, match="class token"):
        p.run([images], np.ones((3, 18), np.int64))
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        p.run([images[:, :, :11]])


def test_no_tokens_at_all() -> None:
    net = Net()
    a, y, top = net.enter(4), net.f32(4), net.f32(4, "first")
    q = net.u8(a, 4, 0.1, 3)
    net.program.linear(
        x=q, y=y, weight=dense_weight(np.eye(4, dtype=np.int8)), w_scale=np.ones(4, np.float32), bias=None,
        x_scale=0.1, x_zero_point=3,
    )  # fmt: skip
    net.program.first(x=y, y=top)
    net.program.leave(x=top, slot=1)
    x = np.ones((2, 3, 4), np.float32)
    np.testing.assert_array_equal(net.run([x], y, np.zeros((2, 3), np.int64)), 0 * x)
    assert [o.shape for o in net.program.run([x[:0]])] == [(0, 3, 4), (0, 4)]
    assert [o.shape for o in net.program.run([x[:, :0]])] == [(2, 0, 4), (2, 4)]
