"""Measures a plan, side by side with onnxruntime: one process each, taking turns in short rounds.

`python -m nmcompile.bench` is the worker. It reads one JSON object per line and answers each with one:

{"do": "open", "model": path, "threads": n}   ->  {"inputs": [...], "load_seconds": s, "vocabulary": {...}, ...}
{"do": "feed", "batch": b, "tokens": t, ...}  ->  {"batch": b, "tokens": t or null}
{"do": "run", "seconds": s}                   ->  {"nanoseconds": [...]}      one number per run
{"do": "memory"}                              ->  {"peak_bytes": n}

and {"error": text} for what the user can mend. The worker of a plan imports numpy and the session, nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile.errors import InputError, NmcompileError
from nmcompile.json_process import Json, JsonProcess
from nmcompile.made_up import made_up
from nmcompile.ort_options import open_foreign
from nmcompile.roles import read_roles, stated
from nmcompile.session import is_plan, load
from nmcompile.tensorinfo import TensorInfo, dtype_named

Arrays = dict[str, np.ndarray]
Progress = Callable[[str, int, int], None]  # (what, done, total)

TOKENS = 128  # when none are asked for
ROUNDS, SHORTEST = 10, 0.05  # rounds per contender and shape; seconds of a round at least
REST = 0.03  # seconds between turns, in which the other's threads stop spinning


# ---- the worker: one model in one process ----------------------------------------------------------------------


class PlanRunner:
    """A plan in its session."""

    def __init__(self, path: str, threads: int | None) -> None:
        self.session = load(path, threads=threads)
        self.inputs = self.session.inputs
        vocabulary, longest = self.session.limits()
        self.facts: Json = {"runtime": "nmcompile", "isa": self.session.isa, "threads": self.session.threads,
                            "vocabulary": vocabulary, "longest": longest, "roles": stated(self.inputs)}  # fmt: skip

    def run(self, feeds: Arrays) -> object:
        return self.session.run(feeds)


class OrtRunner:
    """An ONNX model in onnxruntime with all of its optimisations."""

    def __init__(self, path: str, threads: int | None) -> None:
        import onnxruntime as ort

        count = threads or len(os.sched_getaffinity(0))
        try:
            self.session = open_foreign(path, count)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise InputError(f"onnxruntime cannot open {path}: {_first_line(error)}") from None
        self.inputs = tuple(_ort_info(item) for item in self.session.get_inputs())
        self.facts: Json = {"runtime": f"onnxruntime {ort.__version__}", "isa": "", "threads": count,
                            "vocabulary": {}, "longest": None, "roles": {}}  # fmt: skip

    def run(self, feeds: Arrays) -> object:
        try:
            return self.session.run(None, feeds)
        except Exception as error:
            raise InputError(f"onnxruntime cannot run the model: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _ort_info(item: Any) -> TensorInfo:
    names = {"float": "float32", "double": "float64"}
    kind = str(item.type).removeprefix("tensor(").removesuffix(")")
    dtype = dtype_named(names.get(kind, kind))
    if dtype is None:
        raise InputError(f"input {item.name!r} is of type {item.type}, which cannot be made up")
    return TensorInfo(item.name, dtype, tuple(item.shape))


def _check_shape(infos: Sequence[TensorInfo], batch: int, tokens: int | None) -> None:
    for info in infos:
        for axis, wanted in ((0, batch), (1, tokens)):
            fixed = info.shape[axis] if axis == 0 < len(info.shape) or len(info.shape) == 2 else None
            if wanted is not None and isinstance(fixed, int) and fixed != wanted:
                raise InputError(f"--shape asks for {wanted}, but the model takes {info}; that size is fixed")


def worker() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints may end up between the answers
    runner: PlanRunner | OrtRunner | None = None
    feeds: Arrays = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                start = time.perf_counter()
                runner = (PlanRunner if is_plan(request["model"]) else OrtRunner)(request["model"], request["threads"])
                answer = {"load_seconds": time.perf_counter() - start, **runner.facts,
                          "inputs": [[info.name, info.dtype.name, info.shape] for info in runner.inputs]}  # fmt: skip
            elif request["do"] == "memory":
                answer = {"peak_bytes": peak_memory()}
            elif runner is None:
                raise InputError("no model is open")
            elif request["do"] == "feed":
                _check_shape(runner.inputs, request["batch"], request["tokens"])
                tokens = request["tokens"] or request["default_tokens"]
                infos = read_roles(request.get("roles", {}), runner.inputs)
                feeds = made_up(infos, request["batch"], tokens, vocabulary=request["vocabulary"])
                answer = {"batch": max((len(array) for array in feeds.values() if array.ndim), default=1),
                          "tokens": _tokens(runner.inputs, feeds)}  # fmt: skip
            else:
                answer = {"nanoseconds": _timed(runner.run, feeds, request["seconds"], request["least"])}
        except NmcompileError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")


def _tokens(infos: Sequence[TensorInfo], feeds: Arrays) -> int | None:
    """Length of the sequences, None where there are none, as in images."""
    lengths = (feeds[info.name].shape[1] for info in infos
               if len(info.shape) == 2 or (len(info.shape) == 3 and not isinstance(info.shape[1], int)))  # fmt: skip
    return next(lengths, None)


def _timed(run: Callable[[Arrays], object], feeds: Arrays, seconds: float, least: int) -> list[int]:
    spent: list[int] = []
    start = now = time.perf_counter_ns()
    while now - start < seconds * 1e9 or len(spent) < least:
        before = now
        run(feeds)
        now = time.perf_counter_ns()
        spent.append(now - before)
    return spent


def peak_memory() -> int:
    """Bytes of memory that this process held at most (resident, with the mapped pages of the plan that it read)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # unlike ru_maxrss it starts anew when a program is started
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- the parent --------------------------------------------------------------------------------------------


