"""The parent's half of the protocol: a worker process per model, stopped whenever it is not its turn."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from nmcompile.errors import NmcompileError
from nmcompile.json_process import Json, JsonProcess

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0  # seconds for one answer; calibrating BERT-base takes minutes


class PeerError(NmcompileError):
    """A peer cannot be installed or does not answer; the message is the reason it is left out with."""


class Worker(JsonProcess):
    """A process of a peer's environment; `module` is run in it and speaks as tools/bench/peers/serve.py says."""

    def __init__(self, python: Path, module: str, threads: int, log: Path, *, patience: float = PATIENCE) -> None:
        count = str(threads)
        variables = {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count,
                     "PYTHONPATH": str(ROOT), "GLOG_minloglevel": "2"}  # fmt: skip
        super().__init__([python, "-P", "-m", module], patience=patience, log=log, variables=variables,
                         folder=log.parent)  # fmt: skip
        # before it has made any threads
        os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[:threads])
        self.stopped = False
        try:
            self.version = str(self.ask(do="start")["version"])
        except BaseException:
            self.close()
            raise

    def ask(self, **request: object) -> Json:
        """Let the process run, ask, wait for the answer, stop it. PeerError: it refused, died or took too long."""
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
        answer = super().ask(**request)
        self.process.send_signal(signal.SIGSTOP)
        self.stopped = True
        return answer

    def refused(self, message: str) -> NmcompileError:
        return PeerError(message)

    def ended(self, why: str) -> NmcompileError:
        return PeerError(f"its process {why}")
