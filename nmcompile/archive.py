"""A stored zip that has exactly one form, so that a reader can tell whether it is as it was written.

Members are neither compressed nor encrypted, their content starts at a multiple of 64 bytes, they follow
one another without gaps, times are fixed, and every record is in its zip64 form whatever the size. One
input gives one file, byte for byte; a reader rebuilds each byte that is not content and compares; CRC-32
covers the content.

Zip: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nmcompile.errors import PlanError
from nmcompile.files import replacing

MAGIC = b"PK\x03\x04"  # of a zip file that is not empty
ALIGNMENT = 64  # bytes: a cache line, a vector register
MAX_NAME = 512

_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)
_STORED, _ENCRYPTED = 0, 1
_VERSION, _UNIX = 45, 3 << 8  # 45: the reader must know zip64
_DATE = (1 << 5) | 1  # 1980-01-01, the first that zip can tell
_MODE = 0o100644 << 16
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 record"
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL64, _CENTRAL64 = struct.Struct("<2H2Q"), struct.Struct("<2H3Q")
_PADDING = struct.Struct("<3H")  # 0xD935, length, alignment: as Android's zipalign writes it
_END64, _LOCATOR, _END = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
_END_RECORD = _END.pack(b"PK\x05\x06", 0, 0, _FULL16, _FULL16, _FULL32, _FULL32, 0)
_END_SIZE = _END64.size + _LOCATOR.size + _END.size


@dataclass(frozen=True)
class Member:
    """One file in the zip: its name, CRC-32 and size of its content, and where its local header begins."""

    name: str
    crc: int
    size: int
    offset: int

    @property
    def start(self) -> int:
        """Where the content begins, a multiple of ALIGNMENT."""
        return self._unpadded + -self._unpadded % ALIGNMENT

    @property
    def _unpadded(self) -> int:
        return self.offset + _LOCAL.size + len(self.name) + _LOCAL64.size + _PADDING.size

    def local(self) -> bytes:
        """The local header: everything between `offset` and `start`."""
        zeros = self.start - self._unpadded
        extra = (
            _LOCAL64.pack(1, 16, self.size, self.size)
            + _PADDING.pack(0xD935, 2 + zeros, ALIGNMENT)
            + bytes(zeros)
        )
        fields = (_VERSION, 0, _STORED, 0, _DATE, self.crc, _FULL32, _FULL32, len(self.name), len(extra))
        return _LOCAL.pack(MAGIC, *fields) + self.name.encode("ascii") + extra

    def central(self) -> bytes:
        """The entry in the central directory."""
        extra = _CENTRAL64.pack(1, 24, self.size, self.size, self.offset)
        versions = (_UNIX | _VERSION, _VERSION, 0, _STORED, 0, _DATE)
        sizes = (self.crc, _FULL32, _FULL32, len(self.name), len(extra), 0, 0, 0, _MODE, _FULL32)
        return _CENTRAL.pack(b"PK\x01\x02", *versions, *sizes) + self.name.encode("ascii") + extra


def _directory(members: Iterable[Member], offset: int) -> bytes:
    """The central directory, to stand at `offset`, and the three records that end the file."""
    entries = [member.central() for member in members]
    size = sum(map(len, entries))
    count = len(entries)
    end64 = _END64.pack(b"PK\x06\x06", 44, _UNIX | _VERSION, _VERSION, 0, 0, count, count, size, offset)
    return b"".join(entries) + end64 + _LOCATOR.pack(b"PK\x06\x07", 0, offset + size, 1) + _END_RECORD


def check_name(name: str) -> None:
    """PlanError when `name` would not be safe to extract: absolute, upwards, not plain ASCII, or too long."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise PlanError(f"{name[:60]!r} cannot name a member of a plan; use letters, digits and _ . - /")


