"""What is known of a model's input or output: name, element type, shape; and whether arrays fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from nmcompile.errors import InputError, PlanError

if TYPE_CHECKING:
    from nmcompile.roles import Role

STORED = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)  # element types that a plan holds arrays of
MOST_TENSORS, MOST_DIMS, MOST_CHARACTERS = 4096, 64, 1000


@dataclass(frozen=True)
class TensorInfo:
    """A named tensor; `shape` holds sizes, names of free dimensions, or None where nothing is known. role: what an
    input is for, None where only its name can tell (nmcompile.roles)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    role: Role | None = field(default=None, compare=False)

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype.name}[{dims}]"


def dtype_named(text: object) -> np.dtype | None:
    """The element type of one of our own names ("object": texts), None for any other.

    numpy reads much more in a text, and dies of some (a time unit divided by zero).
    """
    if text == "bfloat16":
        brain: np.dtype = np.dtype(import_module("ml_dtypes").bfloat16)
        return brain
    return np.dtype(text) if isinstance(text, str) and text in (*STORED, "object") else None


def read_infos(items: object, what: str) -> tuple[TensorInfo, ...]:
    """From JSON: a list of {"name", "dtype", "shape"}, the "inputs" or "outputs". PlanError names what is wrong."""
    if not isinstance(items, list) or len(items) > MOST_TENSORS:
        raise PlanError(f"the description of the {what} is not a list of at most {MOST_TENSORS}")
    infos = tuple(_read_info(item, what) for item in items)
    if len({info.name for info in infos}) < len(infos):
        raise PlanError(f"two of the {what} have the same name")
    return infos


def _read_info(item: object, what: str) -> TensorInfo:
    if not isinstance(item, Mapping):
        raise PlanError(f"the description of one of the {what} is no object")
    name, dtype, shape = item.get("name"), dtype_named(item.get("dtype")), item.get("shape")
    if not _is_short(name):
        raise PlanError(f"one of the {what} has no name, or none that can be printed")
    if dtype is None:
        raise PlanError(f"{what[:-1]} {name[:60]!r}: the type {str(item.get('dtype'))[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > MOST_DIMS or not all(map(_is_dim, shape)):
        raise PlanError(f"{what[:-1]} {name[:60]!r}: the shape is no list of at most {MOST_DIMS} sizes, names, nulls")
    return TensorInfo(name, dtype, tuple(shape))


def _is_short(text: object) -> TypeGuard[str]:
    return isinstance(text, str) and len(text) <= MOST_CHARACTERS and text.isprintable()


def _is_dim(dim: object) -> bool:
    return dim is None or _is_short(dim) or (type(dim) is int and 0 <= dim < 1 << 63)


def chosen_outputs(wanted: Sequence[str] | None, outputs: Sequence[TensorInfo]) -> list[str]:
    """Names of the outputs that are wanted, None for all; InputError for one that there is not."""
    names = [info.name for info in outputs]
    for name in wanted or ():
        if name not in names:
            raise InputError(f"there is no output {name!r}; the model has {', '.join(names)}")
    return names if wanted is None else list(wanted)


def check_feeds(feeds: Mapping[str, np.ndarray], inputs: Sequence[TensorInfo]) -> dict[str, np.ndarray]:
    """The inputs as arrays of the right types and shapes; InputError names what does not fit and what would."""
    if not isinstance(feeds, Mapping):
        raise InputError(f"the inputs are a {type(feeds).__name__}; give a dictionary of arrays by name")
    names = [info.name for info in inputs]
    for name in feeds:
        if name not in names:
            raise InputError(f"there is no input {name!r}; the model takes {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    values: dict[str, np.ndarray] = {}
    for info in inputs:
        if info.name not in feeds:
            raise InputError(f"input {info.name!r} is missing; the model takes {', '.join(map(str, inputs))}")
        array = converted(_array(info.name, feeds[info.name]), info.dtype, info.name)
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


def _array(name: str, value: object) -> np.ndarray:
    """What was given as an array. InputError: it is none, such as a list of lists of unequal lengths."""
    try:
        return np.asarray(value)
    except Exception as error:  # of whatever kind the given object's own conversion raises
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"input {name!r} is no array ({why}); give numpy arrays") from None


def converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in a type that the model takes. InputError where values would change: integers alone convert."""
    if array.dtype.kind == "O" or dtype.kind == "O":
        return _texts(array, dtype, name)
    if array.dtype == dtype:
        return array
    if array.dtype.newbyteorder("=") == dtype:
        return array.astype(dtype)
    if array.dtype.kind not in "iu" or dtype.kind not in "iu":
        raise InputError(
            f"input {name!r} is {array.dtype}, the model takes {dtype}; convert it with .astype({dtype.name!r})"
        )
    if array.size and not np.can_cast(array.dtype, dtype):
        limits = np.iinfo(dtype)
        for value in (int(array.min()), int(array.max())):
            if not limits.min <= value <= limits.max:
                raise InputError(
                    f"input {name!r} holds {value}, the model takes {dtype}, from {limits.min} to {limits.max}"
                )
    return array.astype(dtype)


def _texts(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """An array of texts for a model that takes texts; all else that numpy holds as objects is refused."""
    if dtype.kind != "O":
        raise InputError(f"input {name!r} holds objects, not numbers; the model takes {dtype}")
    if array.dtype.kind not in "OU" or not all(isinstance(item, str) for item in array.ravel().tolist()):
        raise InputError(f"input {name!r} must hold texts and nothing else")
    return array.astype(object)
