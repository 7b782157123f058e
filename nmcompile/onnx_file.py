"""Reads and writes ONNX files without ever holding their weights twice.

A file is a protobuf message; the bytes of its large initializers are found by walking the wire format and
left out of what protobuf parses. Weights inside the file are read straight into arrays, weights in external
files are mapped.
Writing does the same backwards: headers come from protobuf, weights are streamed between them.

Wire format: https://protobuf.dev/programming-guides/encoding. External data: onnx/docs/ExternalData.md.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from nmcompile.errors import GraphError

Array = npt.NDArray[Any]
Span = tuple[int, int]  # start and end of a run of bytes

LARGE = 1024  # bytes from which a weight is kept apart from the protobuf message
INLINE_LIMIT = 1_900_000_000  # bytes up to which a model is one file; protobuf ends at 2^31
ALIGNMENT = 4096  # of a weight in an external file: a page, so that runtimes can map it

# ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9

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


# ---- reading -----------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model without its large initializers' bytes, and these as read-only arrays by initializer name.

    GraphError, one line: no such file, not ONNX, cut short, or an initializer or external file that does not
    fit.
    """
    try:
        with open(path, "rb") as file:
            model, spans = _read_skeleton(file, path)
            weights: dict[str, Array] = {}
            files: dict[Path, Array] = {}
            for index, tensor in enumerate(model.graph.initializer):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    weights[tensor.name] = _external(tensor, path.parent, files)
                elif index in spans:
                    weights[tensor.name] = _inside(tensor, file, spans[index])
            for tensor in _nested(model.graph):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    raw = _external_bytes(tensor, path.parent, files).tobytes()
                    tensor.ClearField("external_data")
                    tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, raw
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file; check the path of the model") from None
    except IsADirectoryError:
        raise GraphError(f"{path} is a folder; give the .onnx file in it") from None
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror or error}") from None
    return model, weights


def _read_skeleton(file: BufferedReader, path: Path) -> tuple[onnx.ModelProto, dict[int, Span]]:
    """The model parsed without large raw_data, and where in the file these lie, by index of initializer."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise GraphError(f"{path} is empty; export the model again")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            skeleton, spans = _without_weights(data, size)
            model = onnx.ModelProto.FromString(skeleton)
        except (DecodeError, ValueError) as error:
            raise GraphError(
                f"{path} is not an ONNX model or is cut short ({error}); export it again"
            ) from None
    if not model.graph.node and not model.graph.output:
        raise GraphError(f"{path} is not an ONNX model: it has no graph; export it again")
    return model, spans


def _without_weights(data: mmap.mmap, size: int) -> tuple[bytes, dict[int, Span]]:
    parts: list[bytes] = []
    spans: dict[int, Span] = {}
    count = graphs = 0
    for number, first, start, end in _fields(data, 0, size):
        if number != GRAPH:
            parts.append(data[first:end])
            continue
        graphs += 1
        if graphs > 1:  # legal protobuf: the parts of a message are merged, but nobody writes that
            raise ValueError("two graphs")
        inner: list[bytes] = []
        for field, at, begin, stop in _fields(data, start, end):
            if field != INITIALIZER:
                inner.append(data[at:stop])
                continue
            tensor: list[bytes] = []
            for item, item_at, item_begin, item_stop in _fields(data, begin, stop):
                if item == RAW_DATA and item_stop - item_begin >= LARGE:
                    spans[count] = (item_begin, item_stop)
                else:
                    tensor.append(data[item_at:item_stop])
            inner.append(_message(INITIALIZER, b"".join(tensor)))
            count += 1
        parts.append(_message(GRAPH, b"".join(inner)))
    return b"".join(parts), spans


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start of the tag, start and end of the value) of each field of the message
    data[start:end]."""
    at = start
    while at < end:
        first = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        begin = at
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 1:
            at += 8
        elif kind == 2:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif kind == 5:
            at += 4
        else:
            raise ValueError(f"wire type {kind} at byte {first}")
        if at > end or tag >> 3 == 0:
            raise ValueError(f"field at byte {first} does not fit")
        yield tag >> 3, first, begin, at


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"number at byte {at} does not end")


