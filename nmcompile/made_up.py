"""Made-up inputs for a model, known only by its inputs and their roles; numpy only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from nmcompile.errors import InputError
from nmcompile.roles import FEW_IDS, made, role_of
from nmcompile.tensorinfo import TensorInfo

Arrays = dict[str, np.ndarray]
LARGEST = 1 << 28  # elements of all inputs together


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
        rows = (vocabulary or {}).get(info.name) or role_of(info).rows or FEW_IDS
        lengths = np.random.default_rng(shape) if ragged and len(shape) == 2 else None  # all masks alike
        low = 3 if rows > 2 * 3 else 0  # 0, 1 and 2 are padding in one model or another
        feeds[info.name] = made(info, shape, rng, lengths=lengths, ids=(low, rows), types=1)
    return feeds
