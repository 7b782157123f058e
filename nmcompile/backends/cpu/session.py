"""Run a CPU plan: native segments on the engine, the others on onnxruntime. Needs neither onnx nor the compiler."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, TypeVar

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu import budget
from nmcompile.backends.cpu.onnx_blob import check_blob
from nmcompile.backends.cpu.program import Arrays, Program, limits, line
from nmcompile.backends.cpu.steps import Ref
from nmcompile.errors import InputError, PlanError
from nmcompile.guards import check as check_guards
from nmcompile.guards import read_guards
from nmcompile.ort_options import session_options
from nmcompile.plan import Plan
from nmcompile.roles import read_roles
from nmcompile.tensorinfo import check_feeds, chosen_outputs, read_infos

T = TypeVar("T")
NOWHERE = "/dev/null/nowhere"  # a folder that there cannot be
MOST_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"  # of one node
MOST_SEGMENTS, MOST_BUFFERS, MOST_STEPS = 1024, 1 << 15, 1 << 17  # of a plan


@dataclass(frozen=True)
class Span:
    """A segment within a traced run: its steps [first, first + steps) of the run's, and what it was given.

    shapes: of its inputs; real: tokens of each sequence that the mask leaves, int64 [batch], None without a mask.
    """

    native: bool
    first: int
    steps: int
    shapes: tuple[tuple[int, ...], ...]
    real: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Trace:
    """What each thread did in one run. steps: (kind, description), segment by segment.

    events: int64 [n, 5] of step, thread, panel of 64 tokens (-1: onnxruntime), begin and end in nanoseconds since the
    run began; a step has one for each thread and panel. nanoseconds: of the whole run, in and out included.
    """

    steps: tuple[tuple[str, str], ...]
    events: np.ndarray
    spans: tuple[Span, ...]
    nanoseconds: int


class Session:
    """A loaded plan. `run` may be called from several threads at once and releases the interpreter lock.

    `inputs` and `outputs` describe the model's; free sizes are chosen at each run. `isa` names the kernels in use,
    `threads` how many share the work; results do not depend on either. memory: bytes that a run may take, as
    `nmcompile.load` says; native_only: refuse a plan with onnxruntime segments.
    """

    def __init__(self, plan: Plan, *, threads: int | None = None, isa: str | None = None, memory: int | None = None,
                 native_only: bool = False) -> None:  # fmt: skip
        header = plan.header
        if header.get("target") != "cpu":
            raise PlanError(
                f"the plan is for target {str(header.get('target'))[:60]!r}, not for the CPU; "
                "compile it with --target cpu"
            )
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise InputError(f"threads={threads!r} is not between 1 and 1024; leave it out to use every core")
        if isa is not None and not isinstance(isa, str):
            raise InputError(f"isa={isa!r} is no name of kernels; leave it out to use the best")
        self.header: dict[str, Any] = header
        self.plan = plan
        self.threads = threads or _native.default_threads()
        self._allowed = budget.allowed(memory)
        try:
            self.inputs = read_roles(header.get("roles", {}), read_infos(header["inputs"], "inputs"))
            self.outputs = read_infos(header["outputs"], "outputs")
            _check_counts(header["segments"], header.get("layers", []))
            if native_only and any(segment["kind"] != "native" for segment in header["segments"]):
                raise PlanError("the plan has onnxruntime segments, and native_only was asked for")
            self.guards = read_guards(header.get("assumes", []), [info.name for info in self.inputs])
            self._segments = [self._open(segment, isa or "") for segment in header["segments"]]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            why = f"{type(error).__name__}: {line(error)}"
            raise PlanError(f"the plan's description is damaged ({why}); compile it again") from None
        self._check_names()
        natives = [segment for segment in self._segments if isinstance(segment, NativeSegment)]
        budget.limit([segment.program for segment in natives], header, memory)
        self.isa = natives[0].program.isa if natives else "onnxruntime"

    def _open(self, segment: Mapping[str, Any], isa: str) -> NativeSegment | OrtSegment:
        if segment["kind"] == "native":
            return NativeSegment(segment, self.plan.arrays, isa, self.threads, budget.most_copied(self.plan.size))
        if segment["kind"] == "onnxruntime":
            return OrtSegment(segment, self.plan, self.threads, self._allowed)
        shown = str(segment["kind"])[:60]
        raise PlanError(f"the plan has a segment of unknown kind {shown!r}; it is damaged or from a newer nmcompile")

    def _check_names(self) -> None:
        """Every segment must find its inputs ready and every output must be made."""
        ready = {info.name for info in self.inputs}
        for segment in self._segments:
            for name in segment.reads:
                if name not in ready:
                    raise PlanError(f"the plan reads {name[:60]!r} before it is made; compile it again")
            ready.update(segment.outputs)
        for info in self.outputs:
            if info.name not in ready:
                raise PlanError(f"the plan does not make its output {info.name!r}; compile it again")

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The inputs, of the types and shapes of the model's, within what the plan assumes of them."""
        self.plan.check_unchanged()
        values = check_feeds(feeds, self.inputs)
        check_guards(self.guards, values)
        return values

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name for inputs by name; `outputs` picks some. Rows of padding tokens hold zeros.

        Raises InputError for names, types, shapes or token ids that do not fit, PlanError when the file was written to
        since it was loaded.
        """
        values = self._checked(feeds)
        wanted = chosen_outputs(outputs, self.outputs)
        for segment in self._segments:
            values.update(segment.run(values))
        return {name: values[name] for name in wanted}

    def limits(self) -> tuple[dict[str, int], int | None]:
        """(rows of the table that each input looks up, most tokens that positions allow)."""
        try:
            return limits((program for program in self.programs if program is not None), self.plan.arrays)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            why = f"{type(error).__name__}: {line(error)}"
            raise PlanError(f"the plan's steps are damaged ({why}); compile it again") from None

    @property
    def programs(self) -> tuple[Program | None, ...]:
        """What the engine runs, segment by segment; None for those on onnxruntime."""
        return tuple(s.described if isinstance(s, NativeSegment) else None for s in self._segments)

    def tune(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Measure the engine's steps on these inputs, and split later runs among threads by their times instead of the
        shipped cost model. Outputs keep their bits. Call it once, before the session serves; InputError as `run`."""
        values = self._checked(feeds)
        for segment in self._segments:
            if isinstance(segment, NativeSegment):
                segment.tune(values)
            values.update(segment.run(values))

    def memory(self) -> int:
        """Bytes of activation memory that the native segments hold now."""
        return sum(s.program.memory() for s in self._segments if isinstance(s, NativeSegment))

    def profile(self, feeds: Mapping[str, np.ndarray]) -> list[tuple[str, int]]:
        """(step, nanoseconds) for one run, segment by segment; an onnxruntime segment counts as one step."""
        values = self._checked(feeds)
        times: list[tuple[str, int]] = []
        for segment in self._segments:
            made, spent = segment.profile(values)
            values.update(made)
            times += spent
        return times

    def trace(self, feeds: Mapping[str, np.ndarray]) -> Trace:
        """One run with every step's begin and end on every thread. Raises InputError as `run` does."""
        start = perf_counter_ns()
        values = self._checked(feeds)
        found: list[tuple[int, np.ndarray]] = []
        for segment in self._segments:
            begin = perf_counter_ns() - start
            made, events = segment.trace(values)
            found.append((begin, events))
            values.update(made)
        total = perf_counter_ns() - start
        steps: list[tuple[str, str]] = []
        spans: list[Span] = []
        parts = [np.zeros((0, 5), np.int64)]
        for segment, (begin, events) in zip(self._segments, found, strict=True):
            own = segment.steps()
            parts.append(events + np.array([len(steps), 0, 0, begin, begin]))
            spans.append(segment.span(values, len(steps), len(own)))
            steps += own
        return Trace(tuple(steps), np.concatenate(parts), tuple(spans), total)


