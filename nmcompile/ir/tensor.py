"""Between TensorProto messages and arrays: element types, sizes, bytes, and the values of Constant operators."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper

from nmcompile.errors import GraphError
from nmcompile.ir.budget import Sparse, check_dims

Array = npt.NDArray[Any]

LARGE = 1024  # bytes from which a weight is kept apart from the protobuf message

# Element types whose bytes are the array's; strings and types below one byte go through onnx.numpy_helper.
PLAIN: Mapping[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.UINT8: np.dtype(np.uint8),
    onnx.TensorProto.INT8: np.dtype(np.int8),
    onnx.TensorProto.UINT16: np.dtype(np.uint16),
    onnx.TensorProto.INT16: np.dtype(np.int16),
    onnx.TensorProto.INT32: np.dtype(np.int32),
    onnx.TensorProto.INT64: np.dtype(np.int64),
    onnx.TensorProto.BOOL: np.dtype(np.bool_),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.DOUBLE: np.dtype(np.float64),
    onnx.TensorProto.UINT32: np.dtype(np.uint32),
    onnx.TensorProto.UINT64: np.dtype(np.uint64),
    onnx.TensorProto.COMPLEX64: np.dtype(np.complex64),
    onnx.TensorProto.COMPLEX128: np.dtype(np.complex128),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    onnx.TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    onnx.TensorProto.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    onnx.TensorProto.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    onnx.TensorProto.FLOAT8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
ELEMENT_TYPE: Mapping[np.dtype[Any], int] = {dtype: number for number, dtype in PLAIN.items()}
BITS: Mapping[int, int] = {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}

VALUE_OF_CONSTANT = {  # attributes of the Constant operator and the element type each stands for
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
    "value_string": object, "value_strings": object,
}  # fmt: skip


# ---- from messages ------------------------------------------------------------------------------------------------


def byte_size(tensor: onnx.TensorProto) -> int:
    """Bytes that the tensor's shape and type ask for."""
    check_dims(tensor.name, tensor.dims)
    count: int = math.prod(tensor.dims)
    if tensor.data_type in PLAIN:
        return count * PLAIN[tensor.data_type].itemsize
    if tensor.data_type in BITS:
        return (count * BITS[tensor.data_type] + 7) // 8
    try:
        return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        raise GraphError(f"initializer '{tensor.name}': element type {tensor.data_type} is not known; "
                         "update the onnx package") from None  # fmt: skip


def to_array(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor held in the message, read-only, without a copy where its bytes are the
    array's."""
    check_dims(tensor.name, tensor.dims)
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise GraphError(f"initializer '{tensor.name}' is in another file; load the model from its path")
    if tensor.HasField("raw_data"):
        raw = tensor.raw_data
        if len(raw) != byte_size(tensor):
            raise GraphError(wrong_size(tensor, len(raw)))
        if tensor.data_type in PLAIN:
            return shaped(np.frombuffer(raw, np.uint8), tensor)
    elif count > 16 * max(1, tensor.ByteSize()):  # typed fields: a packed value takes at least one byte
        raise GraphError(wrong_size(tensor, tensor.ByteSize()))
    try:
        values = np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GraphError(f"initializer '{tensor.name}' cannot be read: {reason}; export the model again") from None
    values.flags.writeable = False
    return values


def shaped(raw: Array, tensor: onnx.TensorProto) -> Array:
    """Bytes as the tensor's array: the same memory when aligned, else a copy."""
    dtype = PLAIN[tensor.data_type]
    if raw.size and raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    values = np.frombuffer(raw, dtype).reshape(tuple(tensor.dims)) if raw.size else np.empty(tuple(tensor.dims), dtype)
    values.flags.writeable = False
    return values


def wrong_size(tensor: onnx.TensorProto, found: int) -> str:
    return (f"initializer '{tensor.name}': shape {list(tensor.dims)} does not fit its {found} bytes; "
            "the file is damaged, export the model again")  # fmt: skip


def dense(sparse: onnx.SparseTensorProto, budget: Sparse) -> Array:
    """A sparse initializer's values [NNZ] at indices [NNZ] (of the flat array) or [NNZ, rank], as a full
    array."""
    what = f"sparse initializer '{sparse.values.name}'"
    sized = onnx.TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)
    budget.take(sparse.values.name, byte_size(sized), sparse.ByteSize())
    values, indices = to_array(sparse.values), to_array(sparse.indices)
    values_at = np.zeros(tuple(sparse.dims), values.dtype)
    try:
        if indices.ndim == 2:
            values_at[tuple(indices.T)] = values
        else:
            values_at.reshape(-1)[indices] = values
    except (IndexError, ValueError):
        raise GraphError(f"{what}: indices do not fit {list(sparse.dims)}; export the model again") from None
    return values_at


def constant_value(node: onnx.NodeProto, budget: Sparse) -> Array | None:
    """The value of a Constant operator, None for any other."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return None
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        return to_array(attribute.t)
    if attribute.name == "sparse_value":
        return dense(attribute.sparse_tensor, budget)
    if attribute.name not in VALUE_OF_CONSTANT:
        return None
    return np.array(onnx.helper.get_attribute_value(attribute), VALUE_OF_CONSTANT[attribute.name])


# ---- to messages ------------------------------------------------------------------------------------------------


def header(name: str, values: Array) -> onnx.TensorProto:
    """A TensorProto of the array's name, type and shape, without its values."""
    return onnx.TensorProto(name=name, data_type=element_type(values.dtype), dims=values.shape)


def declared(name: str, data_type: int, dims: Iterable[int]) -> onnx.TensorProto:
    """A TensorProto that says its values are elsewhere, for those who need its shape and type only."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="elsewhere")
    return tensor


def element_type(dtype: np.dtype[Any] | int) -> int:
    """ONNX number of an element type."""
    if isinstance(dtype, int):
        return dtype
    return ELEMENT_TYPE.get(np.dtype(dtype)) or int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def raw_bytes(values: Array) -> memoryview:
    """The array's bytes in C order, little endian; a view when the array lies so already."""
    flat = np.ascontiguousarray(values)
    if flat.dtype.byteorder == ">":
        flat = flat.astype(flat.dtype.newbyteorder("<"))
    return flat.reshape(-1).view(np.uint8).data


def message(name: str, values: Array) -> onnx.TensorProto:
    if values.dtype in ELEMENT_TYPE:
        proto = header(name, values)
        proto.raw_data = bytes(raw_bytes(values))
        return proto
    return onnx.numpy_helper.from_array(values, name)
