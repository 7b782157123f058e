"""Runs a graph in onnxruntime, on given or on made-up inputs, within a budget of memory and time."""

from __future__ import annotations

import math
import mmap
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from nmcompile.errors import BudgetError, EndlessError, GraphError, NmcompileError
from nmcompile.ir.edit import extract
from nmcompile.ir.forecast import forecast, needed
from nmcompile.ir.integer import exact_products
from nmcompile.ir.model import weightless
from nmcompile.ir.tensor import element_type
from nmcompile.ort_options import session_options
from nmcompile.roles import made
from nmcompile.tensorinfo import TensorInfo

LARGEST = 1 << 24  # elements of all made-up inputs together
SECONDS = 2.0  # that a run of which not everything is known beforehand may take, and as many ...
SECONDS_PER_BYTE = 1e-6  # ... more for what its weights and inputs take
POLL = 0.005  # seconds between two looks at such a run

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


def run(
    graph: gs.Graph, feeds: Feeds, outputs: Sequence[str] | None = None, optimise: bool = False
) -> dict[str, Array]:
    """Values of the outputs, or of any tensors named in `outputs`, for one set of inputs.

    GraphError, one line, when an input is missing or onnxruntime refuses the graph or the inputs; BudgetError when the
    run would take more memory or time than the model's size accounts for (graph_forecast).
    """
    return runner(graph, outputs, optimise)(feeds)


def runner(
    graph: gs.Graph, outputs: Sequence[str] | None = None, optimise: bool = False
) -> Callable[[Feeds], dict[str, Array]]:
    """A function from inputs to the values of `outputs`: one session for many runs. Inputs that are not
    needed may be left out; others are ignored. The weights' memory is shared with the graph."""
    wanted = [t.name for t in graph.outputs] if outputs is None else list(dict.fromkeys(outputs))
    given = [t.name for t in graph.inputs if t.name in wanted]
    constants = [t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)]
    constants += [t for t in graph.outputs if isinstance(t, gs.Constant)]
    fixed = {t.name: np.asarray(t.values) for t in constants if t.name in wanted}
    computed = [name for name in wanted if name not in fixed and name not in given]
    part = extract(graph, computed) if computed else None
    session = None if part is None else _Session(part, computed, optimise)
    reads = [] if part is None else [t.name for t in part.inputs]
    needed = list(dict.fromkeys([*reads, *given]))

    def call(feeds: Feeds) -> dict[str, Array]:
        for name in needed:
            if name not in feeds:
                raise GraphError(f"input '{name}' is missing; the model needs {', '.join(needed)}")
        values: dict[str, Any] = {**{name: feeds[name] for name in given}, **fixed}
        if session is not None:
            found = session.run({name: np.asarray(feeds[name]) for name in reads})
            values.update(zip(computed, found, strict=True))
        return {name: values[name] for name in wanted}

    return call


class _Session:
    """An onnxruntime session on a graph, which it may edit, whose runs are forecast."""

    def __init__(self, graph: gs.Graph, names: Sequence[str], optimise: bool) -> None:
        exact_products(graph, optimised=optimise)
        options = session_options()
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        self._model, self._weights = weightless(graph)
        self._held = [_ort_value(values) for values in self._weights.values()]  # the session reads this memory
        options.add_external_initializers(list(self._weights), self._held)
        self._names, self._seen = list(names), set[tuple[tuple[int, ...], ...]]()
        self._by_value = _sized_by_values(self._model.graph)
        providers = ["CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(self._model.SerializeToString(), options, providers=providers)
        except Exception as error:
            raise GraphError(f"onnxruntime cannot load the model: {_reason(error)}") from None

    def run(self, feeds: Feeds) -> list[Any]:
        limits = self._limits(feeds)
        try:
            if limits is None:
                return list(self._session.run(self._names, dict(feeds)))
            with _Watch(*limits) as watch:
                return list(self._session.run(self._names, dict(feeds), watch.options))
        except NmcompileError:
            raise
        except Exception as error:  # onnxruntime raises a dozen types without a common base
            raise GraphError(f"onnxruntime cannot run the model: {_reason(error)}") from None

    def _limits(self, feeds: Feeds) -> tuple[int, float] | None:
        """(bytes, seconds) for a run that must be watched, None for one that the forecast knows to the end."""
        shapes = tuple(array.shape for array in feeds.values())
        if shapes in self._seen and not self._by_value:
            return None
        found = forecast(self._model, self._weights, feeds, self._names)
        if found.unknown:
            raise GraphError(f"{found.unknown}, so it is not run")
        if not found.open:
            self._seen.add(shapes)
            return None
        size = sum(array.nbytes for array in [*feeds.values(), *self._weights.values()])
        return found.limit, SECONDS + SECONDS_PER_BYTE * size


class _Watch:
    """Ends a run that takes too much memory or time, between two nodes; BudgetError then."""

    def __init__(self, memory: int, seconds: float) -> None:
        self.options = ort.RunOptions()
        self._memory, self._seconds, self._why = memory, seconds, ""
        self._kind: type[BudgetError] = BudgetError
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._done.set()
        self._thread.join()
        if self._why and error is not None:
            raise self._kind(f"the model was stopped: it {self._why}; is the file damaged?") from None

    def _look(self) -> None:
        start, before = time.monotonic(), _resident()
        while not self._done.wait(POLL):
            if _resident() - before > self._memory:
                self._why = f"takes more than {self._memory / 1e6:,.0f} MB"
            elif time.monotonic() - start > self._seconds:
                self._why, self._kind = f"does not end within {self._seconds:.3g} s", EndlessError
            if self._why:
                self.options.terminate = True
                return


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0


def _sized_by_values(graph: onnx.GraphProto) -> bool:
    """Whether sizes of a run may depend on what its inputs hold."""
    return bool(needed(graph) & {info.name for info in graph.input}) or any(
        a.type == onnx.AttributeProto.GRAPH for node in graph.node for a in node.attribute
    )


def _ort_value(values: Array) -> Any:
    """The array as onnxruntime sees it: the same memory."""
    values = np.ascontiguousarray(values)
    if values.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(values)
    raw = values.view(np.dtype(f"u{values.itemsize}"))  # ml_dtypes.bfloat16 and the 8-bit floats
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element_type(values.dtype))


def _reason(error: Exception) -> str:
    """onnxruntime's message on one line, without its prefix."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return text[:400] or type(error).__name__


def random_feeds(infos: Sequence[TensorInfo], seed: int = 0, dims: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Made-up inputs that a Transformer accepts, the same for the same seed.

    Free dimensions are those of `dims`, else 2 for the first and 8 for others. The content is that of each input's
    role (nmcompile.roles): masks keep a prefix of each row, ids are 0 to 19, types 0 or 1.
    """
    rng = np.random.default_rng(seed)
    sizes = [tuple(_size(dim, index, dims or {}) for index, dim in enumerate(info.shape)) for info in infos]
    total = sum(math.prod(shape) for shape in sizes)
    for info, shape in zip(infos, sizes, strict=True):
        if total > LARGEST and math.prod(shape) * len(infos) >= total:
            raise GraphError(f"input '{info.name}' is of {math.prod(shape)} elements, too many to make up; give inputs")
    return {info.name: made(info, shape, rng, lengths=rng) for info, shape in zip(infos, sizes, strict=True)}


def _size(dim: int | str | None, index: int, dims: Mapping[str, int]) -> int:
    if isinstance(dim, str) and dim in dims:
        return dims[dim]
    if isinstance(dim, int):
        return dim
    return 2 if index == 0 else 8
