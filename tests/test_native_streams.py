"""Streams of tokens: cross attention, masks and lengths of each, first tokens and what lies behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_reference import ISAS, Net, dense_weight, masked_attention, quantize

from nmcompile import _native

pytestmark = pytest.mark.emulated

Q, K, V = (0.0213, 131), (0.0257, 0), (0.0307, 0)  # of inputs in steps of 0.03: no ties
Y = (0.02, 120)
LENGTHS = [
    ([3, 70, 0, 17, 64, 1], [130, 5, 9, 0, 64, 2]),  # no queries, no keys, a panel of either
    ([1, 1, 1], [600, 37, 513]),  # keys in several blocks
    ([200], [1]),
    ([5, 6], [0, 0]),
]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def mask_of(lengths: list[int]) -> np.ndarray:
    """int64 [B, S]: prefixes of ones, with a hole where there is room."""
    mask = np.asarray(np.arange(max(1, *lengths)) < np.array(lengths)[:, None], np.int64)
    for row, length in zip(mask, lengths, strict=True):
        if length > 8:
            row[length // 2] = 0
    return mask


def seen_by(q_mask: np.ndarray, k_mask: np.ndarray, offset: int | None) -> np.ndarray:
    """bool [B, S, T]: which keys each real query sees."""
    seen = np.asarray((q_mask[:, :, None] != 0) & (k_mask[:, None, :] != 0))
    if offset is not None:
        seen &= np.arange(seen.shape[2]) <= np.arange(seen.shape[1])[:, None] + offset
    return seen


def float_cross(xs: list[np.ndarray], masks: dict[str, np.ndarray], offset: int | None, isa: str, threads: int,
                same: bool = False) -> np.ndarray:  # fmt: skip
    net = Net(isa, threads)
    keys = "tokens" if same else "keys"
    if not same:
        net.program.stream("keys")
    rows = xs[0].shape[2]
    q, k, v = net.enter(rows), net.enter(rows, keys), net.enter(rows, keys)
    y = net.f32(rows)
    net.program.attention_float(q=q, k=k, v=v, y=y, heads=2, scale=0.4, causal=offset is not None, offset=offset)
    net.program.leave(x=y, slot=0)
    net.program.prepare()
    return net.program.run(xs, masks=masks)[0]


def float_wanted(xs: list[np.ndarray], seen: np.ndarray) -> np.ndarray:
    q, k, v = (x.astype(float) for x in xs)
    return masked_attention(q, k, v, 2, 0.4, seen)


def int8_cross(xs: list[np.ndarray], masks: dict[str, np.ndarray], offset: int | None, isa: str, threads: int,
               layout: str) -> np.ndarray:  # fmt: skip
    net = Net(isa, threads)
    net.program.stream("keys")
    rows = xs[0].shape[2]
    buffers = []
    for stream, layout_, (s, z) in zip(("tokens", "keys", "keys"), ("u8", "keys", "values"), (Q, K, V), strict=True):
        x = net.u8(net.enter(rows, stream), rows, 0.03, 128, stream)
        y = net.program.buffer(rows, layout_, stream)
        net.program.linear(
            x=x, y=y, weight=dense_weight(np.eye(rows, dtype=np.int8)), w_scale=np.ones(rows, np.float32),
            bias=None, x_scale=0.03, x_zero_point=128, y_scale=s, y_zero_point=z,
        )  # fmt: skip
        buffers.append(y)
    y = net.program.buffer(rows, layout)
    net.program.attention(
        q=buffers[0], k=buffers[1], v=buffers[2], y=y, heads=2, scale=0.3, q_scale=Q[0], q_zero_point=Q[1],
        k_scale=K[0], v_scale=V[0], causal=offset is not None, y_scale=Y[0], y_zero_point=Y[1], offset=offset,
    )  # fmt: skip
    net.program.leave(x=net.float_of(y, rows, *Y) if layout == "u8" else y, slot=0)
    net.program.prepare()
    return net.program.run(xs, masks=masks)[0]


def int8_wanted(xs: list[np.ndarray], seen: np.ndarray, layout: str) -> np.ndarray:
    real = [(quantize(x, 0.03, 128) - 128) * 0.03 for x in xs]
    q = (quantize(real[0], *Q) - Q[1]) * Q[0]
    k, v = (quantize(x, s, z, -128, 127) * s for x, (s, z) in zip(real[1:], (K, V), strict=True))
    want = masked_attention(q, k, v, 2, 0.3, seen, in_bytes=True)
    return np.clip(want, -Y[1] * Y[0], (255 - Y[1]) * Y[0]) if layout == "u8" else want


def cross_inputs(q_lengths: list[int], k_lengths: list[int], rows: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    rng = np.random.default_rng(len(q_lengths))
    masks = {"tokens": mask_of(q_lengths), "keys": mask_of(k_lengths)}
    return [floats(rng, *masks[name].shape, rows) for name in ("tokens", "keys", "keys")], masks


@pytest.mark.parametrize("offset", [None, 0, 60, -2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float_queries_of_one_stream_look_at_another(lengths: tuple[list[int], list[int]], offset: int | None) -> None:
    xs, masks = cross_inputs(*lengths, 2 * 7)
    want = float_wanted(xs, seen_by(masks["tokens"], masks["keys"], offset))
    results = [float_cross(xs, masks, offset, isa, threads) for isa in ISAS for threads in (1, 3)]
    np.testing.assert_allclose(results[0], want, atol=5e-6)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("layout", ["f32", "u8"])
@pytest.mark.parametrize("offset", [None, 0, 60, -2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_int8_queries_of_one_stream_look_at_another(
    lengths: tuple[list[int], list[int]], offset: int | None, layout: str
) -> None:
    xs, masks = cross_inputs(*lengths, 24)
    want = int8_wanted(xs, seen_by(masks["tokens"], masks["keys"], offset), layout)
    results = [int8_cross(xs, masks, offset, isa, threads, layout) for isa in ISAS for threads in (1, 3)]
    np.testing.assert_allclose(results[0], want, atol=0.01 if layout == "f32" else 0.02)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("offset", [0, -1, 3])
def test_an_offset_within_one_stream_moves_the_diagonal(offset: int) -> None:
    xs, masks = cross_inputs([70, 3, 0, 100], [70, 3, 0, 100], 8)
    masks = {"tokens": masks["tokens"]}
    want = float_wanted(xs, seen_by(masks["tokens"], masks["tokens"], offset))
    for isa in ISAS:
        np.testing.assert_allclose(float_cross(xs, masks, offset, isa, 1, same=True), want, atol=5e-6)


def test_what_lies_beside_the_keys_of_a_sequence_does_not_count() -> None:
    xs, masks = cross_inputs([5, 66, 9], [7, 30, 11], 16)
    others = [x.copy() for x in xs]
    for x in others[1:]:
        x[[0, 2]] = np.nan
    got, changed = (float_cross(x, masks, None, "", 1) for x in (xs, others))
    np.testing.assert_array_equal(got[1], changed[1])
    assert not np.array_equal(got[0], changed[0])


def decoder(isa: str, threads: int) -> _native.Program:
    """Two streams embedded, one a decoder that looks at the other twice, with steps of both in turn."""
    rng = np.random.default_rng(5)
    p = _native.Program(isa=isa, threads=threads)
    p.stream("source")
    tables = [floats(rng, 30, 8) for _ in range(2)]
    source, target = p.buffer(8, "f32", "source"), p.buffer(8, "f32")
    p.embed(y=source, tables=[tables[0], floats(rng, 200, 8)], sources=[("input", 0), ("position", 0)])
    p.embed(y=target, tables=[tables[1]], sources=[("input", 1)])
    for _ in range(2):
        m = p.buffer(8, "f32", "source")
        p.linear_float(x=source, y=m, weight=floats(rng, 8, 8), bias=None)
        y, z = p.buffer(8, "f32"), p.buffer(8, "f32")
        p.attention_float(q=target, k=m, v=m, y=y, heads=2, scale=0.5)
        p.attention_float(q=y, k=y, v=y, y=z, heads=2, scale=0.5, causal=True)
        p.binary(a=target, b=z, y=z, op="add")
        source, target = m, z
    top = p.buffer(8, "f32", "first")
    p.first(x=source, y=top)
    p.leave(x=target, slot=0)
    p.leave(x=source, slot=1)
    p.leave(x=top, slot=2)
    p.prepare()
    return p


def test_a_decoder_gives_each_sequence_what_it_gives_alone() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 30, (4, 130)), rng.integers(0, 30, (4, 20))
    masks = {"source": mask_of([130, 9, 70, 1]), "tokens": mask_of([1, 20, 7, 8])}
    results = [decoder(isa, threads).run([source, target], masks=masks) for isa in ISAS for threads in (1, 3)]
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)
    assert [x.shape for x in results[0]] == [(4, 20, 8), (4, 130, 8), (4, 8)]
    p = decoder("", 1)
    for row in range(4):
        rows = {name: mask[row : row + 1] for name, mask in masks.items()}
        alone = p.run([source[row : row + 1], target[row : row + 1]], masks=rows)
        for all_, one in zip(results[0], alone, strict=True):
            np.testing.assert_allclose(all_[row], one[0], rtol=1e-4, atol=1e-5)  # keys come in other panels
    assert not results[0][1][1, 9:].any()  # padding of a stream is zero in its outputs
    _, events = p.run_traced([source, target], masks=masks)
    assert {step for step, *_ in events.tolist()} == set(range(len(p.steps())))


def test_first_tokens_and_the_rest_of_a_stream() -> None:
    rng = np.random.default_rng(1)
    x, row = floats(rng, 3, 90, 5), floats(rng, 5)
    mask = mask_of([90, 1, 20])
    mask[2, 0] = 0  # its first token is padding
    p = _native.Program()
    p.stream("a")
    p.stream("behind", "rest", "a")
    p.stream("again", "prepended", "behind")
    p.stream("one", "first", "a")
    a, b, c = (p.buffer(5, "f32", name) for name in ("a", "behind", "again"))
    back, one, two, both = p.buffer(5, "f32", "a"), *(p.buffer(5, "f32", name) for name in ("one", "first", "first"))
    p.enter(y=a, slot=0)
    p.rest(x=a, y=b)
    p.prepend(x=b, y=c, row=row)
    p.prepend(x=b, y=back, row=row)
    p.first(x=a, y=one)
    p.first(x=c, y=two)
    p.binary(a=one, b=two, y=both, op="add")
    for slot, buffer in enumerate((b, c, back, both)):
        p.leave(x=buffer, slot=slot)
    p.prepare()
    kept = x * mask[..., None].astype(np.float32)
    behind, again, whole, firsts = p.run([x], masks={"a": mask})
    np.testing.assert_array_equal(behind, kept[:, 1:])
    np.testing.assert_array_equal(again[:, 1:], kept[:, 1:])
    np.testing.assert_array_equal(again[:, 0], np.tile(row, (3, 1)))
    np.testing.assert_array_equal(whole[:, 0], row * mask[:, :1])
    np.testing.assert_array_equal(whole[:, 1:], kept[:, 1:])
    np.testing.assert_array_equal(firsts, kept[:, 0] + row)
    assert [out.shape for out in p.run([x[:, :0]])] == [(3, 0, 5), (3, 1, 5), (3, 0, 5), (3, 5)]


def test_patches_behind_a_class_token() -> None:
    x = floats(np.random.default_rng(2), 2, 70, 4)
    net = Net()
    a, y, b = net.enter(4), net.f32(4, "tokens1"), net.f32(4)
    net.program.prepend(x=a, y=y, row=np.zeros(4, np.float32))
    net.program.rest(x=y, y=b)
    np.testing.assert_array_equal(net.run([x], b), x)


def test_first_tokens_look_at_their_sequence() -> None:
    """Attention of one query for each sequence, as poolers have it."""
    rng = np.random.default_rng(3)
    x, mask = floats(rng, 3, 40, 8), mask_of([40, 3, 9])
    net = Net()
    a, top, y = net.enter(8), net.f32(8, "first"), net.f32(8, "first")
    net.program.first(x=a, y=top)
    net.program.attention_float(q=top, k=a, v=a, y=y, heads=2, scale=0.4)
    seen = (mask != 0)[:, None]
    want = masked_attention(x[:, :1].astype(float), x.astype(float), x.astype(float), 2, 0.4, seen)[:, 0]
    np.testing.assert_allclose(net.run([x], y, mask), want, atol=5e-6)


def test_memory_counts_every_stream() -> None:
    p = decoder("", 1)
    source, target = np.zeros((2, 130), np.int64), np.zeros((2, 20), np.int64)
    p.run([source, target])
    _, thread, token = p.need()
    assert p.memory() <= thread + token * 2 * 150 + 16 * token
    p.limit = p.memory() - 1
    with pytest.raises(ValueError, match="memory: 2 sequences of 130 tokens"):
        p.run([source, target])
    p.limit = thread + token * 16
    assert p.run([source[:1, :16], target[:1, :16]])[0].shape == (1, 16, 8)
    used, alone, shared = p.forecast(300, 4)
    assert 1 <= used <= 4 and shared <= alone


def refused_calls(p: _native.Program, x: int, z: int, top: int) -> dict[str, tuple[Callable[[], object], str]]:
    """Calls that a program with streams "tokens" (x), "other" (z) and first tokens (top) must refuse."""
    heads: dict[str, Any] = {"heads": 2, "scale": 1.0}
    y = p.buffer(8, "f32")
    p.stream("behind", "rest", "other")
    behind = p.buffer(8, "f32", "behind")
    row = np.zeros(8, np.float32)
    far = {**heads, "causal": True, "offset": 2**40}
    return {
        "name taken": (lambda: p.stream("other"), "stream: name 'other' is taken"),
        "default name": (lambda: p.stream("tokens"), "is taken"),
        "no name": (lambda: p.stream(""), "stream: name"),
        "long name": (lambda: p.stream("x" * 65), "stream: name"),
        "kind": (lambda: p.stream("n", "last", "other"), "stream: kind 'last' is unknown"),
        "of": (lambda: p.stream("n", "rest", "nowhere"), "stream: of 'nowhere' is unknown"),
        "no of": (lambda: p.stream("n", "rest"), "stream: of must name"),
        "of an input": (lambda: p.stream("n", "input", "other"), "stream: of must be left out"),
        "of first": (lambda: p.stream("n", "rest", "first"), "nothing follows from it"),
        "buffer": (lambda: p.buffer(4, "f32", "nowhere"), "geometry 'nowhere' is unknown"),
        "slot of two": (lambda: p.enter(y=z, slot=0), "already used for another input"),
        "enter": (lambda: p.enter(y=top, slot=7), "enter: y must be of a stream that is read from inputs"),
        "embed": (lambda: p.embed(y=behind, tables=[row[None]], sources=[("position", 0)]), "not of 'behind'"),
        "y": (lambda: p.attention_float(q=x, k=z, v=z, y=p.buffer(8, "f32", "other"), **heads), "stream of q"),
        "k and v": (lambda: p.attention_float(q=x, k=z, v=x, y=y, **heads), "k and v must be of one stream"),
        "first keys": (lambda: p.attention_float(q=x, k=top, v=top, y=y, **heads), "not of first tokens"),
        "causal": (lambda: p.attention_float(q=x, k=z, v=z, y=y, causal=True, **heads), "needs an offset"),
        "offset": (lambda: p.attention_float(q=x, k=z, v=z, y=y, offset=1, **heads), "has no meaning"),
        "far offset": (lambda: p.attention_float(q=x, k=z, v=z, y=y, **far), "offset must lie"),
        "farther": (lambda: p.attention_float(q=x, k=z, v=z, y=y, **{**far, "offset": -(2**63)}), "offset must lie"),
        "binary": (lambda: p.binary(a=x, b=z, y=x, op="add"), "the rows and the stream of x"),
        "residual": (lambda: p.linear_float(x=x, y=y, weight=np.eye(8, dtype=np.float32), bias=None, residual=z),
                     "stream of y"),
        "rest": (lambda: p.rest(x=x, y=behind), "without the first token"),
        "rest of itself": (lambda: p.rest(x=x, y=y), "without the first token"),
        "rest rows": (lambda: p.rest(x=z, y=p.buffer(4, "f32", "behind")), "rows of x"),
        "prepend": (lambda: p.prepend(x=z, y=p.buffer(8, "f32", "tokens1"), row=row), "token before each sequence"),
        "first": (lambda: p.first(x=top, y=top), "first tokens, and x not"),
    }  # fmt: skip


def two_streams() -> tuple[_native.Program, int, int, int]:
    p = _native.Program()
    p.stream("other")
    x, z, top = p.buffer(8, "f32"), p.buffer(8, "f32", "other"), p.buffer(8, "f32", "first")
    p.enter(y=x, slot=0)
    p.enter(y=z, slot=1)
    p.first(x=z, y=top)
    return p, x, z, top


def test_what_does_not_fit_is_refused() -> None:
    for name, (call, text) in refused_calls(*two_streams()).items():
        with pytest.raises(ValueError) as refused:
            call()
            pytest.fail(f"{name} was accepted")
        assert text in str(refused.value), name


def test_too_many_streams_are_refused() -> None:
    p = _native.Program()
    with pytest.raises(ValueError, match="at most 64 streams"):
        for number in range(100):
            p.stream(f"s{number}")


def test_a_stream_that_no_input_gives_is_refused() -> None:
    p, x, *_ = two_streams()
    p.stream("third")
    y = p.buffer(8, "f32", "third")
    p.embed(y=y, tables=[np.zeros((9, 8), np.float32)], sources=[("position", 0)])
    p.leave(x=x, slot=0)
    with pytest.raises(ValueError, match="stream 'third' is read from no input"):
        p.prepare()


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"nowhere": np.ones((2, 3), np.int64)}, "mask of stream 'nowhere' is unknown"),
        ({"first": np.ones((2, 1), np.int64)}, "only streams that are read from inputs"),
        ({"other": np.ones((2, 3), np.int64)}, "mask of stream 'other' must have shape"),
        ({"other": np.ones((2, 4), np.float64)}, "mask of stream 'other' must be"),
        ({"other": "ones"}, "masks must be numpy arrays"),
        ({3: np.ones((2, 4), np.int64)}, "masks must be numpy arrays by names"),
        ({"tokens": np.ones((2, 3), np.int64)}, "mask is given twice"),
        ({"unread": np.ones((2, 3), np.int64)}, "belongs to no step"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: Any, text: str) -> None:
    p, x, *_ = two_streams()
    p.stream("unread")
    p.leave(x=x, slot=0)
    p.prepare()
    inputs = [np.zeros((2, 3, 8), np.float32), np.zeros((2, 4, 8), np.float32)]
    with pytest.raises(ValueError, match=text):
        p.run(inputs, np.ones((2, 3), np.int64), masks)
    assert p.run(inputs, np.ones((2, 3), np.int64), {"other": np.ones((2, 4), bool)})[0].shape == (2, 3, 8)


@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 0, 8), (0, 3, 8)])
def test_streams_have_one_batch(shape: tuple[int, ...]) -> None:
    p, x, *_ = two_streams()
    p.leave(x=x, slot=0)
    p.prepare()
    with pytest.raises(ValueError, match=r"input slot 1 has \d sequences of \d tokens, but input slot 0 has 2 of 3"):
        p.run([np.zeros((2, 3, 8), np.float32), np.zeros(shape, np.float32)])
