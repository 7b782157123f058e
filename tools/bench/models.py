"""Writes one encoder in the form that each peer is best at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .encoder import INPUTS, MODELS, POSITIONS, VOCABULARY, encoder
from .forms import Ranges, integer_form, ranges
from .neural_engine_ir import write_ir
from .peers import Form, Peer
from .protocol import Worker

# Of calibration. Positions that it does not see have other ranges, and so has attention over fewer tokens: every other
# sample is padded.
SAMPLES, SAMPLE_TOKENS, SHORT_TOKENS = 8, 384, 128


def feeds(batch: int, tokens: int, *, seed: int) -> dict[str, NDArray[np.int64]]:
    """Random token ids, nothing masked: every token is computed by every peer."""
    if not 0 < tokens <= POSITIONS or batch < 1:
        raise ValueError(f"{batch}x{tokens}: batch must be positive, tokens between 1 and {POSITIONS}")
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (batch, tokens))
    return dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


def write_fixed(source: Path, target: Path, sizes: tuple[int, int]) -> Path:
    """A copy of a model whose batch and tokens are numbers."""
    model = onnx.load(source)
    for item in [*model.graph.input, *model.graph.output]:
        for axis, size in zip(item.type.tensor_type.shape.dim, sizes, strict=False):
            axis.dim_value = size  # dim_param and dim_value exclude each other
    onnx.save(model, target)
    return target


class Models:
    """The files of one encoder under a folder, each written when it is first asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.shape, self.folder = MODELS[name], folder
        self.calibration = folder / "calibration.npz"
        folder.mkdir(parents=True, exist_ok=True)
        samples = feeds(SAMPLES, SAMPLE_TOKENS, seed=1)
        samples["attention_mask"][::2, SHORT_TOKENS:] = 0
        np.savez(self.calibration, **samples)  # type: ignore[arg-type]

    def float_model(self, pattern: str | None, share: float) -> Path:
        """The pruned float model."""
        path = self.folder / (f"{pattern}-{share}.onnx" if share else "dense.onnx")
        if not path.exists():
            onnx.save(encoder(self.shape, share, pattern or "1x1"), path)
        return path

    def files(self, peer: Peer, form: Form, share: float, python: Path) -> dict[str, Path]:
        """Candidates' names -> files or folders, for a peer whose environment has this Python. PeerError."""
        source = self.float_model(form.pattern, share)
        if form.name == "fp32" and peer.name != "pytorch":
            return {"model": source}
        target = self.folder / peer.name / f"{form.name}-{share}"
        target.mkdir(parents=True)
        if peer.name == "pytorch":
            (target / "model").mkdir()
            np.savez(target / "model" / "weights.npz", **_weights(source))
        elif peer.name == "deepsparse":
            onnx.save(integer_form(onnx.load(source), self.ranges(source)), target / "model")
        elif peer.name == "neural-engine":
            for name in form.candidates[: 2 if share else 1]:
                write_ir(target / name, onnx.load(source), self.shape, self.ranges(source), sparse=name == "sparse")
        else:
            job = {"source": str(source), "target": str(target), "calibration": str(self.calibration),
                   "samples": SAMPLES, "share": share, "pattern": form.pattern}  # fmt: skip
            with Worker(python, peer.module, _cores(), self.folder / f"{peer.name}.log") as worker:
                worker.ask(do="prepare", **job)
        return {path.name: path for path in sorted(target.iterdir())}

    def ranges(self, source: Path) -> Ranges:
        with np.load(self.calibration) as file:
            return ranges(onnx.load(source), {name: file[name] for name in file.files})


def _weights(source: Path) -> dict[str, Any]:
    arrays = {item.name: numpy_helper.to_array(item) for item in onnx.load(source).graph.initializer}
    return {name: array for name, array in arrays.items() if name.endswith((".weight", ".bias"))}


def _cores() -> int:
    return len(os.sched_getaffinity(0))
