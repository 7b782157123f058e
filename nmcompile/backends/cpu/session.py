"""Run a CPU plan: native segments on the engine, the others on onnxruntime. Needs neither onnx nor the compiler."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np

from nmcompile import _native
from nmcompile.errors import InputError, PlanError
from nmcompile.made_up import limits
from nmcompile.ort_options import session_options
from nmcompile.plan import Plan
from nmcompile.tensorinfo import check_feeds, chosen_outputs, read_info

Arrays = dict[str, np.ndarray]
STEPS = frozenset({
    "embed", "enter", "leave", "first", "layer_norm", "quantize", "linear", "linear_float", "attention",
    "attention_float", "unary", "binary", "affine", "add_positions", "patches", "prepend",
})  # fmt: skip


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
    `threads` how many share the work; results do not depend on either.
    """

    def __init__(self, plan: Plan, *, threads: int | None = None, isa: str | None = None) -> None:
        header = plan.header
        if header.get("target") != "cpu":
            raise PlanError(
                f"the plan is for target {header.get('target')!r}, not for the CPU; compile it with --target cpu"
            )
        if threads is not None and not 1 <= threads <= 1024:
            raise InputError(f"threads={threads} is not between 1 and 1024; leave it out to use every core")
        self.header: dict[str, Any] = header
        self.plan = plan
        self.threads = threads or _native.default_threads()
        try:
            self.inputs = tuple(read_info(item) for item in header["inputs"])
            self.outputs = tuple(read_info(item) for item in header["outputs"])
            self._segments = [self._open(segment, isa or "") for segment in header["segments"]]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise PlanError(
                f"the plan's description is damaged ({type(error).__name__}: {error}); compile it again"
            ) from None
        self._check_names()
        natives = [segment for segment in self._segments if isinstance(segment, NativeSegment)]
        self.isa = natives[0].program.isa if natives else "onnxruntime"

    def _open(self, segment: Mapping[str, Any], isa: str) -> NativeSegment | OrtSegment:
        if segment["kind"] == "native":
            return NativeSegment(segment, self.plan, isa, self.threads)
        if segment["kind"] == "onnxruntime":
            return OrtSegment(segment, self.plan, self.threads)
        raise PlanError(
            f"the plan has a segment of unknown kind {segment['kind']!r}; it is damaged or from a newer nmcompile"
        )

    def _check_names(self) -> None:
        """Every segment must find its inputs ready and every output must be made."""
        ready = {info.name for info in self.inputs}
        for segment in self._segments:
            for name in segment.reads:
                if name not in ready:
                    raise PlanError(f"the plan reads {name!r} before it is made; compile it again")
            ready.update(segment.outputs)
        for info in self.outputs:
            if info.name not in ready:
                raise PlanError(f"the plan does not make its output {info.name!r}; compile it again")

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name for inputs by name; `outputs` picks some. Rows of padding tokens hold zeros.

        Raises InputError for names, types, shapes or token ids that do not fit.
        """
        values: Arrays = check_feeds(feeds, self.inputs)
        wanted = chosen_outputs(outputs, self.outputs)
        for segment in self._segments:
            values.update(segment.run(values))
        return {name: values[name] for name in wanted}

    def limits(self) -> tuple[dict[str, int], int | None]:
        """(rows of the table that each input looks up, most tokens that positions allow)."""
        return limits(self.header, lambda name: int(self.plan.arrays[name].shape[0]))

    def memory(self) -> int:
        """Bytes of activation memory that the native segments hold now."""
        return sum(s.program.memory() for s in self._segments if isinstance(s, NativeSegment))

    def profile(self, feeds: Mapping[str, np.ndarray]) -> list[tuple[str, int]]:
        """(step, nanoseconds) for one run, segment by segment; an onnxruntime segment counts as one step."""
        values: Arrays = check_feeds(feeds, self.inputs)
        times: list[tuple[str, int]] = []
        for segment in self._segments:
            made, spent = segment.profile(values)
            values.update(made)
            times += spent
        return times

    def trace(self, feeds: Mapping[str, np.ndarray]) -> Trace:
        """One run with every step's begin and end on every thread. Raises InputError as `run` does."""
        start = perf_counter_ns()
        values: Arrays = check_feeds(feeds, self.inputs)
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
            described = segment.described()
            parts.append(events + np.array([len(steps), 0, 0, begin, begin]))
            spans.append(segment.span(values, len(steps), len(described)))
            steps += described
        return Trace(tuple(steps), np.concatenate(parts), tuple(spans), total)


