"""What a program refuses, and that it may be run from many threads, after fork and for many shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_reference import ISAS, Net, block_weight, dense_weight, ragged_mask, sparse

from nmcompile import _native


def transformer(
    isa: str = "", threads: int = 0, layers: int = 2, rows: int = 64, costs: dict[str, float] | None = None
) -> _native.Program:
    """A small encoder of all the steps that matter."""
    rng = np.random.default_rng(0)
    p = _native.Program(isa=isa, threads=threads, costs=costs)
    x = p.buffer(rows, "f32")
    p.embed(y=x, tables=[rng.standard_normal((100, rows)).astype(np.float32)], sources=[("input", 0)])
    ones = np.full(rows, 0.002, np.float32)
    for _ in range(layers):
        u = p.buffer(rows, "u8")
        gamma = np.ones(rows, np.float32)
        p.layer_norm(x=x, gamma=gamma, beta=None, eps=1e-5, y=x, q=u, scale=0.03, zero_point=128)
        q, k, v, a = (p.buffer(rows, layout) for layout in ("u8", "keys", "values", "u8"))
        for out in (q, k, v):
            w = sparse(rng, rows, rows, 2, 0.4)
            p.linear(
                x=u, y=out, weight=block_weight(w, 2), w_scale=ones, bias=None, x_scale=0.03,
                x_zero_point=128, y_scale=0.05, y_zero_point=128 if out == q else 0,
            )  # fmt: skip
        p.attention(
            q=q, k=k, v=v, y=a, heads=4, scale=0.25, q_scale=0.05, q_zero_point=128, k_scale=0.05,
            v_scale=0.05, y_scale=0.05, y_zero_point=128,
        )  # fmt: skip
        w = sparse(rng, rows, rows, 1, 1.0)
        y = p.buffer(rows, "f32")
        p.linear(
            x=a, y=y, weight=dense_weight(w), w_scale=ones, bias=gamma, x_scale=0.05, x_zero_point=128,
            activation="gelu", residual=x,
        )  # fmt: skip
        x = y
    top = p.buffer(rows, "f32", "first")
    p.first(x=x, y=top)
    p.leave(x=x, slot=0)
    p.leave(x=top, slot=1)
    p.prepare()
    return p


def case(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    batch, length = int(rng.integers(1, 6)), int(rng.integers(1, 150))
    return [rng.integers(0, 100, (batch, length))], ragged_mask(rng, batch, length)


def test_whole_program_has_the_same_bits_everywhere() -> None:
    programs = [transformer(isa, threads) for isa in ISAS for threads in (1, 2)]
    for seed in range(4):
        inputs, mask = case(seed)
        results = [p.run(inputs, mask) for p in programs]
        for result in results[1:]:
            for a, b in zip(results[0], result, strict=True):
                np.testing.assert_array_equal(a, b)


def test_padding_does_not_change_the_rest() -> None:
    p = transformer()
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 100, (1, 37))
    alone = p.run([ids])[0]
    batch = np.zeros((3, 80), np.int64)
    mask = np.zeros((3, 80), np.int64)
    for row in range(3):
        batch[row, :37], mask[row, :37] = ids, 1
    batch[1] = rng.integers(0, 100, 80)
    mask[1] = 1
    out = p.run([batch], mask)[0]
    for row in (0, 2):
        np.testing.assert_array_equal(out[row, :37], alone[0])
        assert not out[row, 37:].any()


def test_concurrent_runs() -> None:
    p = transformer()
    cases = [case(seed) for seed in range(8)]
    alone = [p.run(*c) for c in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for a, b in zip(alone, pool.map(lambda c: p.run(*c), cases), strict=True):
                np.testing.assert_array_equal(a[0], b[0])
    assert p.memory() > 0


def test_a_forked_child_runs_with_threads() -> None:
    code = """
import os, sys, numpy as np
sys.path.insert(0, sys.argv[1])
from test_native_program import transformer, case
p = transformer(threads=2)
inputs, mask = case(3)
want = p.run(inputs, mask)[0]
child = os.fork()
if child == 0:
    ok = all(np.array_equal(p.run(inputs, mask)[0], want) for _ in range(20))
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(p.run(inputs, mask)[0], want)
"""
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here], check=True, timeout=60)


def test_a_child_forked_in_the_middle_of_another_run_is_not_stuck() -> None:
    code = """
