"""Runs a graph in onnxruntime, on given or on made-up inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import onnxruntime as ort

from nmcompile.errors import GraphError
from nmcompile.graph_edit import extract
from nmcompile.graph_integer import exact_products
from nmcompile.graph_model import weightless
from nmcompile.graph_tensor import element_type
from nmcompile.ort_options import session_options
from nmcompile.tensorinfo import TensorInfo

LARGEST = 1 << 30  # elements of a made-up input

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


def run(
    graph: gs.Graph, feeds: Feeds, outputs: Sequence[str] | None = None, optimise: bool = False
) -> dict[str, Array]:
    """Values of the outputs, or of any tensors named in `outputs`, for one set of inputs.

    GraphError, one line, when an input is missing or onnxruntime refuses the graph or the inputs.
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
    session, held = (None, []) if part is None else _session(part, optimise)
    reads = [] if part is None else [t.name for t in part.inputs]
    needed = list(dict.fromkeys([*reads, *given]))

    def call(feeds: Feeds, _held: object = held) -> dict[str, Array]:  # _held: the session reads this memory
        for name in needed:
            if name not in feeds:
                raise GraphError(f"input '{name}' is missing; the model needs {', '.join(needed)}")
        values: dict[str, Any] = {**{name: feeds[name] for name in given}, **fixed}
        if session is not None:
            try:
                found = session.run(computed, {name: np.asarray(feeds[name]) for name in reads})
            except Exception as error:  # onnxruntime raises a dozen types without a common base
                raise GraphError(f"onnxruntime cannot run the model: {_reason(error)}") from None
            values.update(zip(computed, found, strict=True))
        return {name: values[name] for name in wanted}

    return call


def _session(graph: gs.Graph, optimise: bool) -> tuple[Any, list[Any]]:
    """A session on the graph, which it may edit, and the values that it must be outlived by."""
    exact_products(graph, optimised=optimise)
    options = session_options()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    model, weights = weightless(graph)
    held = [_ort_value(values) for values in weights.values()]
    options.add_external_initializers(list(weights), held)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise GraphError(f"onnxruntime cannot load the model: {_reason(error)}") from None
    return session, held


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

    Free dimensions are those of `dims`, else 2 for the first and 8 for others. Names tell the content: *mask*
    a prefix of ones per row, *token_type* and *segment* 0 or 1, *position* 0, 1, 2, ...; other integers 0 to
    19, floats normal.
    """
    rng = np.random.default_rng(seed)
    return {info.name: _feed(info, rng, dims or {}) for info in infos}


def _feed(info: TensorInfo, rng: np.random.Generator, dims: Mapping[str, int]) -> Array:
    shape = tuple(_size(dim, index, dims) for index, dim in enumerate(info.shape))
    if math.prod(shape) > LARGEST:
        raise GraphError(f"input '{info.name}' is of {math.prod(shape)} elements, too many to make up; give inputs")
    name = info.name.lower()
    if info.dtype.kind in "OSUT":
        return np.full(shape, "text", object)
    if "mask" in name and len(shape) == 2:
        lengths = rng.integers(1, max(2, shape[1] + 1), shape[0])
        lengths[:1] = shape[1]  # one full row
        return (np.arange(shape[1]) < lengths[:, None]).astype(info.dtype)
    if "mask" in name:
        return np.ones(shape, info.dtype) if info.dtype.kind in "iub" else np.zeros(shape, info.dtype)
    if info.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if info.dtype.kind in "iu":
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(info.dtype)
        if "token_type" in name or "segment" in name:
            return rng.integers(0, 2, shape).astype(info.dtype)
        return rng.integers(0, 20, shape).astype(info.dtype)
    return rng.standard_normal(shape).astype(info.dtype)


def _size(dim: int | str | None, index: int, dims: Mapping[str, int]) -> int:
    if isinstance(dim, str) and dim in dims:
        return dims[dim]
    if isinstance(dim, int):
        return dim
    return 2 if index == 0 else 8