class Worker(JsonProcess):
    """A worker process with its model open."""

    def __init__(self, model: str, threads: int | None) -> None:
        self.model = model
        super().__init__([sys.executable, "-P", "-m", "nmcompile.bench"])
        try:
            self.facts = self.ask(do="open", model=model, threads=threads)
        except BaseException:
            self.close()
            raise

    def refused(self, message: str) -> NmcompileError:
        return InputError(message)

    def ended(self, why: str) -> NmcompileError:
        return NmcompileError(f"the process that measures {self.model} {why}; was there enough memory?")


@dataclass(frozen=True)
class Latency:
    """Of one model at one shape: milliseconds per run, sequences per second."""

    batch: int
    tokens: int | None  # None where the model takes no sequences
    runs: int
    p50: float
    p90: float
    p99: float
    sequences: float
    rounds: tuple[float, ...]  # the median of each round

    @property
    def shape(self) -> str:
        """As --shape takes it."""
        return str(self.batch) if self.tokens is None else f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class Contender:
    """A model that was measured. `latencies` in the order of the shapes asked for; memory is the process's peak."""

    model: str
    runtime: str
    isa: str
    threads: int
    load_seconds: float
    peak_bytes: int
    latencies: tuple[Latency, ...]

    def to_json(self) -> Json:
        shown = [{**vars(item), "rounds": list(item.rounds)} for item in self.latencies]
        return {**vars(self), "latencies": shown}