import os, signal, threading, time, numpy as np
from nmcompile import _native
p = _native.Program(threads=1)
x = p.buffer(4, "f32")
p.enter(y=x, slot=0)
for _ in range(1500):  # many buffers: planning a new shape takes long
    y = p.buffer(4, "f32")
    p.unary(x=x, y=y, op="relu")
    x = y
p.leave(x=x, slot=0)
p.prepare()
stop = False
def other():
    n = 0
    while not stop:
        n = n % 6400 + 16
        p.run([np.zeros((1, n, 4), np.float32)])
thread = threading.Thread(target=other)
thread.start()
stuck = False
for _ in range(60):
    child = os.fork()
    if child == 0:
        p.run([np.zeros((1, 1, 4), np.float32)])
        os._exit(0)
    end = time.monotonic() + 10
    while not os.waitpid(child, os.WNOHANG)[0] and not stuck:
        time.sleep(0.001)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            stuck = True
    if stuck:
        break
stop = True
thread.join()
assert not stuck
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_any_sequence_of_inputs_and_sources() -> None:
    p = _native.Program()
    y = p.buffer(3, "f32")
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    p.embed(y=y, tables=(table,), sources=(("input", 0),))
    p.leave(x=y, slot=0)
    p.prepare()
    np.testing.assert_array_equal(p.run((np.array([[2, 1]]),))[0], table[[[2, 1]]])


