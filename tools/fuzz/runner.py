"""Runs a fuzz target in a process of its own, which may die: the seed that killed it is a finding like any other."""

from __future__ import annotations

import json
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tools.fuzz.target import Target
from tools.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent
ENOUGH = 50  # findings: there is one fault behind most of them
PATIENCE = 600.0  # seconds for what is made before the first attempt


@dataclass
class Findings:
    """Outcomes by name with their number, and what was found: (seed, what happened)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    found: list[tuple[int, str]] = field(default_factory=list)
    megabytes: int = 0  # that the process took at most

    @property
    def runs(self) -> int:
        return sum(self.outcomes.values()) + len(self.found)


def fuzz(target: Target, seeds: Iterable[int], folder: Path, until: float = float("inf")) -> Findings:
    """Attempts of a target for the seeds, or until time.monotonic() is `until`; inputs that found something stay in
    folder/TARGET-SEED."""
    findings = Findings()
    folder.mkdir(parents=True, exist_ok=True)
    left = iter(seeds)
    ended = False
    while not ended:
        ended = _one_process(target, left, folder, until, findings)
    shutil.rmtree(folder / f"{target.name}-now", ignore_errors=True)
    return findings


def _one_process(target: Target, left: Iterator[int], folder: Path, until: float, findings: Findings) -> bool:
    """Feeds seeds to one child until it dies (False) or all is done (True)."""
    now = folder / f"{target.name}-now"
    command = [sys.executable, "-X", "faulthandler", "-m", "tools.fuzz.runner", target.name, str(folder)]
    with open(folder / f"{target.name}.log", "w+b") as log, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=ROOT
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        if _answer(child.stdout, PATIENCE) is None:
            child.kill()
            raise RuntimeError(f"{target.name} could not be prepared: {_last(log)}")
        for seed in left:
            if time.monotonic() > until:
                break
            shutil.rmtree(now, ignore_errors=True)
            now.mkdir()
            print(seed, file=child.stdin)
            answer = _answer(child.stdout, target.seconds)
            findings.megabytes = max(findings.megabytes, int((answer or {}).get("megabytes", 0)))
            if answer is not None and "outcome" in answer:
                findings.outcomes[answer["outcome"]] += 1
                continue
            what = answer["error"] if answer is not None else f"{_death(child, target.seconds)}; {_last(log)}"
            findings.found.append((seed, what))
            shutil.copytree(now, folder / f"{target.name}-{seed}", dirs_exist_ok=True)
            if answer is None:
                child.kill()
            if answer is None or len(findings.found) >= ENOUGH:
                return len(findings.found) >= ENOUGH
        child.stdin.close()
    return True


def _answer(stream: IO[str], seconds: float) -> dict[str, str] | None:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        line = stream.readline() if selector.select(seconds) else ""
    found: dict[str, str] | None = json.loads(line) if line else None
    return found


def _death(child: subprocess.Popen[str], seconds: float) -> str:
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} seconds"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _last(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-1:] if len(lines) < 12 else lines[:12])[:1000]


def child(name: str, folder: Path) -> None:
    """Answer each seed on stdin by one line of JSON."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    attempt = TARGETS[name].prepare(folder / f"{name}-made")
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = {"outcome": attempt(int(line), folder / f"{name}-now")}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"}
        answer |= {"megabytes": str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
