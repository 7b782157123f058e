"""A process that is asked by one line of JSON and answers by one."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nmcompile.errors import NmcompileError

Json = dict[str, Any]


class JsonProcess:
    """The asking side.

    An answer {"error": text} is raised by `refused`, the end of the process by `ended`, each as the error that fits;
    `patience` are the seconds that one answer may take, None for ever, and `log` takes what the process says besides.
    """

    def __init__(self, command: Sequence[str | Path], *, patience: float | None = None, log: Path | None = None,
                 variables: Mapping[str, str] | None = None, folder: Path | None = None) -> None:  # fmt: skip
        self.patience, self.log = patience, log
        with open(os.devnull if log is None else log, "ab") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream if log else None,
                env=os.environ | (variables or {}), cwd=folder, text=True, bufsize=1,
            )  # fmt: skip

    def ask(self, **request: object) -> Json:
        """What the process answers. NmcompileError: it refused, died or took too long."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self.ended(self._end())
        answer: Json = json.loads(line)
        if "error" in answer:
            raise self.refused(str(answer["error"]))
        return answer

    def refused(self, message: str) -> NmcompileError:
        """The error for an answer that is one."""
        return NmcompileError(message)

    def ended(self, why: str) -> NmcompileError:
        """The error for no answer; `why` is like "was killed by signal 9"."""
        return NmcompileError(f"its process {why}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        if self.patience is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(self.patience):
                    self.process.kill()
                    raise self.refused(f"gave no answer for {self.patience:.0f} seconds")
        return self.process.stdout.readline()

    def _end(self) -> str:
        code = self.process.wait()
        why = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        said = self.log.read_text(errors="replace").strip().splitlines() if self.log else []
        return why + (f": {said[-1].strip()[:200]}" if said else "")

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