def ratios(a: Contender, b: Contender) -> list[tuple[float, float, float]]:
    """How many times as long b takes, per shape: ratio of the medians, and the least and greatest over rounds."""
    found = []
    for one, other in zip(a.latencies, b.latencies, strict=True):
        rounds = [y / x for x, y in zip(one.rounds, other.rounds, strict=True)]
        found.append((other.p50 / one.p50, min(rounds), max(rounds)))
    return found


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    threads: int | None = None,
    shapes: Sequence[tuple[int, int | None]] = ((1, None),),
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> list[Contender]:
    """Measure models (plans, or ONNX files in onnxruntime) against each other on the same made-up inputs.

    shapes: (sequences, tokens); tokens None is 128, or what the positions of a plan allow. seconds: per model and
    shape. All get the same number of threads. Raises NmcompileError for files or shapes that do not fit.
    """
    if seconds <= 0 or any(batch < 1 or (tokens is not None and tokens < 1) for batch, tokens in shapes):
        raise InputError("shapes and seconds must be positive")
    tell = progress or (lambda *_: None)
    workers: list[Worker] = []
    try:
        for index, path in enumerate(models):
            is_plan(path)
            tell("loading", index, len(models))
            workers.append(Worker(os.fspath(path), threads))
            threads = threads or int(workers[0].facts["threads"])
        vocabulary: dict[str, int] = {}
        roles: Json = {}
        for item in workers:
            roles |= item.facts["roles"]  # a plan states what names do not tell onnxruntime's worker
            for name, rows in item.facts["vocabulary"].items():
                vocabulary[name] = min(rows, vocabulary.get(name, rows))
        default = min([TOKENS, *(item.facts["longest"] for item in workers if item.facts["longest"])])
        _check_same(workers)
        latencies: list[list[Latency]] = [[] for _ in workers]
        for index, shape in enumerate(shapes):
            feed = {"batch": shape[0], "tokens": shape[1], "default_tokens": default, "vocabulary": vocabulary,
                    "roles": roles}  # fmt: skip
            told = [0]

            def step(index: int = index, told: list[int] = told) -> None:
                told[0] += 1
                tell("measuring", index * ROUNDS + told[0], len(shapes) * ROUNDS)

            for found, (fed, rounds) in zip(latencies, _turns(workers, feed, seconds, step), strict=True):
                found.append(_latency(rounds, fed["batch"], fed["tokens"]))
        return [_contender(item, tuple(rows)) for item, rows in zip(workers, latencies, strict=True)]
    finally:
        for item in workers:
            item.close()


def _check_same(workers: Sequence[Worker]) -> None:
    names = [sorted(item[0] for item in worker.facts["inputs"]) for worker in workers]
    for worker, found in zip(workers, names, strict=True):
        if found != names[0]:
            raise InputError(
                f"{worker.model} takes {', '.join(found)}, but {workers[0].model} takes {', '.join(names[0])}; "
                "they are not the same model"
            )


def _turns(
    workers: Sequence[Worker], feed: Json, seconds: float, step: Callable[[], None]
) -> list[tuple[Json, list[list[int]]]]:
    """(what it was fed, rounds of nanoseconds) of each worker; A, B, A, B, ... so that both meet the same weather."""
    fed = [worker.ask(do="feed", **feed) for worker in workers]
    length = max(SHORTEST, seconds / ROUNDS)
    for worker in workers:
        worker.ask(do="run", seconds=min(0.2, length), least=2)  # caches, thread pools, clock
    rounds: list[list[list[int]]] = [[] for _ in workers]
    for _ in range(ROUNDS):
        for worker, found in zip(workers, rounds, strict=True):
            time.sleep(REST)
            found.append(worker.ask(do="run", seconds=length, least=1)["nanoseconds"])
        step()
    return list(zip(fed, rounds, strict=True))


def _latency(rounds: Sequence[Sequence[int]], batch: int, tokens: int | None) -> Latency:
    spent = np.array([run for item in rounds for run in item]) / 1e6
    p50, p90, p99 = (round(float(value), 4) for value in np.percentile(spent, [50, 90, 99]))
    medians = tuple(round(float(np.median(item)) / 1e6, 4) for item in rounds)
    return Latency(batch, tokens, len(spent), p50, p90, p99, round(batch * 1e3 / float(spent.mean()), 2), medians)


def _contender(worker: Worker, latencies: tuple[Latency, ...]) -> Contender:
    facts = worker.facts
    peak = int(worker.ask(do="memory")["peak_bytes"])
    return Contender(worker.model, facts["runtime"], facts["isa"], int(facts["threads"]),
                     round(float(facts["load_seconds"]), 4), peak, latencies)  # fmt: skip


if __name__ == "__main__":
    worker()
