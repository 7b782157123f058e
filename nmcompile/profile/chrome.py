"""Traces in Chrome's event format, which chrome://tracing and https://ui.perfetto.dev open.

The format: "Trace Event Format", complete events ("ph": "X") in microseconds and metadata events ("M") that name rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nmcompile.profile.timing import Machine, Profile

Json = dict[str, Any]


def trace_events(profiles: Sequence[Profile], titles: Sequence[str], machine: Machine) -> Json:
    """The fastest run of each profile as a process: its whole on the first row, then one row per thread."""
    events: list[Json] = []
    for pid, (profile, title) in enumerate(zip(profiles, titles, strict=True)):
        trace = profile.trace
        events.append(_named("process_name", pid, 0, title))
        events.append(_named("thread_name", pid, 0, "whole run"))
        for thread in range(max(profile.workers, 1)):
            events.append(_named("thread_name", pid, thread + 1, f"thread {thread}"))
        events.append({"name": f"run {title}", "cat": "run", "ph": "X", "pid": pid, "tid": 0, "ts": 0.0,
                       "dur": trace.nanoseconds / 1e3, "args": {"tokens": profile.tokens}})  # fmt: skip
        for index, thread, panel, begin, end in trace.events.tolist():
            row = profile.rows[index]
            args: Json = {"step": index, "ms of the step": round(row.seconds * 1e3, 4)}
            args |= {"layer": row.step.layer} if row.step.layer else {}
            args |= {"panel": panel} if panel >= 0 else {}
            events.append({"name": row.label, "cat": row.step.kind, "ph": "X", "pid": pid, "tid": thread + 1,
                           "ts": begin / 1e3, "dur": (end - begin) / 1e3, "args": args})  # fmt: skip
    about = {"isa": machine.isa, "threads": machine.threads, "int8 peak, G MAC/s": round(machine.int8_peak / 1e9, 1),
             "memory bandwidth, GB/s": round(machine.bandwidth / 1e9, 1)}  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _named(what: str, pid: int, tid: int, name: str) -> Json:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