def _inside(tensor: onnx.TensorProto, file: BufferedReader, span: Span) -> Array:
    """Weights that lie inside the model's file, read once into an aligned array."""
    need = byte_size(tensor)
    if need != span[1] - span[0]:
        raise GraphError(_wrong_size(tensor, span[1] - span[0]))
    file.seek(span[0])
    if tensor.data_type not in PLAIN:
        tensor.raw_data = file.read(need)
        return to_array(tensor)
    raw = np.empty(need, np.uint8)
    if file.readinto(raw.data) != need:
        raise GraphError(f"initializer '{tensor.name}': the file is cut short; export the model again")
    return _shaped(raw, tensor)


def _nested(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes and subgraphs."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from attribute.g.initializer
                yield from _nested(attribute.g)


def _external(tensor: onnx.TensorProto, folder: Path, files: dict[Path, Array]) -> Array:
    """Weights in a file beside the model, mapped; `files` holds the mappings made so far."""
    raw = _external_bytes(tensor, folder, files)
    if tensor.data_type in PLAIN:
        return _shaped(raw, tensor)
    whole = onnx.TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes()
    )
    return to_array(whole)


def _external_bytes(tensor: onnx.TensorProto, folder: Path, files: dict[Path, Array]) -> Array:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    what = f"initializer '{tensor.name}'"
    location = facts.get("location", "")
    try:
        offset = int(facts.get("offset") or 0)
        need = byte_size(tensor)
        length = int(facts.get("length") or need)
    except ValueError:
        raise GraphError(
            f"{what}: its external offset or length is not a number; export the model again"
        ) from None
    path = inside_folder(folder, location, what)
    if need != length:
        raise GraphError(_wrong_size(tensor, length))
    if path not in files:
        try:
            files[path] = (
                np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
            )
        except FileNotFoundError:
            raise GraphError(f"{what}: its file {path} is missing; put it beside the model") from None
        except OSError as error:
            raise GraphError(f"{what}: its file {path} cannot be read: {error.strerror or error}") from None
    mapped = files[path]
    if offset < 0 or length < 0 or offset + length > mapped.size:
        raise GraphError(f"{what}: {offset} to {offset + length} lies beyond the {mapped.size} in {path}; "
                         "the file is cut short or not this model's")  # fmt: skip
    return mapped[offset : offset + length]


def inside_folder(folder: Path, location: str, what: str) -> Path:
    """The real path of an external file; GraphError when it is not in the model's folder."""
    if not location:
        raise GraphError(f"{what}: its external data have no location; export the model again")
    path = Path(os.path.realpath(folder / location))
    home = Path(os.path.realpath(folder))
    if Path(location).is_absolute() or ".." in Path(location).parts or not path.is_relative_to(home):
        raise GraphError(
            f"{what}: its file '{location}' leaves the model's folder, which is refused; move it there"
        )
    return path


def byte_size(tensor: onnx.TensorProto) -> int:
    """Bytes that the tensor's shape and type ask for."""
    if any(dim < 0 for dim in tensor.dims):
        raise GraphError(
            f"initializer '{tensor.name}': negative size in {list(tensor.dims)}; export the model again"
        )
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
    count = math.prod(tensor.dims)
    if any(dim < 0 for dim in tensor.dims):
        raise GraphError(
            f"initializer '{tensor.name}': negative size in {list(tensor.dims)}; export the model again"
        )
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise GraphError(f"initializer '{tensor.name}' is in another file; load the model from its path")
    if tensor.HasField("raw_data"):
        raw = tensor.raw_data
        if len(raw) != byte_size(tensor):
            raise GraphError(_wrong_size(tensor, len(raw)))
        if tensor.data_type in PLAIN:
            return _shaped(np.frombuffer(raw, np.uint8), tensor)
    elif count > 16 * max(1, tensor.ByteSize()):  # typed fields: a packed value takes at least one byte
        raise GraphError(_wrong_size(tensor, tensor.ByteSize()))
    try:
        values = np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GraphError(
            f"initializer '{tensor.name}' cannot be read: {reason}; export the model again"
        ) from None
    values.flags.writeable = False
    return values