class NativeSegment:
    """A program of the engine, bound to the model's names."""

    def __init__(self, segment: Mapping[str, Any], plan: Plan, isa: str, threads: int) -> None:
        self.inputs = [str(name) for name in segment["inputs"]]
        self.outputs = [str(name) for name in segment["outputs"]]
        self.mask = segment["mask"]
        self.reads = [*self.inputs, *([] if self.mask is None else [str(self.mask)])]
        self.views = {str(name): str(view) for name, view in segment["views"].items()}
        leaves = sorted(step["slot"] for step in segment["steps"] if step["step"] == "leave")
        if leaves != list(range(len(self.outputs))) or not set(self.views) <= set(self.outputs):
            raise PlanError("the plan's outputs do not fit its steps; compile it again")
        try:
            self.program = _native.Program(isa=isa, threads=threads)
        except ValueError as error:
            raise PlanError(str(error)) from None
        try:
            for rows, layout, geometry in segment["buffers"]:
                self.program.buffer(rows=rows, layout=layout, geometry=geometry)
            for step in segment["steps"]:
                name = step["step"]
                if name not in STEPS:
                    raise PlanError(f"the plan has an unknown step {name!r}; it is damaged or from a newer nmcompile")
                arguments = {key: _resolve(value, plan) for key, value in step.items() if key != "step"}
                getattr(self.program, name)(**arguments)
            self.program.prepare()
        except (ValueError, TypeError, OverflowError) as error:
            text = str(error).splitlines()[0]
            raise PlanError(f"the plan's program does not fit together ({text}); compile it again") from None

    def _feeds(self, values: Arrays) -> tuple[list[np.ndarray], np.ndarray | None]:
        arrays = [_plain(values[name]) for name in self.inputs]
        return arrays, None if self.mask is None else _plain(values[self.mask])

    def run(self, values: Arrays) -> Arrays:
        arrays, mask = self._feeds(values)
        try:
            results = self.program.run(inputs=arrays, mask=mask)
        except ValueError as error:
            raise InputError(self._named(str(error))) from None
        except MemoryError:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise InputError(f"not enough memory to run inputs of shape {shapes}; run smaller batches") from None
        return self._viewed(results)

    def _viewed(self, results: Sequence[np.ndarray]) -> Arrays:
        """Results by name, in the shape and type that the model gives them."""
        made = dict(zip(self.outputs, results, strict=True))
        for name, view in self.views.items():
            if view == "squeeze":
                made[name] = made[name][..., 0]
            elif view == "float16":
                made[name] = made[name].astype(np.float16)
        return made

    def profile(self, values: Arrays) -> tuple[Arrays, list[tuple[str, int]]]:
        arrays, mask = self._feeds(values)
        results, spent = self.program.run_profiled(inputs=arrays, mask=mask)
        steps = [f"{kind} {text}".strip() for kind, text in self.program.steps()]
        return self._viewed(results), list(zip(steps, spent, strict=True))

    def trace(self, values: Arrays) -> tuple[Arrays, np.ndarray]:
        """Outputs, and events counted from the segment's first step and begin."""
        arrays, mask = self._feeds(values)
        try:
            results, events = self.program.run_traced(inputs=arrays, mask=mask)
        except ValueError as error:
            raise InputError(self._named(str(error))) from None
        return self._viewed(results), events

    def described(self) -> list[tuple[str, str]]:
        return list(self.program.steps())

    def span(self, values: Arrays, first: int, steps: int) -> Span:
        shapes = tuple(values[name].shape for name in self.inputs)
        real = None if self.mask is None else np.count_nonzero(values[self.mask], axis=1)
        return Span(True, first, steps, shapes, real)

    def _named(self, text: str) -> str:
        """The engine speaks of slots; users know names."""
        if text.startswith("position "):
            return f"{text}: the inputs have more tokens than the model's position table; shorten them"
        return re.sub(r"input slot (\d+)", lambda m: f"input {self.inputs[int(m[1])]!r}", text)


class OrtSegment:
    """Part of the model as ONNX, opened in onnxruntime at its first run."""

    def __init__(self, segment: Mapping[str, Any], plan: Plan, threads: int) -> None:
        self.inputs = [str(name) for name in segment["inputs"]]
        self.outputs = [str(name) for name in segment["outputs"]]
        self.reads = self.inputs
        self.model = str(segment["model"])
        self.weights: Arrays = {str(k): _resolve(v, plan) for k, v in segment["weights"].items()}
        self.plan = plan
        self.threads = threads
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
            raise InputError(f"onnxruntime could not run {self.model}: {str(error).splitlines()[0][:300]}") from None
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

    def described(self) -> list[tuple[str, str]]:
        return [("onnxruntime", self.model)]

    def span(self, values: Arrays, first: int, steps: int) -> Span:
        return Span(False, first, steps, tuple(values[name].shape for name in self.inputs), None)

    def _start(self) -> Any:
        import onnxruntime as ort

        options = session_options()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        self._held = [ort.OrtValue.ortvalue_from_numpy(values) for values in self.weights.values()]  # the plan's memory
        try:
            options.add_external_initializers(list(self.weights), self._held)
            return ort.InferenceSession(self.plan.blobs(self.model), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            text = str(error).splitlines()[0][:300]
            raise PlanError(f"onnxruntime cannot open {self.model} of the plan: {text}") from None


def _plain(array: np.ndarray) -> np.ndarray:
    """Contiguous, and of a type that the engine reads."""
    if array.dtype.kind in "iub" and array.dtype not in (np.int64, np.int32, np.bool_):
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)


def _resolve(value: Any, plan: Plan) -> Any:
    """Replace references {"array": name} by the plan's arrays, however deep they stand."""
    if isinstance(value, dict):
        if set(value) == {"array"}:
            name = value["array"]
            if name not in plan.arrays:
                raise PlanError(f"the plan refers to an array {name!r} that it does not hold; compile it again")
            return plan.arrays[name]
        return {key: _resolve(item, plan) for key, item in value.items()}
    if isinstance(value, list):
        items = [_resolve(item, plan) for item in value]
        return tuple(items) if items and isinstance(items[0], str) else items
    return value
