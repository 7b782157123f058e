"""Choosing kernels by a table of times: interpolation, files, the cache. The times are made up; none is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nmcompile.backends.cpu import tuning
from nmcompile.backends.cpu.measure import Case
from nmcompile.backends.cpu.pack import DENSE, FLOAT, GATHERS, QUANTIZE, Kind, cheapest, fills, pack_as, pack_gather
from nmcompile.backends.cpu.tuning import GRID, Table, Tuner, by_cost_model, cached, imported, keep, read_table
from nmcompile.errors import InputError

BLOCKS2 = Kind("blocks", 2)


class Clock:
    """Made-up times: a constant part and one in proportion to the filled weights; `slow` factors by kernel format."""

    def __init__(self, **slow: float) -> None:
        self.slow = slow
        self.phase = 1.0
        self.asked: list[list[Case]] = []

    def __call__(self, cases: Sequence[Case]) -> list[float]:
        self.asked.append(list(cases))
        return [self.seconds(case) * self.phase for case in cases]

    def seconds(self, case: Case) -> float:
        if case.kind == QUANTIZE:
            return case.inputs * 1e-8
        work = case.outputs * (case.inputs * case.density + 30)
        work *= 1 + 0.2 / max(case.kind.rows, 1) if case.kind.rows else 1
        return work * self.slow.get(case.kind.format, 1.0) * 1e-9


def table() -> Table:
    return Table("a cpu", "avx2", "0123")


def tuner(clock: Clock | None = None, known: Table | None = None, gather: bool = False) -> Tuner:
    return Tuner(known or table(), clock, gather)


def weight(rows: int = 2, share: float = 0.2, shape: tuple[int, int] = (64, 64), columns: int = 4) -> np.ndarray:
    """int8 of filled blocks rows x columns, exactly a share of them."""
    n, k = shape
    units = np.arange(n // rows * (k // columns)) < round(share * (n // rows) * (k // columns))
    keep = np.random.default_rng(0).permutation(units).reshape(n // rows, k // columns)
    return np.kron(keep, np.full((rows, columns), 3)).astype(np.int8)


# ---- the choice --------------------------------------------------------------------------------------------------


def test_the_fastest_by_the_table_is_taken() -> None:
    choice = tuner(Clock())(weight())
    assert (choice.kind, choice.by) == (BLOCKS2, "measured")
    assert choice.microseconds[BLOCKS2] == min(choice.microseconds.values())


def test_sparse_weights_run_dense_where_that_is_faster() -> None:
    """Whatever the cost model thinks of blocks, by the table no layer is slower than dense INT8."""
    assert cheapest(weight()) == BLOCKS2
    choice = tuner(Clock(blocks=10.0))(weight())
    assert choice.kind == DENSE and choice.microseconds[BLOCKS2] > choice.microseconds[DENSE]


def test_a_lead_within_the_noise_is_none() -> None:
    chooser = tuner(Clock())
    chooser(weight())
    for key in [key for key in chooser.table.entries if key[2] != DENSE]:
        chooser.table.entries[key] = 0.98 * chooser.table.entries[64, 64, DENSE, 1.0]
    assert chooser(weight()).kind == DENSE


@pytest.mark.parametrize("share", [0.03, 0.1, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("slow", [0.5, 1.0, 1.5, 3.0])
def test_never_slower_than_dense(share: float, slow: float) -> None:
    choice = tuner(Clock(blocks=slow))(weight(share=share))
    assert choice.microseconds[choice.kind] <= choice.microseconds[DENSE]


def test_a_full_weight_is_timed_dense_only() -> None:
    clock = Clock()
    choice = tuner(clock)(np.ones((64, 64), np.int8))
    assert choice.kind == DENSE and list(choice.microseconds) == [DENSE]
    assert [case.kind for cases in clock.asked for case in cases] == [DENSE]


def test_hopeless_kernels_are_not_timed() -> None:
    clock = Clock()
    tuner(clock)(weight(rows=1, share=0.05, shape=(128, 128)))  # blocks of 16 rows would be filled to more than half
    kinds = {case.kind for cases in clock.asked for case in cases}
    assert Kind("blocks", 1) in kinds and Kind("blocks", 16) not in kinds


def test_gather_only_where_the_engine_knows_it() -> None:
    columns = weight(rows=4, share=0.1, columns=1)
    for gather in (False, True):
        found = tuner(Clock(gather=0.5), gather=gather)(columns)
        assert (found.kind == Kind("gather", 4)) is gather


def test_float_where_int8_does_not_pay() -> None:
    head = np.ones((2, 64), np.int8)
    fast = Clock(float=0.5)
    assert tuner(fast)(head, quantizes=True).kind == DENSE  # it was not said that the layer could
    choice = tuner(fast)(head, float_too=True, quantizes=True)
    assert choice.kind == FLOAT and set(choice.microseconds) == {DENSE, FLOAT}
    assert tuner(Clock(float=9.0))(head, float_too=True, quantizes=True).kind == DENSE


def test_the_quantize_step_counts_for_int8() -> None:
    head, clock = np.ones((2, 64), np.int8), Clock(float=1.05)
    choice = tuner(clock)(head, float_too=True, quantizes=True)
    assert choice.kind == FLOAT
    alone = tuner(clock)(head, float_too=True).microseconds[DENSE]
    assert choice.microseconds[DENSE] == pytest.approx(alone + 0.64, abs=0.01)  # 64 inputs at 10 ns


def test_float_is_not_timed_where_it_is_hopeless() -> None:
    clock = Clock()
    tuner(clock)(np.ones((256, 256), np.int8), float_too=True, quantizes=True)
    assert {case.kind for cases in clock.asked for case in cases} == {DENSE}


def test_each_time_is_taken_once() -> None:
    clock = Clock()
    chooser = tuner(clock)
    first = chooser(weight())
    count = len(clock.asked)
    assert chooser(weight()) == first and len(clock.asked) == count


def test_new_entries_are_scaled_to_the_phase_of_the_old() -> None:
    """The machine has become 1.5 times slower: what is new must not look slower than what is known."""
    clock = Clock()
    chooser = tuner(clock)
    chooser(weight(share=0.1))
    clock.phase = 1.5
    chooser(weight(share=0.5))
    fresh = tuner(Clock())
    fresh(weight(share=0.1))
    fresh(weight(share=0.5))
    assert chooser.table.entries == pytest.approx(fresh.table.entries, abs=0.02)


def test_without_a_dense_time_the_cost_model_chooses() -> None:
    chooser = tuner(None)
    assert chooser(weight()) == by_cost_model(weight()) and chooser.untimed == {"64x64"}
    assert "has no times for layers of 64x64" in " ".join(keep(chooser, "table.json"))


# ---- the table ---------------------------------------------------------------------------------------------------


def test_times_between_grid_points_are_interpolated() -> None:
    known = table()
    known.entries = {(8, 8, BLOCKS2, 0.1): 10.0, (8, 8, BLOCKS2, 0.2): 30.0}
    assert known.microseconds(8, 8, BLOCKS2, 0.15) == pytest.approx(20.0)
    assert known.microseconds(8, 8, BLOCKS2, 0.2) == 30.0
    assert known.microseconds(8, 8, BLOCKS2, 0.3) is None and known.microseconds(8, 16, BLOCKS2, 0.2) is None


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.05, 0.33, 0.999, 1.0])
def test_any_density_lies_between_points_of_the_grid(density: float) -> None:
    points = [key[3] for key in table().keys(8, 8, BLOCKS2, density)]
    assert points[0] <= density <= points[-1] and set(points) <= set(GRID) and len(points) <= 2


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    chooser = tuner(Clock(), gather=True)
    chooser(weight())
    chooser(weight(rows=4, columns=1, share=0.1, shape=(8, 128)))
    path = tmp_path / "table.json"
    chooser.table.save(path)
    assert read_table(path) == chooser.table
    again = imported(path)
    again.gather = True
    assert again(weight()) == chooser(weight())
    assert [item.name for item in tmp_path.iterdir()] == ["table.json"]


BROKEN = {
    "not JSON": "{",
    "not a table": "[]",
    "deep": "[" * 100_000,
    "other version": json.dumps({"version": 99}),
    "no cpu": json.dumps({"version": 1, "microseconds": {}}),
    "no times": json.dumps({"version": 1, "cpu": "a", "isa": "b", "engine": "c", "tokens": 128}),
    "bytes": "\udcff",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_damaged_table_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"the tuning table .*table\.json cannot be used") as error:
        read_table(path)
    assert "\n" not in str(error.value)


DENSE_TIMES = ["fast", -1, 1e999, True, None]
UNFIT: list[object] = [{"8y8": {}}, {"8x8": {"sparse": {"1": 1}}}, {"8x8": {"dense": {"x": 1}}}, {"8x8": 3}, 3]


@pytest.mark.parametrize("times", [*UNFIT, *({"8x8": {"dense": {"1": time}}} for time in DENSE_TIMES)])
def test_times_that_do_not_fit_are_refused(times: object, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    content = json.loads(table().to_json()) | {"microseconds": times}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="its times do not fit"):
        read_table(path)


# ---- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def filled() -> Tuner:
    chooser = tuner(Clock())
    chooser(weight())
    return chooser


def test_what_was_measured_is_kept_per_cpu_and_isa(home: Path) -> None:
    chooser = filled()
    assert keep(chooser, None) == []
    assert cached(table()).table == chooser.table
    assert [path.name for path in (home / "nmcompile").iterdir()] == ["tuning-a-cpu-avx2.json"]
    assert cached(replace(table(), isa="scalar")).table.entries == {}
    assert cached(replace(table(), cpu="another")).table.entries == {}


def test_times_of_another_engine_are_not_used(home: Path) -> None:
    keep(filled(), None)
    assert cached(replace(table(), engine="4567")).table.entries == {}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_damaged_cache_is_measured_anew(text: str, home: Path) -> None:
    chooser = filled()
    path = tuning.cache_path(chooser.table)
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert cached(table()).table.entries == {}
    keep(chooser, None)
    assert cached(table()).table == chooser.table


def test_a_cache_that_cannot_be_written_is_a_note(home: Path) -> None:
    (home / "nmcompile").write_text("in the way")
    (note,) = keep(filled(), None)
    assert "kernel times were not kept" in note and "--tuning FILE" in note
    assert keep(filled(), home / "table.json") == [] and (home / "table.json").exists()


def test_nothing_new_is_not_written(home: Path) -> None:
    keep(filled(), None)
    again = cached(table())
    again.gather = False
    again(weight())  # all times are known: this measures nothing, which would raise for a made-up ISA
    assert not again.changed and keep(again, None) == []


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_the_cache_is_in_the_home_folder_where_xdg_says_nothing_useful(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_path(table()).parent == tmp_path / ".cache" / "nmcompile"


# ---- what the choice is made of ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (33, 20), (1, 3)])
def test_densities_are_those_of_the_packed_form(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    values = (rng.integers(1, 127, shape) * (rng.random(shape) < 0.2)).astype(np.int8)
    for kind, density in fills(values, gather=True).items():
        n, k = shape
        if kind.format == "blocks":
            units = -(-n // kind.rows) * -(-k // 4)
            assert len(pack_as(values, kind).arrays["values"]) == pytest.approx(density * units)
        elif kind.format == "gather":
            groups = np.pad(values, ((0, -n % kind.rows), (0, 0))).reshape(-1, kind.rows, k)
            assert groups.any(axis=1).mean() == pytest.approx(density)
        else:
            assert (kind, density) == (DENSE, 1.0)


@pytest.mark.parametrize("rows", [kind.rows for kind in GATHERS])
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (33, 20), (4, 1)])
def test_gathered_weights_are_all_there(rows: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    values = (rng.integers(-127, 128, shape) * (rng.random(shape) < 0.3)).astype(np.int8)
    arrays = pack_gather(values, rows)
    n, k = shape
    found = np.zeros((-(-n // rows) * rows, k), np.int64)
    for group in range(len(arrays["starts"]) - 1):
        first, last = arrays["starts"][group : group + 2]
        columns = arrays["columns"][first:last].reshape(-1).astype(int)
        weights = arrays["values"][first:last].swapaxes(1, 2).reshape(-1, rows)  # one row per gathered input
        for column, row in zip(columns, weights, strict=True):
            found[group * rows : (group + 1) * rows, column] += row
        count = int(np.count_nonzero(np.any(weights, axis=1)))
        assert len(columns) - count < 4  # no quad is all padding
        assert (np.diff(columns[:count]) > 0).all() and not columns[count:].any() and not weights[count:].any()
    np.testing.assert_array_equal(found[:n], values)
    assert arrays["columns"].dtype == np.uint16 and arrays["starts"].dtype == np.uint32
