"""Measures contenders in turns: one process each, all loaded, only one running at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .forms import run_float
from .load import Load
from .models import Models, feeds, write_fixed
from .peers import Form, Peer
from .protocol import PeerError, Worker

TRIAL = 0.5  # seconds in which candidates of one contender are compared
LEAST = 3  # runs of a turn at least
# Cosine of an output to the float model's. INT8 reaches 0.9947 (OpenVINO, BERT-base) and mostly 0.998 with every peer.
# An encoder without the weights of its queries, position embeddings, one layer's values or one feed-forward layer, or
# without its biases, reaches at most 0.97 with 128 tokens, 0.988 with 384.
AGREEMENT = 0.99
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """A peer with one form of the model at one share of zeros: its files, and the float model they were made from."""

    peer: Peer
    form: Form
    share: float
    python: Path
    files: dict[str, Path]
    source: Path

    @property
    def label(self) -> str:
        return label(self.peer.name, self.form.name, self.share)


@dataclass
class Measured:
    """What was found out about a contender at one shape. `medians`: milliseconds per run, one median per round."""

    peer: str
    form: str
    pattern: str | None  # the blocks it skips; None: zeros gain it nothing
    share: float
    candidate: str
    version: str
    load_seconds: float  # until the first answer
    file_bytes: int
    cosine: float
    agrees: bool
    peak_bytes: int = 0
    runs: int = 0
    medians: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return label(self.peer, self.form, self.share)


@dataclass(frozen=True)
class Measurement:
    """All contenders of one model at one shape.

    Per round, `reference`: microseconds of a fixed task before it; `others`: how many cores were busy with processes
    that are not ours.
    """

    model: str
    batch: int
    tokens: int
    contenders: list[Measured]
    left_out: dict[str, str]
    reference: list[float]
    others: list[float]

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class Settings:
    threads: int
    rounds: int
    seconds: float  # of one turn


def label(peer: str, form: str, share: float) -> str:
    """As results name a contender."""
    return f"{peer} {form}" + (f" {100 * share:g}%" if share else "")


def measure(
    model: str, models: Models, contenders: Sequence[Contender], shape: tuple[int, int], settings: Settings, say: Say
) -> Measurement:
    """Load every contender, compare its output with float, then let them take turns.

    A contender that fails, at whatever point, is left out with its reason.
    """
    folder = models.folder / f"{shape[0]}x{shape[1]}"
    folder.mkdir(exist_ok=True)
    fed = feeds(*shape, seed=2)
    inputs = folder / "inputs.npz"
    np.savez(inputs, **fed)  # type: ignore[arg-type]
    expected: dict[Path, NDArray[Any]] = {}
    left_out: dict[str, str] = {}
    racing: list[tuple[Worker, Measured]] = []
    times: list[float] = []
    others: list[float] = []
    with ExitStack() as stack:
        reference = stack.enter_context(
            Worker(Path(sys.executable), "tools.bench.peers.reference", settings.threads, folder / "reference.log")
        )
        reference.ask(do="open", model="", form="", inputs=str(inputs), threads=1)
        for item in contenders:
            say(f"{model} {shape[0]}x{shape[1]}: loading {item.label}")
            if item.source not in expected:
                expected[item.source] = run_float(str(item.source), fed)[0]
            try:
                worker, measured = _enter(item, shape, inputs, expected[item.source], settings)
            except PeerError as error:
                left_out[item.label] = str(error)
                continue
            stack.callback(worker.close)
            racing.append((worker, measured))
        for index in range(settings.rounds):
            load = Load([reference.process.pid, *(worker.process.pid for worker, _ in racing)])
            spent = reference.ask(do="run", seconds=0.2, least=LEAST)["nanoseconds"]
            times.append(round(float(np.median(spent)) / 1e3, 1))
            for worker, measured in racing:
                if measured.label not in left_out:
                    _turn(worker, measured, settings.seconds, left_out)
            others.append(round(load.others(), 2))
            say(f"{model} {shape[0]}x{shape[1]}: round {index + 1}, reference {times[-1]:.0f} us, "
                f"{others[-1]:.2f} cores busy with other processes")  # fmt: skip
        for worker, measured in racing:
            if measured.label not in left_out:
                measured.peak_bytes = int(worker.ask(do="memory")["peak_bytes"])
    finished = [measured for _, measured in racing if measured.label not in left_out]
    return Measurement(model, *shape, finished, left_out, times, others)


def _turn(worker: Worker, measured: Measured, seconds: float, left_out: dict[str, str]) -> None:
    try:
        spent = worker.ask(do="run", seconds=seconds, least=LEAST)["nanoseconds"]
    except PeerError as error:
        left_out[measured.label] = str(error)
        return
    measured.runs += len(spent)
    measured.medians.append(round(float(np.median(spent)) / 1e6, 4))


def _enter(
    item: Contender, shape: tuple[int, int], inputs: Path, expected: NDArray[Any], settings: Settings
) -> tuple[Worker, Measured]:
    """The fastest candidate whose output agrees, loaded. PeerError: none of them runs; the reason is the last one's."""
    failure = PeerError("has no files")
    best: tuple[tuple[bool, int], Worker, Measured] | None = None
    for name in item.files:
        try:
            worker, measured, time = _open(item, name, shape, inputs, expected, settings)
        except PeerError as error:
            failure = error
            continue
        rank = not measured.agrees, time
        if best is not None and best[0] <= rank:
            worker.close()
            continue
        if best is not None:
            best[1].close()
        best = rank, worker, measured
    if best is None:
        raise failure
    return best[1], best[2]


def _open(
    item: Contender, name: str, shape: tuple[int, int], inputs: Path, expected: NDArray[Any], settings: Settings
) -> tuple[Worker, Measured, int]:
    """A candidate and its least time over a short trial, in nanoseconds."""
    path, place = item.files[name], inputs.parent / f"{item.label.replace(' ', '-')}-{name}"
    given = write_fixed(path, place.with_suffix(".onnx"), shape) if item.peer.fixed else path
    worker = Worker(item.python, item.peer.module, settings.threads, place.with_suffix(".log"))
    try:
        opened = worker.ask(do="open", model=str(given), form=item.form.name, inputs=str(inputs),
                            threads=settings.threads)  # fmt: skip
        cosine = _cosine(worker, inputs.parent / "output.npy", expected)
        time = min(worker.ask(do="run", seconds=TRIAL, least=LEAST)["nanoseconds"])
    except BaseException:
        worker.close()
        raise
    return worker, Measured(
        item.peer.name, item.form.name, item.form.pattern, item.share, name, worker.version,
        round(float(opened["load_seconds"]), 3), _size(path), cosine, cosine >= AGREEMENT,
    ), time  # fmt: skip


def _cosine(worker: Worker, path: Path, expected: NDArray[Any]) -> float:
    worker.ask(do="save", path=str(path))
    found = np.load(path)
    path.unlink()
    if found.shape != expected.shape:
        raise PeerError(f"gives an output of shape {found.shape}, not {expected.shape}")
    a, b = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return round(float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)), 5)


def _size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.rglob("*")) if path.is_dir() else path.stat().st_size
