"""Runs a session step by step and sets the times against what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nmcompile.backends.cpu import measure
from nmcompile.backends.cpu.session import Session, Span, Trace
from nmcompile.backends.cpu.streams import CLASSED
from nmcompile.profile.work import TimedStep, moved_bytes, named, sizes, steps_of

Bound = Literal["compute", "memory", "cache", "overhead", "-"]
Feeds = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int], None]  # (what, done, total)

SECONDS = 1.5  # of profiling when the number of runs is not given
FEWEST, MOST = 6, 1000
REACHED = 0.5  # share of a roofline from which it is what limits a step


@dataclass(frozen=True)
class Machine:
    """What this machine does at best with the kernels and threads of a session: multiply-adds and bytes per second."""

    isa: str
    threads: int
    int8_peak: float
    bandwidth: float

    def or_better(self, other: Machine) -> Machine:
        """The better figures of two measurements: disturbances only ever make them worse."""
        return replace(self, int8_peak=max(self.int8_peak, other.int8_peak),
                       bandwidth=max(self.bandwidth, other.bandwidth))  # fmt: skip

    def float_peak(self) -> float:
        """Float multiply-adds per second; the VNNI instructions do four products where a float one does one."""
        return self.int8_peak / 4 if "vnni" in self.isa else self.int8_peak


def machine(session: Session) -> Machine:
    """Measure the machine, now: it takes under a second."""
    isa = "" if session.isa == "onnxruntime" else session.isa
    peak = measure.int8_peak(isa=isa, threads=session.threads)
    return Machine(session.isa, session.threads, peak, measure.memory_bandwidth(threads=session.threads))


@dataclass(frozen=True)
class Row:
    """A step, or `count` equal ones: their time and work in one run of the model, all of them together."""

    step: TimedStep
    label: str
    count: int
    seconds: float
    tokens: int  # real ones, that each step ran over
    macs: int
    bytes: int
    layers: tuple[str, ...]

    def compute_share(self, machine: Machine) -> float:
        """Of the peak for the kind of products it computes, int8 or float."""
        peak = machine.float_peak() if self.step.in_float else machine.int8_peak
        return self.macs / self.seconds / peak if self.seconds > 0 else 0.0

    def memory_share(self, machine: Machine) -> float:
        """Of the memory's bandwidth; above 1 where the caches hold the data."""
        return self.bytes / self.seconds / machine.bandwidth if self.seconds > 0 else 0.0

    def bound(self, machine: Machine) -> Bound:
        """What limits it: the roofline it reaches half of or more, else overhead.

        Compute first: much of what `bytes` counts lies in the caches, so that the memory's share says less.
        """
        if self.step.kind == "onnxruntime":
            return "-"
        if self.compute_share(machine) >= REACHED:
            return "compute"
        memory = self.memory_share(machine)
        return "overhead" if memory < REACHED else "memory" if memory <= 1 else "cache"


@dataclass(frozen=True)
class Profile:
    """One shape's profile. Seconds are of one run: rows + waiting + outside = seconds.

    waiting: of a thread within the engine, for others or between steps. outside: taking inputs, giving outputs, Python.
    plain: of the same run untraced. `trace` is the fastest run's. tokens: real ones, of `padded`. preempted: how often
    in one run another process took a core from this one; the times are then longer than on a quiet machine.
    """

    batch: int
    tokens: int
    padded: int
    runs: int
    workers: int  # threads that took part
    seconds: float
    plain: float
    waiting: float
    outside: float
    preempted: float
    rows: tuple[Row, ...]  # one per step
    trace: Trace


