"""Types of ONNX, numpy and torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from nmcompile.errors import UnsupportedError

TYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def torch_type(onnx_type: int) -> torch.dtype:
    """The type of an ONNX element type; UnsupportedError for one that torch does not compute in."""
    if onnx_type not in TYPES:
        raise UnsupportedError(f"ONNX element type {onnx_type} has no counterpart in torch")
    return TYPES[onnx_type]


def tensor_of(values: Any) -> torch.Tensor:
    """A tensor of its own memory; bfloat16 as ml_dtypes has it too."""
    array = np.asarray(values)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))  # a copy: arrays of a graph are mapped and read-only
