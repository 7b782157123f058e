"""Reads and writes ONNX files without ever holding their weights twice.

A file is a protobuf message; the bytes of its large initializers are found by walking the wire format and
left out of what protobuf parses. Weights inside the file are read straight into arrays, weights in external
files are mapped.
Writing does the same backwards: headers come from protobuf, weights are streamed between them.

Wire format: https://protobuf.dev/programming-guides/encoding. External data: onnx/docs/ExternalData.md.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from nmcompile.errors import GraphError
from nmcompile.files import replacing
from nmcompile.ir import tensor as tensors
from nmcompile.ir.tensor import Array

Span = tuple[int, int]  # start and end of a run of bytes

INLINE_LIMIT = 1_900_000_000  # bytes up to which a model is one file; protobuf ends at 2^31
ALIGNMENT = 4096  # of a weight in an external file: a page, so that runtimes can map it

FIELDS = 2_000_000  # of one message: nodes, weights and what is known of tensors, at two bytes each or more

# ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9

# ---- reading -----------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model without its large initializers' bytes, and these as read-only arrays by initializer name.

    GraphError, one line: no such file, not ONNX, cut short, or an initializer or external file that does not
    fit.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise GraphError(f"{path} is not a regular file; give the path of an .onnx file")
        with open(path, "rb") as file:
            model, spans = _read_skeleton(file, path)
            weights: dict[str, Array] = {}
            files: dict[Path, Array] = {}
            for index, tensor in enumerate(model.graph.initializer):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    weights[tensor.name] = _external(tensor, path, files)
                elif index in spans:
                    weights[tensor.name] = _inside(tensor, file, spans[index])
            for tensor in _nested(model.graph):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    raw = _external_bytes(tensor, path, files).tobytes()
                    tensor.ClearField("external_data")
                    tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, raw
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file; check the path of the model") from None
    except IsADirectoryError:
        raise GraphError(f"{path} is a folder; give the .onnx file in it") from None
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise GraphError(f"{path} takes more memory than this machine has") from None
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
            raise GraphError(f"{path} is not an ONNX model or is cut short ({error}); export it again") from None
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
                if item == RAW_DATA and item_stop - item_begin >= tensors.LARGE:
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
    at, count = start, 0
    while at < end:
        first = at
        count += 1
        if count > FIELDS:
            raise ValueError(f"more than {FIELDS:,} fields in one message")
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
    need = tensors.byte_size(tensor)
    if need != span[1] - span[0]:
        raise GraphError(tensors.wrong_size(tensor, span[1] - span[0]))
    file.seek(span[0])
    if tensor.data_type not in tensors.PLAIN:
        tensor.raw_data = file.read(need)
        return tensors.to_array(tensor)
    raw = np.empty(need, np.uint8)
    if file.readinto(raw.data) != need:
        raise GraphError(f"initializer '{tensor.name}': the file is cut short; export the model again")
    return tensors.shaped(raw, tensor)


def _nested(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes and subgraphs."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from attribute.g.initializer
                yield from _nested(attribute.g)


def _external(tensor: onnx.TensorProto, model: Path, files: dict[Path, Array]) -> Array:
    """Weights in a file beside the model, mapped; `files` holds the mappings made so far."""
    raw = _external_bytes(tensor, model, files)
    if tensor.data_type in tensors.PLAIN:
        return tensors.shaped(raw, tensor)
    whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
    return tensors.to_array(whole)


def _external_bytes(tensor: onnx.TensorProto, model: Path, files: dict[Path, Array]) -> Array:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    what = f"initializer '{tensor.name}'"
    location = facts.get("location", "")
    try:
        offset = int(facts.get("offset") or 0)
        need = tensors.byte_size(tensor)
        length = int(facts.get("length") or need)
    except ValueError:
        raise GraphError(f"{what}: its external offset or length is not a number; export the model again") from None
    path = inside_folder(model, location, what)
    if need != length:
        raise GraphError(tensors.wrong_size(tensor, length))
    if path not in files:
        try:
            files[path] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        except FileNotFoundError:
            raise GraphError(f"{what}: its file {path} is missing; put it beside the model") from None
        except OSError as error:
            raise GraphError(f"{what}: its file {path} cannot be read: {error.strerror or error}") from None
    mapped = files[path]
    if offset < 0 or length < 0 or offset + length > mapped.size:
        raise GraphError(f"{what}: {offset} to {offset + length} lies beyond the {mapped.size} in {path}; "
                         "the file is cut short or not this model's")  # fmt: skip
    return mapped[offset : offset + length]


def inside_folder(model: Path, location: str, what: str) -> Path:
    """The real path of an external file; GraphError when it is not in the model's folder.

    Where the model is a symbolic link, the file may be beside what it points to, as in the cache of Hugging Face.
    """
    if not location:
        raise GraphError(f"{what}: its external data have no location; export the model again")
    path = Path(os.path.realpath(model.parent / location))
    homes = (os.path.realpath(model.parent), os.path.dirname(os.path.realpath(model)))
    inside = any(path.is_relative_to(home) for home in homes)
    if Path(location).is_absolute() or ".." in Path(location).parts or not inside:
        raise GraphError(f"{what}: its file '{location}' leaves the model's folder, which is refused; move it there")
    return path


# ---- writing -----------------------------------------------------------------------------------------------


def write(path: Path, model: onnx.ModelProto, weights: Mapping[str, Array], *, external: bool | None = None) -> None:
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
        raise GraphError(f"{path}: {size} bytes of weights do not fit into one file; leave external=False out")
    with replacing(path, GraphError) as main:
        if not apart:
            with open(main, "xb") as file:
                _write_message(file, model, weights)
            return
        beside = path.with_name(path.name + ".data")
        with replacing(beside, GraphError) as data:
            with open(data, "xb") as file:
                for name, values in weights.items():
                    model.graph.initializer.append(_write_external(file, name, values, beside.name))
            with open(main, "xb") as file:
                _write_message(file, model, {})


def _write_external(file: BinaryIO, name: str, values: Array, location: str) -> onnx.TensorProto:
    file.write(bytes(-file.tell() % ALIGNMENT))
    tensor = tensors.header(name, values)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", file.tell()), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    file.write(tensors.raw_bytes(values))
    return tensor


def _write_message(file: BinaryIO, model: onnx.ModelProto, weights: Mapping[str, Array]) -> None:
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    heads = {}
    for name, values in weights.items():
        head = tensors.header(name, values).SerializeToString(deterministic=True) + _prefix(RAW_DATA, values.nbytes)
        heads[name] = _prefix(INITIALIZER, len(head) + values.nbytes) + head
    total = len(graph) + sum(len(heads[name]) + values.nbytes for name, values in weights.items())
    file.write(model.SerializeToString(deterministic=True))
    file.write(_prefix(GRAPH, total))
    file.write(graph)
    for name, values in weights.items():
        file.write(heads[name])
        file.write(tensors.raw_bytes(values))


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