def profile(session: Session, feeds: Feeds, *, runs: int | None = None, progress: Progress | None = None) -> Profile:
    """Run the model on `feeds` and time its steps: means over the faster half of the runs.

    runs: how many, each traced and untraced in turn; by default as many as fit 1.5 seconds. Disturbances only add, so
    the slower half is left out. Raises InputError for feeds that do not fit.
    """
    session.run(feeds)  # caches, thread pools, arenas
    plain: list[float] = []
    totals: list[int] = []
    tables: list[np.ndarray] = []
    best: Trace | None = None
    switches, start = _preemptions(), time.perf_counter()
    while len(totals) < (runs or MOST):
        if runs is None and len(totals) >= FEWEST and time.perf_counter() - start > SECONDS:
            break
        before = time.perf_counter()
        session.run(feeds)
        plain.append(time.perf_counter() - before)
        trace = session.trace(feeds)
        totals.append(trace.nanoseconds)
        tables.append(split(trace))
        if best is None or trace.nanoseconds < best.nanoseconds:
            best = trace
        if progress is not None:
            done = len(totals) if runs else int(100 * min(1.0, (time.perf_counter() - start) / SECONDS))
            progress("profiling", done, runs or 100)
    assert best is not None
    switches = _preemptions() - switches
    fast = np.argsort(totals)[: -(-len(totals) // 2)]
    means = np.mean([tables[i] for i in fast], axis=0) * 1e-9
    rows = _rows(session, best, means[2:])
    natives = [span for span in best.spans if span.native]
    sized = [sizes(program, span) for program, span in zip(session.programs, best.spans, strict=True) if program]
    widest = max(sized, key=lambda item: item.padded, default=None)
    batch = max((len(array) for array in map(np.asarray, feeds.values()) if array.ndim), default=1)
    return Profile(
        batch=batch, tokens=widest.tokens(CLASSED) if widest else 0, padded=widest.padded if widest else 0,
        runs=len(totals), workers=max((workers(best, span) for span in natives), default=session.threads),
        seconds=float(np.mean([totals[i] for i in fast])) * 1e-9,
        plain=float(np.mean(np.sort(plain)[: len(fast)])),
        waiting=float(means[0]), outside=float(means[1]),
        preempted=switches / (2 * len(totals)), rows=rows, trace=best,
    )  # fmt: skip


def _preemptions() -> int:
    """How often the threads of this process had to give up a core that they still wanted."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def workers(trace: Trace, span: Span) -> int:
    """Threads that took part in a segment: the engine leaves some out where there is little to share."""
    events = _events_of(trace, span)
    return int(events[:, 1].max()) + 1 if len(events) else 1


def _events_of(trace: Trace, span: Span) -> np.ndarray:
    steps = trace.events[:, 0]
    return trace.events[(steps >= span.first) & (steps < span.first + span.steps)]


def split(trace: Trace) -> np.ndarray:
    """Nanoseconds float64 [2 + steps] of waiting, of time outside the steps, and of each step; they add up to the run.

    A step of the engine: the sum over threads by the number of threads that took part; a segment on onnxruntime: all
    of it, since its threads are not seen.
    """
    found = np.zeros(2 + len(trace.steps))
    for span in trace.spans:
        events = _events_of(trace, span)
        count = workers(trace, span) if span.native else 1
        np.add.at(found[2:], events[:, 0], (events[:, 4] - events[:, 3]) / count)
        if span.native and len(events):
            busy = float((events[:, 4] - events[:, 3]).sum()) / count
            found[0] += float(events[:, 4].max() - events[:, 3].min()) - busy
    found[1] = trace.nanoseconds - found.sum()
    return found


def _rows(session: Session, trace: Trace, seconds: np.ndarray) -> tuple[Row, ...]:
    held, programs = session.plan.arrays, session.programs
    given = [None if program is None else sizes(program, span)
             for program, span in zip(programs, trace.spans, strict=True)]  # fmt: skip
    rows = []
    for step, spent in zip(steps_of(session.header, held, trace.steps), seconds, strict=True):
        tokens = macs = moved = 0
        program, at = programs[step.segment], given[step.segment]
        if program is not None and at is not None and step.declared is not None:
            tokens = at.tokens(step.geometry)
            macs = step.declared.multiply_adds(program.buffers, held, at)
            moved = moved_bytes(step.declared, program, held, at)
        layers = (step.layer,) if step.layer else ()
        rows.append(Row(step, step.label, 1, float(spent), tokens, macs, moved, layers))
    return tuple(rows)


def grouped(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Equal steps as one row, in the order of the first of each; sparse layers may differ in their share."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        part = row.step.segment if row.step.kind == "onnxruntime" else -1
        groups.setdefault((row.step.head, row.step.tail, row.tokens, part), []).append(row)
    found = []
    for items in groups.values():
        step = items[0].step
        shares = [row.step.linear.share for row in items if row.step.linear] if step.sparse else []
        found.append(Row(
            step, named(step.head, shares, step.tail), len(items), sum(row.seconds for row in items),
            items[0].tokens, sum(row.macs for row in items), sum(row.bytes for row in items),
            tuple(dict.fromkeys(layer for row in items for layer in row.layers)),
        ))  # fmt: skip
    return tuple(found)