def test_isa_is_chosen_by_name_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native.Program().isa == os.environ.get("NMCOMPILE_ISA", ISAS[0])
    monkeypatch.setenv("NMCOMPILE_ISA", "scalar")
    assert _native.Program().isa == "scalar"
    assert _native.Program(isa=ISAS[0]).isa == ISAS[0]
    monkeypatch.setenv("NMCOMPILE_ISA", "mmx")
    with pytest.raises(ValueError, match="NMCOMPILE_ISA: 'mmx' is unknown"):
        _native.Program()
    with pytest.raises(ValueError, match="threads"):
        _native.Program(isa="scalar", threads=-1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_bad_floats_do_not_crash(bad: float) -> None:
    x = np.ones((2, 20, 16), np.float32)
    x[0, 3, 5] = bad
    for isa in ISAS:
        net = Net(isa)
        a, y = net.enter(16), net.f32(16)
        net.program.layer_norm(x=a, gamma=np.ones(16, np.float32), beta=None, eps=0.0, y=y)
        net.program.attention_float(q=a, k=y, v=y, y=net.f32(16), heads=2, scale=1.0)
        for op in ("gelu", "tanh", "silu", "gelu_tanh"):
            net.program.unary(x=y, y=y, op=op)
        u = net.u8(y, 16, 0.1, 3)
        assert net.run([x], net.float_of(u, 16)).shape == x.shape


GOOD = sparse(np.random.default_rng(0), 8, 12, 2, 0.9)


def changed(**parts: Any) -> dict[str, Any]:
    return {**block_weight(GOOD, 2), **parts}


ONES = np.ones(8, np.float32)
HOSTILE: dict[str, dict[str, Any]] = {
    "format": {"weight": changed(format="csr")},
    "rows": {"weight": changed(rows=3)},
    "rows too large": {"weight": changed(rows=2**40)},
    "values shape": {"weight": changed(values=np.zeros((3, 2, 4), np.int8))},
    "values type": {"weight": changed(values=np.zeros_like(block_weight(GOOD, 2)["values"], np.uint8))},
    "columns type": {"weight": changed(columns=np.zeros(11, np.int64))},
    "columns range": {"weight": changed(columns=np.full_like(block_weight(GOOD, 2)["columns"], 3))},
    "columns missing": {"weight": {"format": "blocks", "rows": 2, "values": np.zeros((0, 2, 4), np.int8)}},
    "starts length": {"weight": changed(starts=np.zeros(4, np.uint32))},
    "starts fall": {"weight": changed(starts=np.array([0, 9, 1, 2, len(block_weight(GOOD, 2)["columns"])], np.uint32))},
    "starts end": {"weight": changed(starts=np.array([0, 1, 2, 3, 4000], np.uint32))},
    "dense shape": {"weight": {"format": "dense", "values": np.zeros((2, 3, 4, 5), np.int8)}},
    "dense text": {"weight": {"format": "dense", "values": "abc"}},
    "w_scale": {"w_scale": np.ones(7, np.float32)},
    "w_scale type": {"w_scale": np.ones(8)},
    "bias": {"bias": np.ones((8, 1), np.float32)},
    "x": {"x": 999},
    "x negative": {"x": -7},
    "x layout": {"x": 0},
    "y is x": {"y": 1},
    "y": {"y": 1 << 20},
    "y geometry": {"y": 3},
    "residual": {"residual": 0},
    "residual range": {"residual": -2},
    "activation": {"activation": "swishy"},
    "x_scale": {"x_scale": 0.0},
    "x_scale nan": {"x_scale": float("nan")},
    "x_zero_point": {"x_zero_point": 256},
    "y_scale": {"y_scale": -1.0},
    "y_zero_point": {"y_zero_point": 1 << 40},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_linear_refuses(what: str) -> None:
    p = _native.Program()
    x, q, y = p.buffer(12, "f32"), p.buffer(12, "u8"), p.buffer(8, "f32")
    p.buffer(8, "f32", "first")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=q, scale=1.0, zero_point=0)
    good: dict[str, Any] = {
        "x": q, "y": y, "weight": block_weight(GOOD, 2), "w_scale": ONES, "bias": None, "x_scale": 1.0,
        "x_zero_point": 0,
    }  # fmt: skip
    with pytest.raises(ValueError):
        p.linear(**{**good, **HOSTILE[what]})
    p.linear(**good)


def hostile_steps(p: _native.Program, x: int, u: int, top: int) -> dict[str, Callable[[], object]]:
    table = np.zeros((4, 12), np.float32)
    norm: dict[str, Any] = {"x": x, "gamma": np.ones(12, np.float32), "beta": None, "eps": 0.1}
    heads: dict[str, Any] = {"q": x, "k": x, "v": x, "y": p.buffer(12, "f32"), "scale": 1.0}
    unwritten = p.buffer(12, "f32")
    return {
        "rows": lambda: p.buffer(0, "f32"),
        "rows huge": lambda: p.buffer(1 << 50, "f32"),
        "layout": lambda: p.buffer(4, "f64"),
        "geometry": lambda: p.buffer(4, "f32", "tokens2"),
        "unwritten": lambda: p.leave(x=unwritten, slot=0),
        "slot": lambda: p.leave(x=x, slot=-1),
        "slot huge": lambda: p.enter(y=x, slot=1 << 40),
        "slot clash": lambda: p.patches(y=x, slot=0, channels=3, patch_h=2, patch_w=2),
        "patch": lambda: p.patches(y=x, slot=1, channels=1 << 40, patch_h=2, patch_w=2),
        "table": lambda: p.embed(y=x, tables=[table[:, :3]], sources=[("input", 1)]),
        "sources": lambda: p.embed(y=x, tables=[table], sources=[]),
        "source kind": lambda: p.embed(y=x, tables=[table], sources=[("magic", 1)]),
        "source slot": lambda: p.embed(y=x, tables=[table], sources=[("input", 1 << 33)]),
        "source parts": lambda: p.embed(y=x, tables=[table], sources=[("input",)]),
        "source type": lambda: p.embed(y=x, tables=[table], sources=["input"]),  # type: ignore[list-item]
        "constant": lambda: p.embed(y=x, tables=[table], sources=[("constant", 4)]),
        "gamma": lambda: p.layer_norm(**{**norm, "gamma": np.ones(11, np.float32), "y": x}),
        "eps": lambda: p.layer_norm(**{**norm, "eps": float("nan"), "y": x}),
        "norm goes nowhere": lambda: p.layer_norm(**norm),
        "norm q": lambda: p.layer_norm(**norm, q=x),
        "quantize": lambda: p.quantize(x=x, y=u, scale=0.0, zero_point=0),
        "quantize zero": lambda: p.quantize(x=x, y=u, scale=1.0, zero_point=-1),
        "heads": lambda: p.attention_float(**heads, heads=5),
        "heads zero": lambda: p.attention_float(**heads, heads=0),
        "attention first": lambda: p.attention_float(q=top, k=top, v=top, y=top, heads=1, scale=1.0),
        "attention scale": lambda: p.attention_float(**{**heads, "scale": -1.0}, heads=2),
        "attention y": lambda: p.attention_float(**{**heads, "y": x}, heads=2),
        "unary": lambda: p.unary(x=x, y=x, op="erf"),
        "unary rows": lambda: p.unary(x=x, y=top, op="relu"),
        "binary": lambda: p.binary(a=x, b=top, y=x, op="add"),
        "binary op": lambda: p.binary(a=x, b=x, y=x, op="pow"),
        "affine": lambda: p.affine(x=x, y=x, mul=np.ones(3, np.float32), add=None),
        "positions": lambda: p.add_positions(x=x, y=x, table=np.zeros((3, 3), np.float32)),
        "prepend": lambda: p.prepend(x=x, y=x, row=np.zeros(12, np.float32)),
        "first": lambda: p.first(x=top, y=top),
        "float weight": lambda: p.linear_float(x=x, y=top, weight=np.zeros((12, 12), np.float32), bias=None),
    }


def test_other_steps_refuse() -> None:
    p = _native.Program()
    x, u, top = p.buffer(12, "f32"), p.buffer(12, "u8"), p.buffer(12, "f32", "first")
    p.enter(y=x, slot=0)
    p.first(x=x, y=top)
    for name, step in hostile_steps(p, x, u, top).items():
        with pytest.raises(ValueError):
            step()
            pytest.fail(f"{name} was accepted")


def test_run_refuses() -> None:
    net = Net()
    x = net.enter(4)
    good = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="prepare"):
        net.program.run([good])
    net.run([good], x)
    p = net.program
    for inputs in ([], [good, good], [good[0]], [good[..., :3]], [good.astype(np.float64)], ["abc"]):
        with pytest.raises(ValueError):
            p.run(inputs)  # type: ignore[arg-type]
    for mask in (np.ones((2, 4), np.int64), np.ones(6, np.int64), np.ones((2, 3), np.complex64)):
        with pytest.raises(ValueError, match="mask"):
            p.run([good], mask)
    with pytest.raises(ValueError, match="already prepared"):
        p.unary(x=x, y=x, op="relu")
    with pytest.raises(ValueError, match="already prepared"):
        p.prepare()
    np.testing.assert_array_equal(p.run([np.asfortranarray(good)])[0], good)


