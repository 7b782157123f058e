"""A training as a file: weights, optimizer, masks and place, so that an interrupted one goes on with the same bits."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import torch

from nmcompile import files
from nmcompile import ir as g
from nmcompile.calibrate import Data
from nmcompile.training.distil import Trainer
from nmcompile.training.recipe import Recipe

FORMAT = 2  # of what a file holds


def key_of(graph: gs.Graph, data: Data, recipe: Recipe) -> str:
    """Of what a training starts from: another model, other samples or another recipe have another key. The budget does
    not count: an interrupted training may go on with more time."""
    found = hashlib.sha256(f"{FORMAT}{g.to_text(graph)}".encode())
    for name, value in sorted(vars(recipe).items()):
        if name != "budget":
            found.update(f"{name}={value};".encode())
    found.update(f"{len(data.rows)}".encode())
    for row in data.rows:
        for name in sorted(row):
            found.update(row[name].tobytes())
    return found.hexdigest()


def save(folder: Path, key: str, trainer: Trainer, spent: float) -> None:
    """Write where a training is, all of it or nothing."""
    assert trainer.policy is not None
    progress = trainer.progress
    state = {
        "key": key, "spent": spent, "step": progress.step, "steps": progress.steps, "best": progress.best,
        "scale": progress.scale, "since": progress.since,
        "best_weights": progress.weights, "best_masks": progress.masks, "weights": trainer.now(),
        "optimizer": trainer.optimizer.state_dict(), "policy": trainer.policy.state_dict(),
        "history": trainer.history, "bank": trainer.bank.held,
    }  # fmt: skip
    stream = io.BytesIO()
    torch.save(state, stream)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(_file(folder, trainer), stream.getvalue())


def load(folder: Path, key: str, trainer: Trainer) -> float | None:
    """Bring a trainer to where the file says; the seconds that were spent, None where there is no file for this key. A
    damaged file counts as none."""
    try:
        state: dict[str, Any] = torch.load(_file(folder, trainer), map_location=trainer.pair.device, weights_only=True)
    except Exception:  # missing, cut short, or no file of torch's
        return None
    if not isinstance(state, dict) or state.get("key") != key:
        return None
    trainer.begin(int(state["steps"]))
    assert trainer.policy is not None
    progress = trainer.progress
    progress.step, progress.best = int(state["step"]), float(state["best"])
    progress.scale, progress.since = float(state["scale"]), int(state["since"])
    progress.weights, progress.masks = state["best_weights"], state["best_masks"]
    trainer.set(state["weights"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.policy.load_state_dict(state["policy"])
    trainer.history[:] = state["history"]
    trainer.bank.held = state["bank"]
    return float(state["spent"])


def _file(folder: Path, trainer: Trainer) -> Path:
    """Each stage has its own, so that a later one begins where the earlier ended."""
    return folder / f"{trainer.how.stage}.pt"
