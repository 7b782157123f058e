"""Which kernel runs each layer: by times measured on this machine, or by the shipped cost model.

A table holds the times of one CPU model and one ISA, for one step of 128 tokens on one thread, at a few densities per
kernel and shape; times between them are interpolated, which is close because a sparse kernel's time is a constant part
and one in proportion to what is filled. The dense INT8 kernel is always among the candidates, so by the table no
layer is slower than that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.pack import (
    DENSE,
    FLOAT,
    GATHERS,
    KERNELS,
    QUANTIZE,
    Kind,
    cheapest,
    fills,
    least,
    predicted,
)
from nmcompile.errors import InputError, NmcompileError
from nmcompile.files import cache_folder, write

VERSION = 1
TOKENS = 128
GRID = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # densities that are timed
HOPELESS = 2.0  # times the cheapest by the cost model: not timed
PATIENCE = 0.5  # seconds for the kernels of one shape, on machines where twenty rounds would take longer
KINDS: Mapping[str, Kind] = {str(kind): kind for kind in (*KERNELS, QUANTIZE)}

Key: TypeAlias = tuple[int, int, Kind, float]  # outputs, inputs, kernel, density on the grid
Times = Callable[[Sequence[measure.Case]], list[float]]  # seconds of each case, timed in turn


@dataclass(frozen=True)
class Choice:
    """The kernel for a layer, and the microseconds of its candidates; none where the cost model chose.

    cost: microseconds, or the cost model's products per token. reordered: the layer's outputs, or its inputs, stand in
    another order than the model's.
    """

    kind: Kind
    cost: float
    microseconds: Mapping[Kind, float] = field(default_factory=dict)
    reordered: bool = False

    @property
    def by(self) -> str:
        return "measured" if self.microseconds else "cost model"


Choose = Callable[[np.ndarray, bool, bool], Choice]


def by_cost_model(weight: np.ndarray, float_too: bool = False, quantizes: bool = False) -> Choice:
    """The cheapest kernel for an int8 weight [N, K] by the shipped model; the same on every machine."""
    n, k = weight.shape
    gather = gather_is_known()
    kind = cheapest(weight, gather)
    return Choice(kind, predicted(n, k, kind, fills(weight, gather)[kind]))


def gather_is_known() -> bool:
    """Whether this engine runs the gather kernels."""
    return bool(GATHERS)


# ---- the table ---------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Microseconds of one step by (outputs, inputs, kernel, density on the grid)."""

    cpu: str
    isa: str
    engine: str
    tokens: int = TOKENS
    entries: dict[Key, float] = field(default_factory=dict)

    def keys(self, outputs: int, inputs: int, kind: Kind, density: float) -> list[Key]:
        """The entries that a time at this density is made of: one on the grid, else its two neighbours."""
        if kind.rows == 0:
            return [(outputs, inputs, kind, 1.0)]
        above = bisect_left(GRID, density)
        around = GRID[above : above + 1] if GRID[above] == density else GRID[above - 1 : above + 1]
        return [(outputs, inputs, kind, point) for point in around]

    def microseconds(self, outputs: int, inputs: int, kind: Kind, density: float) -> float | None:
        """The time at a density from 0 to 1, interpolated; None where the table does not say."""
        keys = self.keys(outputs, inputs, kind, density)
        if not all(key in self.entries for key in keys):
            return None
        low, high = keys[0], keys[-1]
        share = (density - low[3]) / (high[3] - low[3]) if low != high else 0.0
        return self.entries[low] * (1 - share) + self.entries[high] * share

    def step_costs(self, steps: Mapping[int, measure.Case]) -> dict[int, float]:
        """What the table says of a program's steps, as `_native.Program.measured` takes it: nanoseconds per token.

        Steps that it has no time of are left to the engine's own costs.
        """
        found = {step: self.microseconds(case.outputs, case.inputs, case.kind, case.density)
                 for step, case in steps.items()}  # fmt: skip
        return {step: time * 1e3 / self.tokens for step, time in found.items() if time is not None}

    def to_json(self) -> str:
        shapes: dict[str, dict[str, dict[str, float]]] = {}
        for (n, k, kind, density), time in sorted(self.entries.items()):
            shapes.setdefault(f"{n}x{k}", {}).setdefault(str(kind), {})[f"{density:g}"] = round(time, 2)
        content = {"version": VERSION, "cpu": self.cpu, "isa": self.isa, "engine": self.engine, "tokens": self.tokens,
                   "microseconds": shapes}  # fmt: skip
        return json.dumps(content, indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all. NmcompileError where that cannot be."""
        write(path, self.to_json())


def read_table(path: Path) -> Table:
    """A table from a file; InputError, one line, for what is not one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the tuning table {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        version = content.get("version") if isinstance(content, dict) else None
        raise _damaged(path, f"its version is {version!r}, this nmcompile reads {VERSION}")
    cpu, isa, engine, tokens = (content.get(name) for name in ("cpu", "isa", "engine", "tokens"))
    if not all(isinstance(fact, str) for fact in (cpu, isa, engine)) or type(tokens) is not int or tokens < 1:
        raise _damaged(path, "it does not name its cpu, isa, engine and tokens")
    table = Table(str(cpu), str(isa), str(engine), tokens)
    try:
        for shape, kinds in content["microseconds"].items():
            n, k = (int(size) for size in shape.split("x"))
            for kind, times in kinds.items():
                table.entries |= {(n, k, KINDS[kind], float(density)): _time(time) for density, time in times.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its times do not fit ({type(error).__name__}: {error})") from None
    return table


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a time")
    return float(value)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"the tuning table {path} cannot be used: {why}; remove it to have it measured anew")


# ---- choosing ----------------------------------------------------------------------------------------------------


@dataclass
class Tuner:
    """Chooses by a table; `times` fills in what it lacks, None takes it as it is."""

    table: Table
    times: Times | None
    gather: bool
    changed: bool = False
    untimed: set[str] = field(default_factory=set)  # shapes of layers that the cost model chose for want of times

    @property
    def measures(self) -> bool:
        """Whether it times what the table lacks."""
        return self.times is not None

    def __call__(self, weight: np.ndarray, float_too: bool = False, quantizes: bool = False) -> Choice:
        """The fastest kernel for an int8 weight [N, K].

        float_too: the layer could run in float as well; quantizes: only its INT8 forms need a quantize step of their
        own.
        """
        n, k = weight.shape
        wanted = promising(weight, self.gather)
        extra = predicted(n, k, QUANTIZE, 1.0) if quantizes else 0.0
        lowest = extra + min(predicted(n, k, kind, density) for kind, density in wanted.items())
        if float_too and predicted(n, k, FLOAT, 1.0) <= HOPELESS * lowest:
            wanted |= {FLOAT: 1.0, **({QUANTIZE: 1.0} if quantizes else {})}
        self._fill_in(n, k, wanted)
        found = {kind: self.table.microseconds(n, k, kind, density) for kind, density in wanted.items()}
        times = {kind: time for kind, time in found.items() if time is not None}
        if DENSE not in times:
            self.untimed.add(f"{n}x{k}")
            return by_cost_model(weight)
        before = times.pop(QUANTIZE, 0.0)
        times = {kind: round(time + (0.0 if kind == FLOAT else before), 2) for kind, time in times.items()}
        best = least(times)
        return Choice(best, times[best], times)

    def _fill_in(self, n: int, k: int, wanted: Mapping[Kind, float]) -> None:
        """Time what the table lacks for these kernels, beside the dense one.

        Entries of one shape may be measured on different days, in fast and slow phases of the machine: what is new is
        scaled by what the dense kernel took then and takes now, so that they stay comparable.
        """
        keys = [key for kind, density in wanted.items() for key in self.table.keys(n, k, kind, density)]
        missing = [key for key in dict.fromkeys(keys) if key not in self.table.entries]
        if not missing or self.times is None:
            return
        dense = (n, k, DENSE, 1.0)
        keys = [dense, *(key for key in missing if key != dense)]
        seconds = self.times([measure.Case(*key[:3], density=key[3], tokens=self.table.tokens) for key in keys])
        scale = 1.0 if dense in missing else self.table.entries[dense] / max(seconds[0] * 1e6, 1e-3)
        for key, time in zip(keys, seconds, strict=True):
            if key in missing:
                self.table.entries[key] = round(time * 1e6 * scale, 2)
        self.changed = True


def promising(weight: np.ndarray, gather: bool) -> dict[Kind, float]:
    """The kernels worth timing for an int8 weight, with the density it has for each; dense is always one."""
    n, k = weight.shape
    densities = fills(weight, gather)
    costs = {kind: predicted(n, k, kind, density) for kind, density in densities.items()}
    most = HOPELESS * min(costs.values())
    # a form that leaves hardly anything out does the work of the dense one with more to look up
    return {kind: density for kind, density in densities.items()
            if kind == DENSE or (costs[kind] <= most and density <= 0.97)}  # fmt: skip


# ---- where tables come from --------------------------------------------------------------------------------------


def new_table(isa: str = "") -> Table:
    """An empty table for this machine and an ISA ("": the one in use)."""
    return Table(measure.cpu_model(), _native.Program(isa=isa, threads=1).isa, engine_version())


def engine_version() -> str:
    """A hash of the engine's file: times of other kernels say nothing."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:12]


def measuring(table: Table) -> Tuner:
    """A tuner that fills the table in on this machine."""
    return Tuner(table, lambda cases: measure.seconds(cases, isa=table.isa, patience=PATIENCE), gather_is_known())


def imported(path: Path) -> Tuner:
    """A tuner by a table from elsewhere, used as it is: it may be of another CPU, for compiling across."""
    return Tuner(read_table(path), None, gather_is_known())


def cached(table: Table) -> Tuner:
    """A tuner by what was measured on this kind of machine before; what is damaged or outdated is measured anew."""
    try:
        known = read_table(cache_path(table))
    except InputError:
        return measuring(table)
    fits = (known.cpu, known.isa, known.engine, known.tokens) == (table.cpu, table.isa, table.engine, table.tokens)
    return measuring(known if fits else table)


def cache_path(table: Table) -> Path:
    """The file of a CPU model and ISA in the user's cache folder."""
    name = re.sub(r"[^a-z0-9]+", "-", table.cpu.lower()).strip("-")
    return cache_folder() / f"tuning-{name}-{table.isa}.json"


def open_tuner(source: str | os.PathLike[str] | None) -> Tuner | None:
    """What chooses kernels by measured times: a table's file, the cache (None), or nothing ("off": the cost model).

    A file that does not exist is measured, and written by `keep`.
    """
    if source == "off":
        return None
    return imported(Path(source)) if source is not None and Path(source).exists() else cached(new_table())


def keep(tuner: Tuner, source: str | os.PathLike[str] | None) -> list[str]:
    """Store what was measured for the next time, and in the file that was asked for; notes on what is worth knowing.

    NmcompileError when that file cannot be written; a cache that cannot be is a note.
    """
    notes = []
    if tuner.measures and source is not None:
        tuner.table.save(Path(source))
    elif source is not None:
        notes.append(f"kernels chosen by {source}, measured on {tuner.table.cpu} ({tuner.table.isa})")
    if tuner.untimed:
        shapes = ", ".join(sorted(tuner.untimed))
        notes.append(f"{source} has no times for layers of {shapes}: the cost model chose their kernels")
    path = cache_path(tuner.table)
    try:
        if tuner.changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            tuner.table.save(path)
    except (OSError, NmcompileError) as error:
        if source is None:
            notes.append(f"kernel times were not kept ({error}); "
                         "give --tuning FILE to keep them elsewhere")  # fmt: skip
    return notes