@pytest.mark.parametrize("value", [-1, 100, 2**40])
def test_ids_outside_the_table(value: int) -> None:
    ids = np.zeros((1, 5), np.int64)
    ids[0, 3] = value
    with pytest.raises(ValueError, match=rf"token id {value} at \[0, 3\] of input slot 0 is outside 0\.\.99"):
        transformer().run([ids])


def test_an_unfinished_program_is_refused() -> None:
    p = _native.Program()
    with pytest.raises(ValueError, match="no step reads an input"):
        p.prepare()
    x = p.buffer(3, "f32")
    p.enter(y=x, slot=1)
    p.leave(x=x, slot=1)
    with pytest.raises(ValueError, match="input slot 0"):
        p.prepare()
    p.enter(y=x, slot=0)
    with pytest.raises(ValueError, match="output slot 0"):
        p.prepare()


def test_unaligned_and_read_only_arrays() -> None:
    raw = np.zeros(8 * 12 * 4 + 1, np.uint8)
    table = raw[1:].view(np.float32).reshape(8, 12)
    table[:] = np.arange(96).reshape(8, 12)
    table.flags.writeable = False
    p = _native.Program()
    y = p.buffer(12, "f32")
    p.embed(y=y, tables=[table], sources=[("input", 0)])
    p.leave(x=y, slot=0)
    p.prepare()
    ids = np.arange(8).reshape(1, 8)
    want = table.copy()
    del raw, table
    np.testing.assert_array_equal(p.run([ids])[0][0], want)


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    p = transformer(threads=1)
    p.run([np.zeros((4, 100), np.int64)])
    before = p.memory()
    for length in range(1, 100, 7):
        p.run([np.zeros((4, length), np.int64)])
    assert p.memory() == before
    outputs, nanoseconds = p.run_profiled([np.zeros((4, 100), np.int64)])
    assert len(outputs) == 2 and len(nanoseconds) == len(p.steps())
