"""Reads .npy and .npz files of strangers: plain numbers and texts, within what their size accounts for.

numpy's own reader takes the element type and the size of an array from a text in the file: it may ask for terabytes,
and some texts end the process inside numpy. Here they are read first, and handed on only when they are harmless.
"""

from __future__ import annotations

import ast
import math
import os
import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNPACKED = 64 << 20  # bytes that the arrays of a compressed file may take, and ...
RATIO = 16  # ... so many more for each byte of the file
HEADER = 10_000  # bytes of an array's header, numpy's own limit
DTYPE = re.compile(r"[<>|=]?(?:[biufc](?:1|2|4|8|16)|[USV][0-9]{1,6})")
MAGIC = b"\x93NUMPY"


class FileError(ValueError):
    """Why a file cannot be read."""


def load_npz(path: Path) -> dict[str, Array]:
    """The arrays of a .npz file by name. FileError: damaged, no archive, objects in it, or too large unpacked."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            total, room = sum(info.file_size for info in members), UNPACKED + RATIO * os.path.getsize(path)
            if total > room:
                raise FileError(f"it unpacks to {total / 1e6:,.0f} MB, more than the {room / 1e6:,.0f} MB that its "
                                "size accounts for; write it with np.savez, or give fewer samples")  # fmt: skip
            return {info.filename.removesuffix(".npy"): _member(archive, info) for info in members}
    except FileError:
        raise
    except MemoryError:
        raise FileError("it takes more memory than there is") from None
    except Exception as error:  # zipfile and its decoders raise a dozen types on damaged files
        raise FileError(_reason(error) or "it is damaged") from None


def load_npy(path: Path) -> Array:
    """The array of a .npy file, mapped. FileError: damaged, or of objects."""
    check_regular(path)
    try:
        with path.open("rb") as stream:
            _check_header(stream, os.path.getsize(path))
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileError:
        raise
    except Exception as error:
        raise FileError(_reason(error) or "it is damaged") from None


def check_regular(path: Path) -> None:
    """FileError unless there is a file that can be read to its end: no folder, no pipe, no device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise FileError(_reason(error)) from None
    if not stat.S_ISREG(mode):
        raise FileError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as stream:
        _check_header(stream, info.file_size)
    with archive.open(info) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _check_header(stream: IO[bytes], size: int) -> None:
    """FileError unless the header of an array of `size` bytes, header included, says what follows it."""
    start = stream.read(8)
    if len(start) < 8 or start[:6] != MAGIC or start[6] not in (1, 2, 3):
        raise FileError("it holds something that is no array")
    count = 2 if start[6] == 1 else 4
    length = struct.unpack("<H" if count == 2 else "<L", stream.read(count).ljust(count, b"\0"))[0]
    text = stream.read(min(length, HEADER + 1))
    if length > HEADER or len(text) < length:
        raise FileError("the header of an array is damaged")
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python's own, on odd literals
            header = ast.literal_eval(text.decode("latin1").strip())
        kind, shape = header["descr"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise FileError("the header of an array is damaged") from None
    if not isinstance(kind, str) or not DTYPE.fullmatch(kind):
        raise FileError(f"it holds an array of {str(kind)[:40]!r}, only plain numbers are read")
    if not isinstance(shape, tuple) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise FileError(f"it holds an array of shape {str(shape)[:60]}")
    item = int(re.sub(r"[^0-9]", "", kind)) * (4 if "U" in kind else 1)
    size -= 8 + count + length
    if math.prod(shape) * item > size:
        raise FileError(f"it is cut short: an array of shape {str(shape)[:60]} does not fit its {size:,} bytes")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200]
