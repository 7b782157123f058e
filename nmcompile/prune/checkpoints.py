"""What the stages of a long pass gave, kept in files so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import ir as g
from nmcompile.errors import NmcompileError
from nmcompile.files import replacing
from nmcompile.npz_file import FileError, load_npz

Arrays = dict[str, np.ndarray]


class Checkpoints:
    """Stages of one job: of this graph, these data and these options, and of no other."""

    def __init__(
        self, folder: Path, graph: gs.Graph, data: Iterable[Mapping[str, np.ndarray]], *options: object
    ) -> None:
        seen = hashlib.sha256(repr((nmcompile.__version__, *options)).encode())
        seen.update(g.to_text(graph).encode())
        for feed in data:
            for name in sorted(feed):
                seen.update(f"{name} {feed[name].dtype} {feed[name].shape} ".encode())
                seen.update(np.ascontiguousarray(feed[name]).tobytes())
        self._stem = folder / seen.hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NmcompileError(f"cannot write checkpoints to {folder}: {error.strerror or error}") from None

    def load(self, stage: int) -> Arrays | None:
        """What `save` was given for a stage; None where it was not reached or the file is damaged."""
        try:
            return load_npz(self._path(stage))
        except FileError:
            return None

    def save(self, stage: int, arrays: Arrays) -> None:
        """Keep a stage's arrays. NmcompileError when they cannot be written."""
        with replacing(self._path(stage)) as partial, partial.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy has an option between the arrays

    def _path(self, stage: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{stage:03}.npz")
