"""How much memory a plan may take: what it states, what its programs need, what onnxruntime may allocate.

A plan of a few kilobytes can ask for gigabytes: buffers and results have any size that a number can name. So the memory
of the smallest run is bounded when a plan is loaded, that of each run before it begins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nmcompile.errors import InputError, PlanError

SMALLEST_RUN = 384 << 20  # bytes for one token where nothing else is said; a vocabulary of a million words fits
LANES = 16  # tokens that the least run has room for
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Program(Protocol):
    """What is asked of `_native.Program`."""

    limit: int

    def need(self) -> tuple[int, int, int]: ...


def most_copied(size: int) -> int:
    """Bytes of weights that the programs of a plan of `size` bytes may copy: padded to fours, and small change."""
    return 4 * size + (256 << 20)


def machine_memory() -> int:
    """Bytes of memory that this process can have: the machine's, or its container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUPS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found)


def allowed(memory: object) -> int:
    """Bytes that a run may take: what was asked for, or half of what there is. InputError: no number of bytes."""
    if memory is None:
        return machine_memory() // 2
    if type(memory) is not int or not 1 << 20 <= memory < 1 << 60:
        raise InputError(f"memory={memory!r} is no number of bytes from 1 MB on; leave it out for half of all")
    return memory


def stated(programs: Sequence[Program]) -> dict[str, int]:
    """What a plan states of its native segments, in bytes: of copied weights and one thread, and of each token."""
    needs = [program.need() for program in programs]
    return {"fixed": sum(copied + thread for copied, thread, _ in needs), "token": sum(token for *_, token in needs)}


def limit(programs: Sequence[Program], header: Mapping[str, Any], memory: int | None) -> None:
    """Bound what each run of the programs takes. PlanError: they need more than the plan states, or than is allowed."""
    if not programs:
        return
    found, told = stated(programs), header.get("memory", {})
    if not isinstance(told, Mapping):
        raise PlanError("the plan's statement of its memory is damaged; compile it again")
    for key, value in found.items():
        if key in told and (type(told[key]) is not int or value > told[key]):
            raise PlanError(f"the plan needs {value} bytes of memory ({key}), but states {str(told[key])[:30]}; "
                            "compile it again")  # fmt: skip
    needs = [program.need() for program in programs]
    smallest = [thread + LANES * token for _, thread, token in needs]
    most = SMALLEST_RUN if memory is None else memory
    if sum(smallest) > most:
        raise PlanError(f"the plan needs {-(-sum(smallest) >> 20)} MB for a single token, more than {most >> 20} MB; "
                        "if you trust it, load it with memory=")  # fmt: skip
    for program, share in zip(programs, smallest, strict=True):  # each keeps what its largest run took
        program.limit = max(allowed(memory) * share // sum(smallest), 1)


class Arena:
    """The memory of all onnxruntime segments of the process: onnxruntime has one such allocator, for those who ask.

    The first segment that is opened sets its size. Other sessions of the process keep allocators of their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.size = 0  # bytes, 0 before the first segment is opened

    def share(self, options: Any, size: int) -> None:
        """Let a session with these options allocate here, together no more than `size` bytes."""
        import onnxruntime as ort

        with self._lock:
            if not self.size:
                self.size = size
                info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
                try:
                    ort.create_and_register_allocator(info, ort.OrtArenaCfg(size, -1, -1, -1))
                except Exception:  # the program that we run in has registered its own, with its own bounds
                    self.size = machine_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")


ARENA = Arena()
