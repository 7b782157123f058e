"""The worker's half of the protocol: one JSON object per line in, one out; what a library prints goes to stderr.

{"do": "start"}                                                    -> {"version": text}
{"do": "prepare", "source": path, "target": path, ...}             -> {}                   model files are written
{"do": "open", "model": path, "form": name, "threads": n, "inputs": .npz}  -> {"load_seconds": s}  to the first answer
{"do": "run", "seconds": s, "least": n}                            -> {"nanoseconds": [...]}  one number per run
{"do": "save", "path": .npy}                                       -> {}                   the last output is written
{"do": "memory"}                                                   -> {"peak_bytes": n}

and {"error": text} when a request failed. The process ends when its input does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Json = dict[str, Any]
Feeds = dict[str, NDArray[Any]]
Run = Callable[[], object]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
WARM_UP = 2  # runs before each turn: others had the caches


class Runtime(Protocol):
    """What a worker implements; `output` turns the result of a run into [batch, tokens, hidden]."""

    version: str

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run: ...
    def output(self, result: Any) -> NDArray[Any]: ...


def serve(runtime: Runtime, prepare: Callable[[Json], None] | None = None) -> None:
    """Answer requests until stdin ends. Feeds come in the order of the .npz: the order of the model's inputs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process does not see that its input ended
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run: Run | None = None
    result: object = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Json = {}
        try:
            if request["do"] == "start":
                answer = {"version": runtime.version}
            elif request["do"] == "prepare":
                assert prepare is not None
                prepare(request)
            elif request["do"] == "open":
                with np.load(request["inputs"]) as file:
                    feeds = {name: np.ascontiguousarray(file[name]) for name in file.files}
                start = time.perf_counter()
                run = runtime.open(request["model"], request["form"], feeds, request["threads"])
                result = run()
                answer = {"load_seconds": time.perf_counter() - start}
            elif request["do"] == "memory":
                answer = {"peak_bytes": _peak_memory()}
            elif run is None:
                raise RuntimeError("no model is open")
            elif request["do"] == "save":
                np.save(request["path"], np.asarray(runtime.output(result), np.float32))
            else:
                for _ in range(WARM_UP):
                    result = run()
                answer = {"nanoseconds": _timed(run, request["seconds"], request["least"])}
        except Exception as error:  # whatever a peer raises, it is left out with this reason
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        answers.write(json.dumps(answer) + "\n")


def _timed(run: Run, seconds: float, least: int) -> list[int]:
    spent: list[int] = []
    start = now = time.perf_counter_ns()
    while now - start < seconds * 1e9 or len(spent) < least:
        before = now
        run()
        now = time.perf_counter_ns()
        spent.append(now - before)
    return spent


def _peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no VmHWM")
