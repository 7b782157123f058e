"""The plan file of the CPU target: a stored zip of plan.json, aligned .npy arrays and .onnx blobs.

    plan.json   the format version, the writer's header, and `members`: every other member and its content
    NAME.npy    one array, C order, little-endian: "int8[768,3072]"
    NAME.onnx   one blob, opaque bytes: "blob[10482]"

The data of every array start at a multiple of 64 bytes of the file. One input gives one file, byte for
byte, and a plan is read exactly as it was written or refused (see archive.py). `unzip -p model.plan
plan.json` and numpy.load open it all the same. Nothing in a plan is ever executed.

npy: NumPy Enhancement Proposal 1, version 1.0.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO
from weakref import finalize

import numpy as np

from nmcompile.archive import ALIGNMENT, MAGIC, Member, check_crc, check_name, read_members, write_archive
from nmcompile.errors import PlanError
from nmcompile.regular_file import open_regular
from nmcompile.tensorinfo import STORED

__all__ = ["DTYPES", "FORMAT", "MAGIC", "Plan", "read_plan", "write_plan"]

FORMAT = 1
HEADER = "plan.json"
MAX_HEADER_BYTES = 16 << 20
MAX_DEPTH = 64  # of lists and objects in the header
DTYPES: Mapping[str, np.dtype] = MappingProxyType({kind: np.dtype(kind).newbyteorder("<") for kind in STORED})

_MAX_ELEMENTS = 1 << 56
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_REMEDY = "compile the model again"
_CONTENT = re.compile(
    r"([a-z]+[0-9]*)\[((?:0|[1-9][0-9]{0,17})(?:,(?:0|[1-9][0-9]{0,17})){0,63})?\]", re.ASCII
)


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file, padded so that the data begin at a multiple of ALIGNMENT."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}".encode("ascii")
    text += b" " * (-(10 + len(text) + 1) % ALIGNMENT) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _content(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]"


def _pretty(value: Any, indent: str = "") -> str:
    """JSON for people: what fits in a line stands in one line; the outermost object never does."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list | tuple) or not value or (indent and len(indent) + len(flat) <= 100):
        return flat
    inner = indent + "  "
    if not isinstance(value, dict):
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
    if not all(isinstance(key, str) for key in value):
        raise TypeError("the keys of a plan's header must be strings")
    rows = (
        f"{inner}{json.dumps(key, ensure_ascii=False)}: {_pretty(item, inner)}" for key, item in value.items()
    )
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def _little_endian(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in DTYPES:
        known = ", ".join(DTYPES)
        raise PlanError(
            f"array {name!r}: {array.dtype} cannot be stored in a plan; view it as one of {known}"
        )
    return np.asarray(array, DTYPES[array.dtype.name], order="C")


def write_plan(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    blobs: Mapping[str, bytes],
) -> str:
    """Write a plan and return the SHA-256 of the file, in hexadecimal.

    `header` is JSON data with string keys, kept in its order; `format` and `members` are added to it.
    `arrays` may have any of DTYPES, any shape and layout, and are stored in C order as NAME.npy; `blobs` as
    NAME.onnx. The file appears under `path` when it is complete (temporary name in the same folder, then
    renamed) or not at all. PlanError: a name or dtype cannot be stored, the file cannot be written.
    ValueError or TypeError: `header` uses an added key or is not JSON.
    """
    contents, _ = contents_of(header, arrays, blobs, f"{path}: ")
    return write_archive(Path(path), contents)


Contents = dict[str, tuple[bytes | memoryview, ...]]


def contents_of(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blobs: Mapping[str, bytes], where: str = ""
) -> tuple[Contents, dict[str, np.ndarray]]:
    """(the members of the plan's file in their order, each in its parts; the arrays as they are stored)."""
    reserved = {"format", "members"} & header.keys()
    if reserved:
        raise ValueError(f"the header of a plan may not have the key {reserved.pop()!r}")
    contents: Contents = {}
    described: dict[str, str] = {}
    stored = {name: _little_endian(name, value) for name, value in arrays.items()}
    for name, array in stored.items():
        described[f"{name}.npy"] = _content(array.dtype, array.shape)
        contents[f"{name}.npy"] = (_npy_header(array.dtype, array.shape), array.reshape(-1).view(np.uint8).data)
    for name, blob in blobs.items():
        described[f"{name}.onnx"] = f"blob[{len(blob)}]"
        contents[f"{name}.onnx"] = (blob,)
    for name in contents:
        check_name(name)
    members = {name: described[name] for name in sorted(described)}
    text = _pretty({"format": FORMAT, **header, "members": members}).encode() + b"\n"
    if len(text) > MAX_HEADER_BYTES:
        raise PlanError(f"{where}the header takes {len(text)} bytes, a plan may have {MAX_HEADER_BYTES}")
    return {HEADER: (text,), **{name: contents[name] for name in members}}, stored


def header_of(contents: Contents) -> dict[str, Any]:
    """plan.json among the members of a plan, as a reader sees it."""
    found: dict[str, Any] = json.loads(bytes(contents[HEADER][0]))
    return found


class Watch:
    """Tells whether an open file was written to; not when its name has gone to another file, which does no harm."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._finalize = finalize(self, os.close, self._descriptor)
        self._generation = self._now()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def changed(self) -> bool:
        """Whether its size or the time of its last change is another than at first."""
        return self._now() != self._generation

    def close(self) -> None:
        """Let go of the file."""
        self._finalize()


class Plan:
    """An open plan: `header` (plan.json), `arrays` (read-only views of the mapped file), `blobs(name)`.

    The map lives as long as the plan or any array of it does. Replacing the file by a new one is safe while
    it is mapped (write_plan does that); writing over it is not, and `check_unchanged` finds that out. A
    context manager; `close` lets go of it.
    """

    def __init__(
        self,
        path: Path,
        mapped: mmap.mmap,
        header: dict[str, Any],
        members: list[Member],
        watch: Watch | None = None,
    ) -> None:
        self.path = path
        self.header = header
        self.size = len(mapped)
        self._map = mapped
        self._watch = watch
        self._blobs = {
            member.name.removesuffix(".onnx"): member for member in members if member.name.endswith(".onnx")
        }
        self.arrays: Mapping[str, np.ndarray] = MappingProxyType(
            {
                member.name.removesuffix(".npy"): _array(mapped, member, header["members"][member.name])
                for member in members
                if member.name.endswith(".npy")
            }
        )

    @property
    def blob_names(self) -> tuple[str, ...]:
        """The names `blobs` takes, sorted."""
        return tuple(self._blobs)

    def blobs(self, name: str) -> bytes:
        """The content of a blob, copied; KeyError when there is none of that name."""
        member = self._blobs[name]
        return self._map[member.start : member.start + member.size]

    def check_unchanged(self) -> None:
        """PlanError when the mapped file was written to since it was read: its arrays are not what was checked."""
        if self._watch is not None and self._watch.changed():
            raise PlanError(f"{self.path}: the plan file changed on disk; load it again")

    def close(self) -> None:
        """Let go of the file; arrays that are still in use keep it mapped until they are dropped."""
        if self._watch is not None:
            self._watch.close()
        self._watch = None
        self.arrays = MappingProxyType({})
        self._blobs = {}
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_plan(path: str | os.PathLike[str], *, copy: bool = False) -> Plan:
    """Map a plan and check all of it: structure, names, dtypes, sizes and the CRC-32 of every member.

    copy: read the file into memory of this process instead, which nobody can write to. PlanError, one line, when the
    file cannot be read, is not a plan, is damaged or of another format version.
    """
    path = Path(path)
    watch: Watch | None = None
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise PlanError(f"{path}: is empty, not a plan; {_REMEDY}")
            if copy:
                mapped = _read(file, size)
            else:
                watch = Watch(file.fileno())  # before anything is read
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PlanError(f"{path}: cannot be read: {reason}") from error
    try:
        members = read_members(mapped)
        if not members or members[0].name != HEADER:
            raise PlanError(f"has no {HEADER} as its first member, so it is not a plan")
        header = _header(mapped, members[0])
        _check_members(header, members)
        for member in members:
            check_crc(mapped, member)
        return Plan(path, mapped, header, members[1:], watch)
    except PlanError as error:
        if watch is not None:
            watch.close()
        with contextlib.suppress(BufferError):  # arrays made before the error may still be alive
            mapped.close()
        raise PlanError(f"{path}: {error}; {_REMEDY}") from None


def _read(file: BinaryIO, size: int) -> mmap.mmap:
    """The content in memory of this process; OSError when the file ends before `size`."""
    held = mmap.mmap(-1, size)
    with memoryview(held) as view:
        at = 0
        while at < size:
            part = file.read(min(size - at, 1 << 24))
            if not part:
                raise OSError(5, "it became shorter while it was read")
            view[at : at + len(part)] = part
            at += len(part)
    return held


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _depth(text: bytes) -> int:
    """How deep lists and objects of JSON stand in each other."""
    found = np.frombuffer(_TEXT.sub(b"", text), np.uint8) | 0x20  # makes { of [, and } of ]
    steps = (found == ord("{")).astype(np.int8) - (found == ord("}"))
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _header(mapped: mmap.mmap, member: Member) -> dict[str, Any]:
    """plan.json, parsed; its format version is ours and `members` maps names to texts."""
    if member.size > MAX_HEADER_BYTES:
        raise PlanError(f"has a {HEADER} of {member.size} bytes, more than {MAX_HEADER_BYTES}")
    check_crc(mapped, member)
    text = mapped[member.start : member.start + member.size]
    if _depth(text) > MAX_DEPTH:
        raise PlanError(f"has a {HEADER} that is nested too deeply")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise PlanError(f"has a {HEADER} that is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict) or "format" not in header:
        raise PlanError(f"has a {HEADER} without a format version")
    version = header["format"]
    if type(version) is not int or version != FORMAT:
        shown = str(version)[:20] if isinstance(version, int | str) else "unknown"
        raise PlanError(f"has format version {shown}, this nmcompile reads {FORMAT}")
    listed = header.get("members")
    if not isinstance(listed, dict) or not all(isinstance(content, str) for content in listed.values()):
        raise PlanError(f"has a {HEADER} that does not list the members")
    return header


def _check_members(header: dict[str, Any], members: list[Member]) -> None:
    """Exactly the listed members are there, and each has the size its description asks for."""
    listed: dict[str, str] = header["members"]
    names = {member.name for member in members[1:]}
    if missing := sorted(listed.keys() - names):
        raise PlanError(f"lacks the member {missing[0][:60]!r}")
    for member in members[1:]:
        if member.name not in listed:
            raise PlanError(f"has a member that is not listed, {member.name!r}")
        if member.size != _size(member.name, listed[member.name]):
            raise PlanError(f"has a member {member.name!r} whose size is not that of {listed[member.name]}")


def _described(name: str, content: str) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape of an array's description, `int8[768,3072]`."""
    match = _CONTENT.fullmatch(content)
    if match is None or match[1] not in DTYPES:
        raise PlanError(f"has a member {name!r} of unknown content {content[:40]!r}")
    shape = tuple(map(int, match[2].split(","))) if match[2] else ()
    if math.prod(max(dim, 1) for dim in shape) > _MAX_ELEMENTS:  # also where another dimension is 0
        raise PlanError(f"has a member {name!r} of impossible size {content[:40]!r}")
    return DTYPES[match[1]], shape


def _size(name: str, content: str) -> int:
    """The bytes a member must have."""
    if name.endswith(".onnx") and content.startswith("blob["):
        _, shape = _described(name, content.replace("blob", "uint8", 1))
        if len(shape) == 1:
            return shape[0]
    if not name.endswith(".npy"):
        raise PlanError(f"has a member {name!r} of unknown content {content[:40]!r}")
    dtype, shape = _described(name, content)
    return len(_npy_header(dtype, shape)) + math.prod(shape) * dtype.itemsize


def _array(mapped: mmap.mmap, member: Member, content: str) -> np.ndarray:
    """A view of an array's data; its .npy header must be the one of `content`, so nothing of it is parsed."""
    dtype, shape = _described(member.name, content)
    expected = _npy_header(dtype, shape)
    start = member.start + len(expected)
    if mapped[member.start : start] != expected:
        raise PlanError(f"has a member {member.name!r} that is not a C-ordered {content}")
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    array = np.frombuffer(mapped, dtype, count, start).reshape(shape)
    array.flags.writeable = False  # a copied file is memory that could be written to
    return array
