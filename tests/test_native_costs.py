"""What the engine says of itself is what it takes, and costs reach its schedule without changing a bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_reference import Net
from test_native_program import transformer
from test_native_schedule import net

from nmcompile import _native
from nmcompile.backends.cpu import measure, tuning
from nmcompile.backends.cpu.measure import Case, made_up
from nmcompile.backends.cpu.pack import DENSE, ENGINE, FLOAT, KERNELS, MAX_INPUTS, QUANTIZE, Kind


def add_layer(kind: Kind, inputs: int) -> None:
    """One layer of 4 outputs in a program of its own. ValueError where the engine does not take it."""
    p = _native.Program(threads=1)
    x, q, y = p.buffer(inputs, "f32"), p.buffer(inputs, "u8"), p.buffer(4, "f32")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=q, scale=1.0, zero_point=0)
    row = np.ones(4, np.float32)
    if kind.format == "float":
        p.linear_float(x=x, y=y, weight=np.zeros((4, inputs), np.float32), bias=None)
    else:
        p.linear(x=q, y=y, weight=made_up(4, inputs, kind, 0.01), w_scale=row, bias=None, x_scale=1.0, x_zero_point=0)


@pytest.mark.parametrize("kind", KERNELS, ids=str)
def test_every_kernel_takes_as_many_inputs_as_it_says_and_no_more(kind: Kind) -> None:
    most = KERNELS[kind].most_inputs
    add_layer(kind, most)
    with pytest.raises(ValueError, match="rows"):
        add_layer(kind, most + 1)


def test_what_the_matcher_asks_is_what_every_int8_kernel_takes() -> None:
    assert {kernel.most_inputs for kind, kernel in KERNELS.items() if kind != FLOAT} == {MAX_INPUTS}


@pytest.mark.parametrize("kind", [Kind("blocks", 3), Kind("blocks", 32), Kind("gather", 8), Kind("csr", 4)], ids=str)
def test_other_kernels_are_refused(kind: Kind) -> None:
    assert kind not in KERNELS
    with pytest.raises(ValueError, match=r"linear: weight (rows|format)"):
        add_layer(kind, 64)


def test_names_are_those_that_programs_take() -> None:
    p = _native.Program()
    for layout in ENGINE.layouts:
        for stream in ENGINE.streams:
            p.buffer(4, layout, stream)
    for kind in ENGINE.stream_kinds:
        p.stream(kind + "!", kind, "" if kind == "input" else "tokens")
    x = p.buffer(4, "f32")
    p.enter(y=x, slot=0)
    for activation in ENGINE.activations:
        p.unary(x=x, y=x, op=activation)
    assert all(callable(getattr(p, step)) for step in ENGINE.steps)
    with pytest.raises(ValueError, match=f"choose one of {', '.join(ENGINE.activations)}"):
        p.unary(x=x, y=x, op="erf")


def every_step(costs: dict[str, float] | None = None) -> _native.Program:
    """A program of each step once."""
    made = Net(costs=costs)
    p, rows, row = made.program, 16, np.ones(16, np.float32)
    x = made.enter(rows)
    images, behind, top = p.buffer(rows, "f32"), p.buffer(rows, "f32", "tokens1"), p.buffer(rows, "f32", "first")
    p.patches(y=images, slot=1, channels=4, patch_h=2, patch_w=2)
    p.embed(y=images, tables=[np.zeros((9, rows), np.float32)], sources=[("position", 0)])
    p.prepend(x=images, y=behind, row=row)
    p.first(x=behind, y=top)
    p.rest(x=behind, y=images)
    u = made.u8(x, rows, 1.0, 0)
    p.layer_norm(x=x, gamma=row, beta=None, eps=1.0, y=x)
    k, v = p.buffer(rows, "keys"), p.buffer(rows, "values")
    weight = made_up(rows, rows, DENSE, 1.0)
    for y in (k, v):
        p.linear(x=u, y=y, weight=weight, w_scale=row, bias=None, x_scale=1.0, x_zero_point=0)
    p.attention(q=u, k=k, v=v, y=x, heads=1, scale=1.0, q_scale=1.0, q_zero_point=0, k_scale=1.0, v_scale=1.0)
    p.attention_float(q=x, k=x, v=x, y=images, heads=1, scale=1.0)
    p.linear_float(x=images, y=x, weight=np.eye(rows, dtype=np.float32), bias=None)
    p.unary(x=x, y=x, op="relu")
    p.binary(a=x, b=x, y=x, op="add")
    p.affine(x=x, y=x, mul=row, add=None)
    p.add_positions(x=x, y=x, table=np.zeros((9, rows), np.float32))
    p.leave(x=x, slot=0)
    p.prepare()
    return p


def test_the_list_of_steps_is_whole() -> None:
    assert {kind for kind, _ in every_step().steps()} == set(ENGINE.steps)


def test_what_the_engine_says_cannot_be_changed() -> None:
    engine: Any = ENGINE
    for owner, name in ((engine, "group"), (engine.choice, "epilogue"), (engine.kernels[0], "near")):
        with pytest.raises(AttributeError):
            setattr(owner, name, 1)
    with pytest.raises(TypeError):
        engine.costs["wake"] = 0


@pytest.mark.parametrize(
    ("costs", "text"),
    [({"waken": 1.0}, "costs know no 'waken'"), ({3: 1.0}, "numbers by names"), ({"wake": "x"}, "must be a number"),
     ({"wake": -1.0}, r"wake must lie in 0\.\.1e9"), ({"wake": float("nan")}, "wake must lie"),
     ({"wake": float("inf")}, "wake must lie")],
)  # fmt: skip
def test_costs_that_are_none_are_refused(costs: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _native.Program(costs=costs)


@pytest.mark.parametrize("times", [{99: 1.0}, {-1: 1.0}, {0: -1.0}, {0: float("nan")}, {0: 1e13}, {"x": 1.0}, {0: "x"}])
def test_times_that_are_none_are_refused(times: Any) -> None:
    made, y = net(1)
    with pytest.raises(ValueError, match="measured: call prepare"):
        made.program.measured({})
    made.run([np.zeros((1, 4, 64), np.float32)], y)
    with pytest.raises(ValueError, match=r"measured: (step|nanoseconds)"):
        made.program.measured(times)


def waking(nanoseconds: float, **costs: float) -> tuple[int, float, float]:
    p = _native.Program(threads=2, costs={"wake": nanoseconds, **costs})
    x, y = p.buffer(256, "f32"), p.buffer(256, "f32")
    p.enter(y=x, slot=0)
    p.linear_float(x=x, y=y, weight=np.zeros((256, 256), np.float32), bias=None)
    p.leave(x=y, slot=0)
    p.prepare()
    return p.forecast(64, 2)


def test_figures_of_a_program_reach_its_schedule() -> None:
    assert waking(0)[0] == 2
    assert waking(1e9)[0] == 1
    assert waking(0)[2] + 1000 == pytest.approx(waking(1000)[2])
    assert waking(ENGINE.costs["wake"]) == waking(20e3)


THREADS = {"barrier", "barrier_member", "wake"}  # of the schedule itself
NO_TIME = {"strip_epilogue"}  # shares out strips


@pytest.mark.parametrize("name", sorted(set(ENGINE.costs) - THREADS - NO_TIME))
def test_every_figure_of_a_step_counts(name: str) -> None:
    assert every_step({name: 1e6}).forecast(64, 1)[1] > 2 * every_step().forecast(64, 1)[1]


@pytest.mark.parametrize("name", sorted(THREADS))
def test_every_figure_of_threads_counts(name: str) -> None:
    assert waking(0)[0] == 2
    assert waking(0, **{name: 1e9})[0] == 1


def test_measured_times_reach_the_schedule_and_change_no_bit() -> None:
    made, y = net(2)
    x = np.random.default_rng(0).standard_normal((1, 300, 64)).astype(np.float32)
    before = made.run([x], y)
    p = made.program
    quick = p.forecast(300, 2)
    p.measured({step: 1e5 for step in range(len(p.steps()))})
    slow = p.forecast(300, 2)
    assert slow[1] > 100 * quick[1] and slow[0] == 2
    np.testing.assert_array_equal(p.run([x])[0], before)
    p.measured({step: 0.0 for step in range(len(p.steps()))})
    assert p.forecast(300, 2)[0] == 1
    np.testing.assert_array_equal(p.run([x])[0], before)
    _, events = p.run_traced([x])
    assert set(events[:, 1]) == {0}  # steps that take no time are not worth a second thread


def test_figures_change_no_bit() -> None:
    ids = np.random.default_rng(1).integers(0, 100, (3, 90))
    want = transformer(threads=3).run([ids])
    for costs in ({"strip_epilogue": 0.0, "wake": 0.0}, {"barrier": 0.0, "barrier_member": 0.0, "strip_epilogue": 1e9}):
        for a, b in zip(want, transformer(threads=3, costs=costs).run([ids]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_a_run_takes_is_told_by_step() -> None:
    made, y = net(1)
    x = np.zeros((1, 200, 64), np.float32)
    made.run([x], y)
    costs = measure.step_costs(lambda: made.program.run_costs([x]), repeats=2)
    assert list(costs) == list(range(len(made.program.steps())))
    assert all(cost > 0 for cost in costs.values())
    alone = made.program.run_costs([x[:, :0]])
    assert alone == {}
    made.program.measured(costs)
    assert made.program.forecast(200, 1)[1] == pytest.approx(sum(costs.values()) * 208)  # lanes


def test_a_tuning_table_gives_the_costs_of_steps() -> None:
    table = tuning.Table("cpu", "scalar", "engine", entries={(256, 64, DENSE, 1.0): 64.0, (0, 64, QUANTIZE, 1.0): 12.8})
    steps = {1: Case(0, 64, QUANTIZE), 2: Case(256, 64, DENSE), 4: Case(64, 256, DENSE)}
    costs = table.step_costs(steps)
    assert costs == {1: pytest.approx(100.0), 2: pytest.approx(500.0)}  # none for the shape that was not timed
    made, y = net(1)
    made.run([np.zeros((1, 4, 64), np.float32)], y)
    before = made.program.forecast(64, 1)[1]
    made.program.measured(costs)
    assert made.program.forecast(64, 1)[1] > before + 64 * 500
