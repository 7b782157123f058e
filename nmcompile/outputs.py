"""The files of one compile: made in folders of their own beside where they go, and moved there together at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from nmcompile.errors import NmcompileError

PREFIX = ".nmcompile-"  # short: a file of the longest name still fits into such a folder
SETTLED = 60.0  # seconds after which a folder that nobody holds was left by a process that was killed


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a file is written: the target of a link, which stays one; else the path as it was given."""
    given = Path(path)
    return Path(os.path.realpath(given)) if given.is_symlink() else given


class Outputs:
    """Files that appear together or not at all; two compiles of one output never share a name before that."""

    def __init__(self) -> None:
        self._folders: dict[Path, tuple[Path, int]] = {}  # by parent: the folder, and what holds its lock
        self._moves: list[tuple[Path, Path]] = []

    def folder(self, parent: Path) -> Path:
        """This compile's own folder in `parent`. NmcompileError when there can be none."""
        key = parent.absolute()
        if key not in self._folders:
            try:
                _sweep(key)
                made = Path(mkdtemp(prefix=PREFIX, dir=key))
                lock = os.open(made, os.O_RDONLY)
            except OSError as error:
                raise NmcompileError(f"cannot write to {parent}: {error.strerror or error}; choose another") from None
            with suppress(OSError):  # not every file system has locks; then nothing is swept there either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._folders[key] = made, lock
        return self._folders[key][0]

    def place(self, final: Path, name: str | None = None) -> Path:
        """Where to write what `publish` moves to `final`; `name` in the meantime, if not its own."""
        made = self.folder(final.parent) / (name or final.name)
        self.move(made, final)
        return made

    def move(self, made: Path, final: Path) -> None:
        """Let `publish` move a file of one of these folders, after those that were named before."""
        self._moves.append((made, final))

    def size(self, final: Path) -> int:
        """Bytes of what will be moved to `final`."""
        return next(made for made, to in self._moves if to == final).stat().st_size

    def publish(self) -> None:
        """Move all that was made to where it goes; where one cannot be moved, what was there before comes back."""
        undo: list[tuple[Path, Path]] = []
        final = Path()
        try:
            for number, (made, final) in enumerate(self._moves):
                if not made.exists():
                    continue
                spare = self.folder(final.parent) / f".before-{number}"
                was_there = final.exists()
                if was_there:
                    with suppress(OSError):  # a file system without second names: then this one cannot come back
                        os.link(final, spare)
                os.replace(made, final)
                if spare.exists() or not was_there:
                    undo.append((spare, final))
        except OSError as error:
            _restore(undo)
            raise NmcompileError(f"cannot write {final}: {error.strerror or error}") from None
        self._moves.clear()

    def close(self) -> None:
        """Remove what was not published."""
        for made, lock in self._folders.values():
            shutil.rmtree(made, ignore_errors=True)
            os.close(lock)
        self._folders.clear()


@contextmanager
def pending() -> Iterator[Outputs]:
    """Outputs that are gone at the end unless they were published."""
    made = Outputs()
    try:
        yield made
    finally:
        made.close()


def _restore(undo: Sequence[tuple[Path, Path]]) -> None:
    for spare, final in reversed(undo):
        with suppress(OSError):
            if spare.exists():
                os.replace(spare, final)
            else:
                final.unlink()


def _sweep(parent: Path) -> None:
    """Remove folders of compiles that were killed: old enough, and locked by nobody."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime < SETTLED:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