def write_archive(path: Path, contents: Mapping[str, tuple[bytes | memoryview, ...]]) -> str:
    """Write the members `contents`, each in its parts, in their order; returns the SHA-256 of the file.

    The file appears under `path` when it is complete or not at all. PlanError when it cannot be written.
    """
    digest = hashlib.sha256()
    with replacing(path, PlanError) as temporary, temporary.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        members = []
        end = 0
        for name, parts in contents.items():
            crc = 0
            for part in parts:
                crc = zlib.crc32(part, crc)
            member = Member(name, crc, sum(map(len, parts)), end)
            put(member.local())
            for part in parts:
                put(part)
            members.append(member)
            end = member.start + member.size
        put(_directory(members, end))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def archive_size(sizes: Mapping[str, int]) -> int:
    """Bytes of the file that `write_archive` writes for members of these sizes."""
    members: list[Member] = []
    end = 0
    for name, size in sizes.items():
        members.append(Member(name, 0, size, end))
        end = members[-1].start + size
    return end + len(_directory(members, end))


def read_members(mapped: mmap.mmap) -> list[Member]:
    """Every member, in order; each byte outside their contents is as `write_archive` would write it.

    PlanError otherwise, without the path. The contents themselves are for `check_crc`.
    """
    if mapped[: len(MAGIC)] != MAGIC:
        raise PlanError("is not a plan")
    if mapped[-_END.size :] != _END_RECORD:
        zipped = mapped[-_END.size :].startswith(_END_RECORD[:4])
        raise PlanError(
            "was zipped by another program" if zipped else "is truncated, or has data after its end"
        )
    directory = len(mapped) - _END_SIZE
    if directory < 0:
        raise PlanError("is truncated")
    *_, count, size, offset = _END64.unpack_from(mapped, directory)
    if offset + size != directory:
        raise PlanError("has a directory whose size does not fit the file")
    members = []
    position = offset
    for _ in range(count):
        member = _entry(mapped, position, directory)
        members.append(member)
        position += len(member.central())
    if len({member.name for member in members}) != count:
        raise PlanError("has two members of the same name")
    end = 0
    for member in members:
        if member.offset != end:
            raise PlanError(f"has members that overlap or leave a gap, at {member.name!r}")
        end = member.start + member.size
        if end > offset:
            raise PlanError(f"is too short for the size of its member {member.name!r}")
        if mapped[member.offset : member.start] != member.local():
            raise PlanError(f"has a damaged header before {member.name!r}")
    if end != offset or mapped[offset:] != _directory(members, offset):
        raise PlanError("has a damaged directory")
    return members


def _entry(mapped: mmap.mmap, position: int, limit: int) -> Member:
    """The member whose central directory entry stands at `position`, before `limit`."""
    after = position + _CENTRAL.size
    if after > limit:
        raise PlanError("has a directory that is cut short")
    signature, _, _, flags, method, _, _, crc, _, _, length, extra, *_ = _CENTRAL.unpack_from(
        mapped, position
    )
    if signature != b"PK\x01\x02" or after + length + extra > limit:
        raise PlanError("has a damaged directory")
    try:
        name = mapped[after : after + length].decode("ascii")
        check_name(name)
    except ValueError:
        raise PlanError("has a member whose name is not ASCII") from None
    if flags & _ENCRYPTED:
        raise PlanError(f"has an encrypted member, {name!r}")
    if method != _STORED:
        raise PlanError(f"has a compressed member, {name!r}")
    if extra != _CENTRAL64.size:
        raise PlanError(f"has a damaged directory entry, of {name!r}")
    _, _, size, _, offset = _CENTRAL64.unpack_from(mapped, after + length)
    return Member(name, crc, size, offset)


def check_crc(mapped: mmap.mmap, member: Member) -> None:
    """PlanError, without the path, when the content of a member is not what was written."""
    with memoryview(mapped) as view, view[member.start : member.start + member.size] as content:
        if zlib.crc32(content) != member.crc:
            raise PlanError(f"is damaged: the checksum of {member.name!r} is wrong")
