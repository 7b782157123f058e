"""What is known of a model's input or output: name, element type, shape; and whether arrays fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmcompile.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """A named tensor; `shape` holds sizes, names of free dimensions, or None where nothing is known."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype.name}[{dims}]"


def read_info(item: Mapping[str, Any]) -> TensorInfo:
    """From JSON: {"name", "dtype", "shape"}."""
    return TensorInfo(str(item["name"]), np.dtype(item["dtype"]), tuple(item["shape"]))


def chosen_outputs(wanted: Sequence[str] | None, outputs: Sequence[TensorInfo]) -> list[str]:
    """Names of the outputs that are wanted, None for all; InputError for one that there is not."""
    names = [info.name for info in outputs]
    for name in wanted or ():
        if name not in names:
            raise InputError(f"there is no output {name!r}; the model has {', '.join(names)}")
    return names if wanted is None else list(wanted)


def check_feeds(feeds: Mapping[str, np.ndarray], inputs: Sequence[TensorInfo]) -> dict[str, np.ndarray]:
    """The inputs as arrays of the right types and shapes; InputError names what does not fit and what would."""
    names = [info.name for info in inputs]
    for name in feeds:
        if name not in names:
            raise InputError(f"there is no input {name!r}; the model takes {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    values: dict[str, np.ndarray] = {}
    for info in inputs:
        if info.name not in feeds:
            raise InputError(f"input {info.name!r} is missing; the model takes {', '.join(map(str, inputs))}")
        array = np.asarray(feeds[info.name])
        if array.dtype != info.dtype:
            if array.dtype.kind not in "iu" or info.dtype.kind not in "iu":
                raise InputError(
                    f"input {info.name!r} is {array.dtype}, the model takes {info.dtype}; "
                    f"convert it with .astype({info.dtype.name!r})"
                )
            array = array.astype(info.dtype)
        if array.ndim != len(info.shape):
            raise InputError(f"input {info.name!r} has shape {list(array.shape)}, the model takes {info}")
        for size, dim in zip(array.shape, info.shape, strict=True):
            if isinstance(dim, int) and size != dim:
                raise InputError(f"input {info.name!r} has shape {list(array.shape)}, the model takes {info}")
            if isinstance(dim, str) and sizes.setdefault(dim, (size, info.name))[0] != size:
                other = sizes[dim]
                raise InputError(
                    f"input {info.name!r} has {dim}={size}, input {other[1]!r} has {dim}={other[0]}; they must agree"
                )
        values[info.name] = array
    return values
