"""Files that are written whole or not at all, and what is left of those that were not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nmcompile.errors import NmcompileError

LONGEST_NAME = 255  # bytes, where the system does not say
STALE = 24 * 3600  # seconds after which a partial file of another machine or container counts as left behind
# .NAME.PLACE-PID-RANDOM.partial: unique among threads, and anyone can tell whether its writer still lives
_PARTIAL = re.compile(r"\.(?P<stem>.*)\.(?P<place>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}\.partial", re.DOTALL)


@contextmanager
def replacing(path: Path, kind: type[NmcompileError] = NmcompileError) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end; after an error nothing is left of it.

    Where `path` is a symbolic link, what it points to is replaced. What killed processes left of earlier writes is
    removed. NmcompileError (or the `kind` of it) naming `path`, for what the system does not let us write.
    """
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        if (mode := _mode(target)) is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise kind(f"cannot write {path}: it is not a regular file; give another name")
        _sweep(target)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path: Path, content: str | bytes) -> None:
    """All of `content` to a file, text as UTF-8. NmcompileError naming it."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def cache_folder() -> Path:
    """Where measured times are kept: below $XDG_CACHE_HOME, ~/.cache where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "nmcompile"


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path] | None = None) -> None:
    """Refuse at once what could not be written at the end, or would overwrite another file of the same command.

    Both map what a file is for ("the plan", "--report") to its path; `inputs` are read and must not be written.
    NmcompileError names the first that is too long, no regular file, in a folder that is missing or not writable, or
    the same file as another, also by another path, a link, or a second name of it.
    """
    taken: dict[object, str] = {}
    for what, path in (inputs or {}).items():
        for key in _identities(path):
            taken.setdefault(key, what)
    for what, path in outputs.items():
        _check_output(what, path)
        keys = _identities(path)
        other = next((taken[key] for key in keys if key in taken), None)
        if other is not None:
            raise NmcompileError(f"{what} and {other} are the same file, {path}; give another name to one of them")
        taken.update(dict.fromkeys(keys, what))


def _check_output(what: str, path: Path) -> None:
    if "\0" in str(path):
        raise NmcompileError(f"{what}: {str(path)!r} holds a NUL character; give another name")
    target = Path(os.path.realpath(path))
    folder, longest = target.parent, _longest_name(target.parent)
    if len(os.fsencode(target.name)) > longest or len(os.fsencode(path.name)) > longest:
        raise NmcompileError(f"{what}: a name of {len(os.fsencode(path.name))} bytes is too long, the system takes "
                             f"{longest}: {path.name[:60]}...; give a shorter one")  # fmt: skip
    try:
        mode = _mode(target)
        if mode is not None and stat.S_ISDIR(mode):
            raise NmcompileError(f"{what}: {path} is a folder; give the name of a file to write")
        if mode is not None and not stat.S_ISREG(mode):
            raise NmcompileError(f"{what}: {path} is not a regular file; give the name of a file to write")
        if not folder.is_dir():
            raise NmcompileError(f"{what}: cannot write {path}: there is no folder {folder}; make it first")
    except OSError as error:
        raise NmcompileError(f"{what}: cannot write {path}: {error.strerror or error}; give another name") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NmcompileError(f"{what}: cannot write {path}: the folder {folder} is not writable; choose another")


def _identities(path: Path) -> tuple[object, ...]:
    """What two names of one file have in common: the path behind all links, and where it exists its inode."""
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except (OSError, ValueError):
        return (real,)
    return (real, (found.st_dev, found.st_ino))


def _mode(path: Path) -> int | None:
    """Kind of the file at a path, None where there is none."""
    try:
        return os.lstat(path).st_mode  # of a path behind all links: only those that go in a circle are left
    except FileNotFoundError:
        return None


def _longest_name(folder: Path) -> int:
    """Bytes that a file's name may have in a folder."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return LONGEST_NAME


def _stem(target: Path) -> str:
    """The file's name, or as much of it as leaves room for the rest of a partial file's name."""
    room = _longest_name(target.parent) - 64
    name = target.name
    while len(os.fsencode(name)) > room:
        name = name[:-1]
    return name


def _partial(target: Path) -> Path:
    return target.with_name(f".{_stem(target)}.{_place()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def _place() -> str:
    """Where a process id means one process: this machine since it was started, this container."""
    facts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            facts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _sweep(target: Path) -> None:
    """Remove partial files of `target` whose writer was killed."""
    stem, place = _stem(target), _place()
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            match = _PARTIAL.fullmatch(entry.name)
            if match is None or match["stem"] != stem or not entry.is_file(follow_symlinks=False):
                continue
            if match["place"] == place:
                left = not _alive(int(match["pid"]))
            else:
                left = time.time() - entry.stat().st_mtime > STALE
            if left:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