class NativeSegment:
    """A program of the engine, bound to the model's names."""

    def __init__(
        self, segment: Mapping[str, Any], arrays: Mapping[str, np.ndarray], isa: str, threads: int, most_copied: int = 0
    ) -> None:
        self.described = Program.from_json(segment)
        self.outputs, self.reads = self.described.outputs, self.described.reads
        try:
            self.program = _native.Program(isa=isa, threads=threads, most_copied=most_copied)
        except (ValueError, TypeError) as error:  # of a name that is no text C++ reads
            raise PlanError(line(error)) from None
        self.described.build(self.program, arrays)

    def _feeds(self, values: Arrays) -> tuple[list[np.ndarray], np.ndarray | None]:
        mask = self.described.mask
        arrays = [_plain(values[name]) for name in self.described.inputs]
        return arrays, None if mask is None else _plain(values[mask])

    def run(self, values: Arrays) -> Arrays:
        return self.described.viewed(self._call(self.program.run, values))

    def _call(self, method: Callable[..., T], values: Arrays) -> T:
        arrays, mask = self._feeds(values)
        try:
            return method(inputs=arrays, mask=mask)
        except MemoryError:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise InputError(f"not enough memory to run inputs of shape {shapes}; run smaller batches") from None
        except (ValueError, TypeError, BufferError) as error:  # the latter: of types that C++ does not know
            raise InputError(self._named(line(error))) from None

    def tune(self, values: Arrays) -> None:
        """Let schedules count with what each step takes on this machine, the least of some runs."""
        from nmcompile.backends.cpu.measure import step_costs  # what only runs plans need not load it

        self.program.measured(step_costs(lambda: self._call(self.program.run_costs, values)))

    def profile(self, values: Arrays) -> tuple[Arrays, list[tuple[str, int]]]:
        results, spent = self._call(self.program.run_profiled, values)
        steps = [f"{kind} {text}".strip() for kind, text in self.program.steps()]
        return self.described.viewed(results), list(zip(steps, spent, strict=True))

    def trace(self, values: Arrays) -> tuple[Arrays, np.ndarray]:
        """Outputs, and events counted from the segment's first step and begin."""
        results, events = self._call(self.program.run_traced, values)
        return self.described.viewed(results), events

    def steps(self) -> list[tuple[str, str]]:
        """(kind, description) of each, as the engine tells them."""
        return list(self.program.steps())

    def span(self, values: Arrays, first: int, steps: int) -> Span:
        described = self.described
        shapes = tuple(values[name].shape for name in described.inputs)
        real = None if described.mask is None else np.count_nonzero(values[described.mask], axis=1)
        return Span(True, first, steps, shapes, real)

    def _named(self, text: str) -> str:
        """The engine speaks of slots; users know names."""
        if text.startswith("position "):
            return f"{text}: the inputs have more tokens than the model's position table; shorten them"
        if text.startswith("memory: "):
            return f"{text}; run smaller batches, or load the plan with more memory="
        return re.sub(r"input slot (\d+)", lambda m: f"input {self.described.inputs[int(m[1])]!r}", text)


