"""Made-up inputs for a model, known only by what its inputs are called and shaped like; numpy only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from nmcompile.errors import InputError
from nmcompile.tensorinfo import TensorInfo

Arrays = dict[str, np.ndarray]
LARGEST = 1 << 28  # elements of all inputs together
FEW_IDS = 20  # ids when the vocabulary is not known


def made_up(
    infos: Sequence[TensorInfo],
    batch: int,
    tokens: int,
    *,
    seed: int = 0,
    vocabulary: Mapping[str, int] | None = None,
    ragged: bool = False,
) -> Arrays:
    """Seeded inputs for a model: the first free dimension is `batch`, the others `tokens`.

    Each input depends on its name and the seed alone. Ids lie within `vocabulary` (input name -> rows of its
    table); masks are full, or with `ragged` a prefix of each row, the first one full.
    """
    feeds, count = {}, 0
    for info in infos:
        free = (tokens if axis else batch for axis in range(len(info.shape)))
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(info.shape, free, strict=True))
        count += math.prod(shape)
        if count > LARGEST:
            raise InputError(f"input {info} has {math.prod(shape):,} elements, too many to make up; give inputs")
        rng = np.random.default_rng([seed, zlib.crc32(info.name.encode())])
        feeds[info.name] = _content(info, shape, rng, (vocabulary or {}).get(info.name), ragged)
    return feeds


def _content(
    info: TensorInfo, shape: tuple[int, ...], rng: np.random.Generator, rows: int | None, ragged: bool
) -> np.ndarray:
    name = info.name.lower()
    if "mask" in name:
        if len(shape) == 2 and ragged:
            lengths = np.random.default_rng(shape).integers(1, shape[1] + 1, shape[0])  # all masks alike
            lengths[:1] = shape[1]
            return (np.arange(shape[1]) < lengths[:, None]).astype(info.dtype)
        added = info.dtype.kind == "f" and len(shape) != 2  # such a mask is added to the scores
        return np.zeros(shape, info.dtype) if added else np.ones(shape, info.dtype)
    if info.dtype.kind in "iu":
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(info.dtype)
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, info.dtype)
        high = rows or FEW_IDS
        low = 3 if high > 2 * 3 else 0  # 0, 1 and 2 are padding in one model or another
        return rng.integers(low, high, shape).astype(info.dtype)
    if info.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if info.dtype.kind not in "fV":
        raise InputError(f"input {info} cannot be made up; only numbers can")
    return rng.standard_normal(shape).astype(info.dtype)
