"""The parent's half of the protocol: a worker process per model, stopped whenever it is not its turn."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from nmcompile.errors import NmcompileError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0  # seconds for one answer; calibrating BERT-base takes minutes


class PeerError(NmcompileError):
    """A peer cannot be installed or does not answer; the message is the reason it is left out with."""


class Worker:
    """A process of a peer's environment; `module` is run in it and speaks as tools/bench/peers/serve.py says."""

    def __init__(self, python: Path, module: str, threads: int, log: Path, *, patience: float = PATIENCE) -> None:
        self.log, self.patience = log, patience
        count = str(threads)
        variables = {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count,
                     "PYTHONPATH": str(ROOT), "GLOG_minloglevel": "2"}  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))[:threads]
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [python, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                env=os.environ | variables, cwd=log.parent, text=True, bufsize=1,
            )  # fmt: skip
        os.sched_setaffinity(self.process.pid, cores)  # before it has made any threads
        self.stopped = False
        try:
            self.version = str(self.ask(do="start")["version"])
        except BaseException:
            self.close()
            raise

    def ask(self, **request: object) -> dict[str, Any]:
        """Let the process run, ask, wait for the answer, stop it. PeerError: it refused, died or took too long."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            line = self._line()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(self._end())
        self.process.send_signal(signal.SIGSTOP)
        self.stopped = True
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def _line(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(self.patience):
                self.process.kill()
                raise PeerError(f"gave no answer for {self.patience:.0f} seconds")
        return self.process.stdout.readline()

    def _end(self) -> str:
        code = self.process.wait()
        why = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        said = self.log.read_text(errors="replace").strip().splitlines()
        return f"its process {why}" + (f": {said[-1].strip()[:200]}" if said else "")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