class OrtSegment:
    """Part of the model as ONNX, opened in onnxruntime at its first run.

    It reads no file and no memory but the plan's weights, and allocates no more than `memory` bytes together with all
    other segments of the process. How long it runs is not bounded: a loop goes on for as often as it says.
    """

    def __init__(self, segment: Mapping[str, Any], plan: Plan, threads: int, memory: int) -> None:
        self.inputs = [str(name) for name in segment["inputs"]]
        self.outputs = [str(name) for name in segment["outputs"]]
        self.reads = self.inputs
        self.model = str(segment["model"])
        try:
            self.weights: Arrays = {str(k): Ref.from_json(v).of(plan.arrays) for k, v in segment["weights"].items()}
        except TypeError:
            raise PlanError(f"a weight of {self.model} is no array of the plan; compile it again") from None
        self._blob = plan.blobs(self.model)  # a copy: what was checked is what runs
        nodes = check_blob(self._blob, self.model, self.weights)
        self._most_folded = budget.most_copied(plan.size) // max(nodes, 1)
        self.threads = threads
        self.memory = memory
        self._session: Any = None
        self._held: list[Any] = []
        self._lock = threading.Lock()

    def run(self, values: Arrays) -> Arrays:
        with self._lock:
            if self._session is None:
                self._session = self._start()
        try:
            results = self._session.run(self.outputs, {name: values[name] for name in self.inputs})
        except Exception as error:  # onnxruntime's exceptions have no common base
            if "bfc_arena" in str(error):
                raise InputError(
                    f"onnxruntime needs more memory for {self.model} than the {budget.ARENA.size >> 20} MB allowed; "
                    "run smaller batches, or load the plan with more memory="
                ) from None
            raise InputError(f"onnxruntime could not run {self.model}: {line(error)}") from None
        if not all(isinstance(values, np.ndarray) for values in results):
            raise PlanError(f"{self.model} of the plan gives something that is no array; compile it again")
        return dict(zip(self.outputs, results, strict=True))

    def profile(self, values: Arrays) -> tuple[Arrays, list[tuple[str, int]]]:
        start = perf_counter_ns()
        made = self.run(values)
        return made, [(f"onnxruntime {self.model}", perf_counter_ns() - start)]

    def trace(self, values: Arrays) -> tuple[Arrays, np.ndarray]:
        """Outputs, and the one event of the segment, on thread 0."""
        start = perf_counter_ns()
        made = self.run(values)
        return made, np.array([[0, 0, -1, 0, perf_counter_ns() - start]])

    def steps(self) -> list[tuple[str, str]]:
        return [("onnxruntime", self.model)]

    def span(self, values: Arrays, first: int, steps: int) -> Span:
        return Span(False, first, steps, tuple(values[name].shape for name in self.inputs), None)

    def _start(self) -> Any:
        import onnxruntime as ort

        options = session_options()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
        options.add_session_config_entry(MOST_FOLDED, str(self._most_folded))
        budget.ARENA.share(options, self.memory)
        try:
            self._held = [ort.OrtValue.ortvalue_from_numpy(values) for values in self.weights.values()]  # not copied
            options.add_external_initializers(list(self.weights), self._held)
            session = ort.InferenceSession(self._blob, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise PlanError(f"onnxruntime cannot open {self.model} of the plan: {line(error)}") from None
        self._blob = b""
        return session


def _plain(array: np.ndarray) -> np.ndarray:
    """Contiguous, and of a type that the engine reads."""
    if array.dtype.kind in "iub" and array.dtype not in (np.int64, np.int32, np.bool_):
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def _check_counts(segments: Any, layers: Any) -> None:
    """PlanError when there are more segments, buffers or steps than any model needs: loading takes time for each."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "name" in layer for layer in layers):
        raise PlanError("the plan's list of layers is damaged; compile it again")
    buffers = sum(len(segment.get("buffers", ())) for segment in segments)
    steps = sum(len(segment.get("steps", ())) for segment in segments)
    if len(segments) > MOST_SEGMENTS or buffers > MOST_BUFFERS or steps > MOST_STEPS:
        raise PlanError(f"the plan has {len(segments)} segments, {buffers} buffers and {steps} steps, more than "
                        f"{MOST_SEGMENTS}, {MOST_BUFFERS} and {MOST_STEPS}; compile it again")  # fmt: skip
