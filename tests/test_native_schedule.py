"""How a run is shared among threads: forecasts, traces, and the same bits for any split."""

from __future__ import annotations

import numpy as np
import pytest
from native_reference import Net, dense_weight

from nmcompile import _native


def net(threads: int) -> tuple[Net, int]:
    """Two linear layers with a normalisation between: one phase."""
    rng = np.random.default_rng(0)
    made = Net("", threads)
    q = made.u8(made.enter(64), 64, 0.03, 128)
    h, y = made.program.buffer(256, "f32"), made.program.buffer(64, "f32")
    first, second = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((256, 64), (64, 256)))
    made.program.linear(
        x=q, y=h, weight=dense_weight(first), w_scale=np.full(256, 1e-3, np.float32), bias=None, x_scale=0.03,
        x_zero_point=128,
    )  # fmt: skip
    n = made.program.buffer(256, "u8")
    made.program.layer_norm(x=h, gamma=np.ones(256, np.float32), beta=None, eps=1e-6, q=n, scale=0.02, zero_point=128)
    made.program.linear(
        x=n, y=y, weight=dense_weight(second), w_scale=np.full(64, 1e-3, np.float32), bias=None, x_scale=0.02,
        x_zero_point=128,
    )  # fmt: skip
    return made, y


@pytest.mark.parametrize("tokens", [1, 16, 63, 64, 100, 130, 300, 385])
def test_any_split_gives_the_same_bits(tokens: int) -> None:
    x = np.random.default_rng(tokens).standard_normal((1, tokens, 64)).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 5, 8):
        made, y = net(threads)
        results.append(made.run([x], y))
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


def test_a_forecast_grows_with_threads_and_never_uses_too_many() -> None:
    made, y = net(1)
    made.run([np.zeros((1, 4, 64), np.float32)], y)
    before = 0.0
    for threads in (1, 2, 4, 8, 64):
        used, alone, shared = made.program.forecast(4096, threads)
        assert 1 <= used <= threads
        assert alone / shared >= before * 0.999
        before = alone / shared
    assert before > 20  # 64 panels on 64 threads
    used, alone, shared = made.program.forecast(1, 64)
    assert shared <= alone  # a task too small to share is not shared


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [16, 200])
def test_a_trace_covers_every_step_of_every_panel(threads: int, tokens: int) -> None:
    made, y = net(threads)
    x = np.zeros((1, tokens, 64), np.float32)
    made.run([x], y)
    _, events = made.program.run_traced([x])
    steps = len(made.program.steps())
    panels = -(-tokens // 64)
    assert {(step, panel) for step, _, panel, _, _ in events.tolist()} == {
        (step, panel) for step in range(steps) for panel in range(panels)
    }
    assert (events[:, 3] <= events[:, 4]).all()
    for thread in range(threads):  # a thread does one thing at a time
        mine = events[events[:, 1] == thread]
        assert (mine[1:, 3] >= mine[:-1, 4]).all()


def test_products_are_timed_without_a_program() -> None:
    weight = dense_weight(np.ones((32, 64), np.int8))
    assert _native.time_products(weight, 64, 32, 20, 3) > 0
    with pytest.raises(ValueError, match="weight values"):
        _native.time_products(weight, 128, 32, 20, 3)
