"""Time the engine's kernels on this machine: one step alone, several candidates in turn.

Machines have phases, seconds long, in which everything is 1.3 to 1.6 times slower. So candidates are timed in turn
(A B C A B C ...) and each gets its least time: disturbances only ever add, and whichever phase was the fast one,
every candidate had runs in it. A median would say in which phase most runs fell.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu.pack import DENSE as DENSE
from nmcompile.backends.cpu.pack import FLOAT as FLOAT
from nmcompile.backends.cpu.pack import GROUP, KERNELS, quads
from nmcompile.backends.cpu.pack import QUANTIZE as QUANTIZE
from nmcompile.backends.cpu.pack import Kind as Kind

Weight = dict[str, Any]
Timer = Callable[[], float]

SCALE = 0.03  # of made-up activations; times do not depend on it


@dataclass(frozen=True)
class Case:
    """One step to time: a linear layer, or the quantization of `inputs` features (kind "quantize").

    `density` is the share of the kind's units that are filled: R x 4 blocks, or for "gather" the inputs of each group
    of R outputs. Results are u8, those of "float" f32.
    """

    outputs: int
    inputs: int
    kind: Kind
    density: float = 1.0
    tokens: int = 128
    activation: str = "none"


def linear_seconds(
    outputs: int,
    inputs: int,
    kind: Kind,
    density: float,
    tokens: int,
    *,
    threads: int = 1,
    isa: str = "",
    repeats: int = 20,
) -> float:
    """Seconds of one linear step alone, on made-up weights: the least of `repeats` runs.

    ValueError when the engine does not know the kind or the ISA.
    """
    return seconds([Case(outputs, inputs, kind, density, tokens)], threads=threads, isa=isa, repeats=repeats)[0]


def seconds(
    cases: Sequence[Case], *, threads: int = 1, isa: str = "", repeats: int = 20, patience: float = math.inf
) -> list[float]:
    """Seconds of each case, timed in turn."""
    return in_turn([linear_timer(case, threads=threads, isa=isa) for case in cases], repeats, patience)


def in_turn(timers: Sequence[Timer], repeats: int, patience: float = math.inf) -> list[float]:
    """The least of `repeats` calls of each timer, all of them called once before the next round.

    One round more warms up; it counts only where no other follows because it took longer than `patience` seconds, after
    which no round begins.
    """
    start = time.monotonic()
    rounds = [[timer() for timer in timers]]
    while len(rounds) <= max(1, repeats) and (time.monotonic() - start < patience):
        rounds.append([timer() for timer in timers])
    return [min(times) for times in zip(*(rounds[1:] or rounds), strict=True)]


def step_timer(program: _native.Program, step: int, inputs: Sequence[np.ndarray]) -> Timer:
    """A timer of one step of a prepared program, in seconds."""
    return lambda: program.run_profiled(inputs)[1][step] * 1e-9


def linear_timer(case: Case, *, threads: int = 1, isa: str = "") -> Timer:
    """A timer of one case on weights made up for it."""
    n, k = case.outputs, case.inputs
    p = _native.Program(isa=isa, threads=threads)
    x, q = p.buffer(k, "f32"), p.buffer(k, "u8")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=q, scale=SCALE, zero_point=128)
    step = 1 if case.kind == QUANTIZE else 2
    if case.kind == FLOAT:
        w = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
        bias = np.ones(n, np.float32)
        p.linear_float(x=x, y=p.buffer(n, "f32"), weight=w, bias=bias, activation=case.activation)
    elif case.kind != QUANTIZE:
        row = np.full(n, 0.001, np.float32)
        p.linear(
            x=q, y=p.buffer(n, "u8"), weight=made_up(n, k, case.kind, case.density), w_scale=row, bias=row,
            x_scale=SCALE, x_zero_point=128, activation=case.activation, y_scale=0.1, y_zero_point=100,
        )  # fmt: skip
    p.leave(x=x, slot=0)
    p.prepare()
    data = np.random.default_rng(0).standard_normal((1, case.tokens, k)).astype(np.float32)
    return step_timer(p, step, [data])


def made_up(outputs: int, inputs: int, kind: Kind, density: float, seed: int = 0) -> Weight:
    """A random int8 weight in the engine's format, of which a share `density` (at least one unit) is filled."""
    rng = np.random.default_rng(seed)
    if kind == DENSE:
        tiles = (-(-outputs // GROUP), -(-inputs // GROUP), GROUP, GROUP)
        return {"format": "dense", "values": _values(rng, tiles)}
    groups, units = -(-outputs // kind.rows), inputs if kind.format == "gather" else -(-inputs // GROUP)
    used = np.zeros(groups * units, bool)
    used[rng.permutation(used.size)[: max(1, round(density * used.size))]] = True
    used = used.reshape((groups, units))
    if kind.format == "gather":
        slots, columns, starts = quads(used)
        values = np.zeros((columns.size, kind.rows), np.int8)
        values[slots] = _values(rng, (len(slots), kind.rows))
        values = np.ascontiguousarray(values.reshape(-1, GROUP, kind.rows).swapaxes(1, 2))
    else:
        columns = np.nonzero(used)[1].astype(np.uint16)
        starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.uint32)
        values = _values(rng, (len(columns), kind.rows, GROUP))
    return {"format": kind.format, "rows": kind.rows, "values": values, "columns": columns, "starts": starts}


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.integers(-127, 127, shape, dtype=np.int8)
    values += values >= 0  # no zeros: 1 to 127 and their negatives
    return values


def supported(kind: Kind) -> bool:
    """Whether the engine of this installation knows the kernel, or the step."""
    return kind in KERNELS or kind == QUANTIZE


def step_costs(run: Callable[[], Mapping[int, float]], repeats: int = 5) -> dict[int, float]:
    """Nanoseconds of one core per token of each step of a prepared program, as `Program.measured` takes them.

    run: `Program.run_costs` on some inputs, of which the least of `repeats` counts; a step that no token came to is not
    among them.
    """
    runs = [run() for _ in range(max(1, repeats) + 1)][1:]  # the first one warms up
    return {step: min(run[step] for run in runs) for step in runs[0]}


def int8_peak(isa: str = "", threads: int = 1, repeats: int = 60) -> float:
    """Multiply-adds per second of a dense product whose panel and weights stay in the first caches.

    Per core 128 outputs, 3072 inputs, 64 tokens: 384 KB of weights, 192 KB of activations.
    """
    case = Case(128 * threads, 3072, DENSE, tokens=64)
    return case.outputs * case.inputs * case.tokens / seconds([case], threads=threads, isa=isa, repeats=repeats)[0]


def memory_bandwidth(threads: int = 1, repeats: int = 5) -> float:
    """Bytes per second, read and written together, of numpy copying an array four times as large as the last cache.

    Each thread copies its own part; the lines that a store fetches before it writes them are not counted.
    """
    size = min(max(4 * _last_cache(), 1 << 26), 1 << 29)
    source, target = np.ones(size // 8), np.zeros(size // 8)  # both touched, so that their pages are there
    parts = [(np.array_split(target, threads)[i], np.array_split(source, threads)[i]) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copied() -> float:
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))  # numpy releases the interpreter while it copies
            return time.perf_counter() - start

        return 2 * source.nbytes / in_turn([copied], repeats)[0]


def _last_cache() -> int:
    """Bytes of the largest cache that Linux reports for the first CPU, 32 MiB where it reports none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=32 << 20)


def cpu_model() -> str:
    """What kind of CPU this is: its name with family, model and stepping, since virtual machines shorten the name."""
    wanted = {"model name": "", "cpu family": "family", "model": "model", "stepping": "stepping"}
    found: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in wanted:
            found.setdefault(key, f"{wanted[key]} {value}".strip())
    text = " ".join(found[key] for key in wanted if key in found)
    return text or platform.processor() or platform.machine()
