"""A plan that was never written: the same header, arrays and blobs as its file would have, of the file's size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nmcompile.archive import archive_size, write_archive
from nmcompile.plan import Plan, contents_of, header_of


class PlanInMemory(Plan):
    """As `read_plan` would give it for what `write` writes; errors are those of `write_plan`."""

    def __init__(
        self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], blobs: Mapping[str, bytes]
    ) -> None:
        self._contents, stored = contents_of(header, arrays, blobs)
        self.path, self.header = Path("the plan"), header_of(self._contents)
        self.size = archive_size({name: sum(map(len, parts)) for name, parts in self._contents.items()})
        self.arrays = MappingProxyType({name: _read_only(array) for name, array in stored.items()})
        self._texts = dict(blobs)
        self._watch = None

    def write(self, path: Path) -> str:
        """The file, and its SHA-256, as `write_plan` gives them. PlanError when it cannot be written."""
        return write_archive(path, self._contents)

    @property
    def blob_names(self) -> tuple[str, ...]:
        return tuple(sorted(self._texts))

    def blobs(self, name: str) -> bytes:
        return self._texts[name]

    def close(self) -> None:
        self.arrays, self._texts, self._contents = MappingProxyType({}), {}, {}


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
