"""Files that are files: a pipe, a device or a folder in their place is an error, not a wait without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
          stat.S_IFSOCK: "a socket"}  # fmt: skip


def open_regular(path: Path) -> BinaryIO:
    """The file opened for reading. OSError, with a text for people in `strerror`: it is none, or cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except ValueError:  # a zero byte
        raise FileNotFoundError(2, "No such file or directory", str(path)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(22, f"it is {_KINDS.get(kind, 'no file')}, not a file", str(path))
    return os.fdopen(descriptor, "rb")
