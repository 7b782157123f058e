"""How busy the machine was with processes that are not ours: times taken meanwhile are worth little."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")  # per second


class Load:
    """Counts from where it is made. `ours`: process ids; this process is ours too."""

    def __init__(self, ours: Sequence[int]) -> None:
        self.ours = [os.getpid(), *ours]
        self.start, self.busy, self.own = time.monotonic(), _busy(), self._own()

    def others(self) -> float:
        """Mean number of cores that were busy with other processes, or taken by the host."""
        seconds = max(time.monotonic() - self.start, 1e-3)
        return max(0.0, (_busy() - self.busy - (self._own() - self.own)) / TICK / seconds)

    def _own(self) -> int:
        return sum(_ticks(process) for process in self.ours)


def _busy() -> int:
    """Ticks of all cores but idle ones: user, nice, system, interrupts, stolen by the host."""
    numbers = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return sum(numbers[:3]) + sum(numbers[5:8])


def _ticks(process: int) -> int:
    """User and system ticks of a process with all of its threads; 0 when it has ended."""
    try:
        numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(numbers[11]) + int(numbers[12])