def _shaped(raw: Array, tensor: onnx.TensorProto) -> Array:
    """Bytes as the tensor's array: the same memory when aligned, else a copy."""
    dtype = PLAIN[tensor.data_type]
    if raw.size and raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    values = (
        np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
        if raw.size
        else np.empty(tuple(tensor.dims), dtype)
    )
    values.flags.writeable = False
    return values


def _wrong_size(tensor: onnx.TensorProto, found: int) -> str:
    return (f"initializer '{tensor.name}': shape {list(tensor.dims)} does not fit its {found} bytes; "
            "the file is damaged, export the model again")  # fmt: skip


# ---- writing -----------------------------------------------------------------------------------------------


def header(name: str, values: Array) -> onnx.TensorProto:
    """A TensorProto of the array's name, type and shape, without its values."""
    return onnx.TensorProto(name=name, data_type=element_type(values.dtype), dims=values.shape)


def declared(name: str, data_type: int, dims: Iterable[int]) -> onnx.TensorProto:
    """A TensorProto that says its values are elsewhere, for those who need its shape and type only."""
    tensor = onnx.TensorProto(
        name=name, data_type=data_type, dims=dims, data_location=onnx.TensorProto.EXTERNAL
    )
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


def write(
    path: Path, model: onnx.ModelProto, weights: Mapping[str, Array], *, external: bool | None = None
) -> None:
    """Write `model` with `weights` added to its initializers, atomically: whole files appear, or nothing
    does.

    external: weights go to `NAME.data` beside the model; None does so from 1.9 GB. An old NAME.onnx stays
    readable until the moment it is replaced. `model` is used up. GraphError when the folder cannot be
    written.
    """
    path = Path(os.path.realpath(path))
    size = sum(values.nbytes for values in weights.values())
    apart = size > INLINE_LIMIT if external is None else external
    if not apart and size > INLINE_LIMIT:
        raise GraphError(
            f"{path}: {size} bytes of weights do not fit into one file; leave external=False out"
        )
    try:
        with contextlib.ExitStack() as partial:
            data = _partial(partial, path.with_name(path.name + ".data")) if apart else None
            main = _partial(partial, path)
            if data is not None:
                with open(data, "xb") as file:
                    for name, values in weights.items():
                        model.graph.initializer.append(
                            _write_external(file, name, values, path.name + ".data")
                        )
            with open(main, "xb") as file:
                _write_message(file, model, {} if apart else weights)
            if data is not None:
                os.replace(data, path.with_name(path.name + ".data"))
            os.replace(main, path)
    except OSError as error:
        raise GraphError(f"{path} cannot be written: {error.strerror or error}") from None


def _partial(cleanups: contextlib.ExitStack, path: Path) -> Path:
    """A temporary name beside `path`, removed at the end if it still exists."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    cleanups.callback(partial.unlink, missing_ok=True)
    return partial


def _write_external(file: BinaryIO, name: str, values: Array, location: str) -> onnx.TensorProto:
    file.write(bytes(-file.tell() % ALIGNMENT))
    tensor = header(name, values)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", file.tell()), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    file.write(raw_bytes(values))
    return tensor


def _write_message(file: BinaryIO, model: onnx.ModelProto, weights: Mapping[str, Array]) -> None:
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    heads = {}
    for name, values in weights.items():
        head = header(name, values).SerializeToString(deterministic=True) + _prefix(RAW_DATA, values.nbytes)
        heads[name] = _prefix(INITIALIZER, len(head) + values.nbytes) + head
    total = len(graph) + sum(len(heads[name]) + values.nbytes for name, values in weights.items())
    file.write(model.SerializeToString(deterministic=True))
    file.write(_prefix(GRAPH, total))
    file.write(graph)
    for name, values in weights.items():
        file.write(heads[name])
        file.write(raw_bytes(values))


def _message(number: int, body: bytes) -> bytes:
    return _prefix(number, len(body)) + body


def _prefix(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    found = bytearray([number << 3 | 2])
    while length > 0x7F:
        found.append(length & 0x7F | 0x80)
        length >>= 7
    found.append(length)
    return bytes(found)
