"""Labels: classes of samples or of their tokens, or first and last tokens of answers, that samples come with as inputs
beside the model's own.

Each is a number per sample, or per token where the output scores tokens, and belongs to one output of scores: the first
label to the first, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F

from nmcompile.calibrate import Data
from nmcompile.errors import CalibrationError
from nmcompile.training.batches import length
from nmcompile.training.losses import Output

Tensor = torch.Tensor
KINDS = ("logits", "spans", "tokens")
IGNORED = -100  # the label of a token that has none, padding for example: as in torch and transformers


def without(feeds: Mapping[str, np.ndarray], labels: Collection[str]) -> dict[str, np.ndarray]:
    """The model's inputs."""
    return {name: values for name, values in feeds.items() if name not in labels}


def check_labels(data: Data, labels: Sequence[str], graph: gs.Graph, outputs: Sequence[Output]) -> None:
    """CalibrationError for samples without the labels, a model that has another number of outputs of scores, and a
    label that is none of its classes, no token of its sample, or not one per token where the output scores tokens."""
    for label in labels:
        if label not in data.rows[0]:
            raise CalibrationError(f"the samples have no labels '{label}'; they have {', '.join(data.rows[0])}")
    for label, output in zip(labels, scores_of(outputs, labels), strict=True):
        shape = next(tensor.shape for tensor in graph.outputs if tensor.name == output)
        classes = shape[-1] if shape and isinstance(shape[-1], int) else None
        kind = next(item.kind for item in outputs if item.name == output)
        for number, row in enumerate(data.rows):
            values, count = row[label], length(without(row, labels))
            if values.shape != ((count,) if kind == "tokens" else ()):
                takes = f"output '{output}' takes " + (f"one for each of {count} tokens" if kind == "tokens" else "one")
                raise CalibrationError(f"sample {number}: {label} has {values.size} numbers, {takes}")
            limit = count if kind == "spans" else classes
            known = values[values != IGNORED] if kind == "tokens" else values
            wrong = known[(known < 0) | (known >= (limit or math.inf))]
            if wrong.size:
                among = f"0 to {limit - 1}" if limit is not None else "0 and above"
                what = "token of its sample" if kind == "spans" else f"class of output '{output}'"
                raise CalibrationError(f"sample {number}: {label} {wrong.flat[0]} is no {what}; there are {among}")


def scores_of(outputs: Sequence[Output], labels: Sequence[str]) -> list[str]:
    """The outputs that labels belong to; CalibrationError where they are more, or fewer."""
    found = [output.name for output in outputs if output.kind in KINDS]
    if len(found) != len(labels):
        has = ", ".join(f"{output.name} ({output.kind})" for output in outputs)
        raise CalibrationError(
            f"{len(labels)} labels ({', '.join(labels)}) take as many outputs of logits [batch, classes], "
            f"[batch, tokens, classes] or spans [batch, tokens]; the model has {has}"
        )
    return found


def of_labels(scores: Tensor, labels: np.ndarray) -> Tensor:
    """Cross entropy, the mean over samples, or over tokens that have a label (0 where none has)."""
    wanted = torch.from_numpy(labels).to(scores.device, torch.int64)
    summed = F.cross_entropy(scores.float().flatten(0, -2), wanted.flatten(), reduction="sum", ignore_index=IGNORED)
    return summed / (wanted != IGNORED).sum().clamp_min(1)
