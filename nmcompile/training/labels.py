"""Labels: the classes that samples come with, as one more input beside the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F

from nmcompile.calibrate import Data
from nmcompile.errors import CalibrationError
from nmcompile.training.losses import Output

Tensor = torch.Tensor


def without(feeds: Mapping[str, np.ndarray], labels: str) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """(the model's inputs, the labels [batch] where there are any)"""
    return {name: values for name, values in feeds.items() if name != labels}, feeds.get(labels)


def check_labels(data: Data, labels: str, graph: gs.Graph, outputs: Sequence[Output]) -> None:
    """CalibrationError for a model that has no logits, or several, and for a label that is none of its classes."""
    scores = logits_of(outputs)
    shape = next(tensor.shape for tensor in graph.outputs if tensor.name == scores)
    classes = shape[-1] if shape and isinstance(shape[-1], int) else None
    for number, row in enumerate(data.rows):
        label = int(row[labels])
        if label < 0 or (classes is not None and label >= classes):
            among = f"0 to {classes - 1}" if classes is not None else "0 and above"
            raise CalibrationError(f"sample {number}: label {label} is no class of output '{scores}'; it has {among}")


def logits_of(outputs: Sequence[Output]) -> str:
    """The one output whose classes labels name; CalibrationError where there is none, or more than one."""
    found = [output.name for output in outputs if output.kind == "logits"]
    if len(found) != 1:
        has = ", ".join(f"{output.name} ({output.kind})" for output in outputs)
        raise CalibrationError(f"labels take a model with one output of logits [batch, classes]; this one has {has}")
    return found[0]


def of_labels(logits: Tensor, labels: np.ndarray) -> Tensor:
    """Cross entropy, the mean over samples."""
    return F.cross_entropy(logits.float(), torch.from_numpy(labels).to(logits.device, torch.int64))
