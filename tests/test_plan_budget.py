"""A plan takes no more memory and time than it may: what it states, bounds at load and at each run."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import compiled
from native_reference import dense_weight
from small_plans import ENTER, FEATURES, IDS, LEAVE, SLOWER, header, many_buffers, native, refused

import nmcompile
from nmcompile import _native
from nmcompile.backends.cpu import budget
from nmcompile.errors import InputError
from nmcompile.plan import read_plan, write_plan
from nmcompile.session import load_cpu


def test_a_small_plan_cannot_ask_for_gigabytes(tmp_path: Path) -> None:
    embed = {"step": "embed", "y": 0, "tables": [{"array": "t"}], "sources": [["input", 0]]}
    content = header(many_buffers(12, 1 << 20, embed), takes=IDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = {"t": np.zeros((1, 1 << 20), np.float16)}
    refused(tmp_path / "a.plan", content, r"needs 3\d\d\d MB for a single token, more than 384 MB", table)
    refused(tmp_path / "a.plan", content, r"more than 1024 MB", table, memory=1 << 30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_results_and_lookups_count_as_memory() -> None:
    program = _native.Program(threads=1)
    x = program.buffer(8, "f32")
    table = np.zeros((3, 8), np.float32)
    program.embed(y=x, tables=[table] * 5, sources=[("input", 0)] * 5)
    for slot in range(3):
        program.leave(x=x, slot=slot)
    program.prepare()
    copied, thread, token = program.need()
    assert (copied, thread) == (0, 64 * 8 * 4)  # the buffer lives in one phase: a panel of 64 tokens
    assert token == 5 * 4 + 3 * 8 * 4


def test_a_plan_that_takes_more_than_it_states_is_refused(tmp_path: Path) -> None:
    segment = native([[4, "f32", "tokens"]], [ENTER, LEAVE])
    found = {"fixed": 64 * 4 * 4, "token": 4 * 4}
    write_plan(tmp_path / "a.plan", header(segment, memory=found), {}, {})
    nmcompile.load(tmp_path / "a.plan")
    for wrong in ({**found, "fixed": 1023}, {**found, "token": 15}, {**found, "token": "16"}, {**found, "token": None}):
        refused(tmp_path / "a.plan", header(segment, memory=wrong), "bytes of memory .*, but states")
    refused(tmp_path / "a.plan", header(segment, memory=[]), "statement of its memory is damaged")


@pytest.mark.parametrize("name", ["bert-torchscript", "gpt2-torchscript", "vit-torchscript", "t5-torchscript"])
def test_a_compiled_plan_states_what_its_programs_need(name: str) -> None:
    with read_plan(compiled(name).plan) as plan:
        told = plan.header["memory"]
        session = load_cpu(compiled(name).plan)
        assert told == budget.stated([s.program for s in session._segments if hasattr(s, "program")])
        assert 0 < told["token"] < 100_000


def test_a_run_beyond_the_memory_is_an_error_before_it_begins(tmp_path: Path) -> None:
    takes = {**FEATURES, "shape": [None, None, 1 << 14]}
    write_plan(tmp_path / "a.plan", header(many_buffers(12, 1 << 14, ENTER), takes=takes), {}, {})
    session = load_cpu(tmp_path / "a.plan", memory=80 << 20, threads=1)
    session.run({"x": np.zeros((1, 8, 1 << 14), np.float32)})
    said = r"8 sequences of 128 tokens take \d+ MB, more than the 80 MB allowed; run smaller"
    with pytest.raises(InputError, match=said):
        session.run({"x": np.zeros((8, 128, 1 << 14), np.float32)})
    assert session.memory() < 80 << 20


@pytest.mark.parametrize("memory", [0, -1, 1000, "1G", 2.5e9, True, 1 << 60])
def test_memory_that_is_no_number_of_bytes(memory: Any) -> None:
    with pytest.raises(InputError, match="is no number of bytes"):
        nmcompile.load(compiled("bert-torchscript").plan, memory=memory)


def test_steps_that_share_a_weight_share_its_copy() -> None:
    """A file of some megabytes could else be copied for each of thousands of steps."""
    weight, scale = np.ones((256, 256), np.float32), np.ones(256, np.float32)
    packed = dense_weight(np.ones((256, 256), np.int8))

    def copied(steps: int, most: int = 0) -> int:
        program = _native.Program(threads=1, most_copied=most)
        x, q, y = program.buffer(256, "f32"), program.buffer(256, "u8"), program.buffer(256, "f32")
        program.enter(y=x, slot=0)
        program.quantize(x=x, y=q, scale=1.0, zero_point=0)
        for _ in range(steps):
            program.linear_float(x=x, y=y, weight=weight, bias=None)
            program.linear(x=q, y=y, weight=packed, w_scale=scale, bias=None, x_scale=1.0, x_zero_point=3)
        program.leave(x=y, slot=0)
        program.prepare()
        return program.need()[0]

    assert copied(1) > weight.nbytes
    assert copied(100) < 3 * weight.nbytes
    with pytest.raises(ValueError, match="linear: would copy, with the steps before, more than 300000 bytes"):
        copied(100, 300_000)


def test_load_time_is_not_quadratic_in_buffers(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        write_plan(tmp_path / "a.plan", header(many_buffers(count, 4)), {}, {})
        begin = time.process_time()
        nmcompile.load(tmp_path / "a.plan", threads=1)
        return time.process_time() - begin

    assert seconds(16_000) < 4 * SLOWER  # 0.8 measured; sorting what lives beside each buffer took 40


def test_counts_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    small = native([[4, "f32", "tokens"]], [ENTER, LEAVE])
    refused(path, header(native([[4, "f32", "tokens"]] * 20_000, [ENTER, LEAVE])), "at most 16384 buffers")
    adds = [{"step": "unary", "x": 0, "y": 0, "op": "relu"}] * 70_000
    refused(path, header(native([[4, "f32", "tokens"]], [ENTER, *adds, LEAVE])), "at most 65536 steps")
    refused(path, header(*[small] * 1100), "1100 segments")
    refused(path, header(small, takes={**FEATURES, "shape": [1] * 65}), "at most 64 sizes")
    many = [{**FEATURES, "name": f"x{i}"} for i in range(5000)]
    refused(path, {**header(small), "inputs": many}, "not a list of at most 4096")
    tables = {"step": "embed", "y": 0, "tables": [{"array": "t"}] * 65, "sources": [["input", 0]] * 65}
    refused(path, header(native([[4, "f32", "tokens"]], [tables, LEAVE]), takes=IDS), "must be at most 64",
            {"t": np.zeros((1, 4), np.float32)})  # fmt: skip
