"""Computes the result of one node on small values: the few operators of sizes in numpy, any other in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

Array = npt.NDArray[Any]

LARGEST = 1 << 16  # elements of what goes in together and of each result
RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
                    "Bernoulli", "Dropout", "ImageDecoder"})  # fmt: skip


def compute(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], values: Mapping[str, Array],
    sizes: Sequence[int | None], opsets: Iterable[onnx.OperatorSetIdProto],
) -> dict[str, Array] | None:  # fmt: skip
    """Results by name; None where an input is not known, or the results' `sizes` (elements) are not or are too large.

    Shape and Size need only the type of their input.
    """
    if node.op_type in ("Shape", "Size"):
        return _sized(node, types)
    if any(name and name not in values for name in node.input) or node.op_type in RANDOM:
        return None
    given = {name: values[name] for name in node.input if name}
    if any(size is None or size > LARGEST for size in sizes) or sum(x.size for x in given.values()) > LARGEST:
        return None
    plain = PLAIN.get(node.op_type)
    if plain is not None and len(node.output) == 1 and all(node.input):
        try:
            with np.errstate(all="ignore"):
                found = plain(node, *(given[name] for name in node.input))
        except (ValueError, IndexError, TypeError, OverflowError):
            return None
        if found is not None:
            return {node.output[0]: np.asarray(found)}
    return _run(node, given, opsets)


def _sized(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> dict[str, Array] | None:
    kind = types.get(node.input[0]) if node.input else None
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    if not all(dim.HasField("dim_value") for dim in kind.tensor_type.shape.dim):
        return None
    dims = np.array([dim.dim_value for dim in kind.tensor_type.shape.dim], np.int64)
    if node.op_type == "Size":
        return {node.output[0]: np.array(dims.prod(dtype=np.int64))}
    return {node.output[0]: dims[slice(_attribute(node, "start", 0), _attribute(node, "end", None))]}


def _run(
    node: onnx.NodeProto, given: Mapping[str, Array], opsets: Iterable[onnx.OperatorSetIdProto]
) -> dict[str, Array] | None:
    """By onnxruntime, as the model itself would be run."""
    names = [name for name in node.output if name]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        inputs = [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                  for name, x in given.items()]  # fmt: skip
        graph = onnx.helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=name) for name in names])
        model = onnx.helper.make_model(graph, opset_imports=list(opsets))
        model.ir_version = onnx.helper.find_min_ir_version_for(list(opsets), ignore_unknown=True)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, map(np.asarray, session.run(names, dict(given))), strict=True))
    except Exception:  # onnxruntime raises a dozen types without a common base; then the value is not known
        return None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _gather(node: onnx.NodeProto, x: Array, index: Array) -> Array:
    return np.asarray(np.take(x, index, axis=_attribute(node, "axis", 0)))


def _concat(node: onnx.NodeProto, *parts: Array) -> Array:
    return np.concatenate(parts, axis=_attribute(node, "axis", 0))


def _unsqueeze(node: onnx.NodeProto, x: Array, axes: Array | None = None) -> Array:
    where = _attribute(node, "axes", None) if axes is None else axes.tolist()
    return np.expand_dims(x, tuple(where))


def _squeeze(node: onnx.NodeProto, x: Array, axes: Array | None = None) -> Array:
    where = _attribute(node, "axes", None) if axes is None else axes.reshape(-1).tolist()
    return np.squeeze(x, None if where is None else tuple(where))


def _cast(node: onnx.NodeProto, x: Array) -> Array | None:
    to = onnx.helper.tensor_dtype_to_np_dtype(_attribute(node, "to", onnx.TensorProto.INT64))
    return None if x.dtype.kind not in "biu" or to.kind not in "iuf" else x.astype(to)


# Of numpy's meaning in these operators, on whole numbers as sizes are.
PLAIN: Mapping[str, Callable[..., Array | None]] = {
    "Identity": lambda node, x: x,
    "Gather": _gather,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "Add": lambda node, x, y: x + y,
    "Sub": lambda node, x, y: x - y,
    "Mul": lambda node, x, y: x * y,
    "Equal": lambda node, x, y: x == y,
    "Where": lambda node, c, x, y: np.asarray(np.where(c, x, y)),
}
