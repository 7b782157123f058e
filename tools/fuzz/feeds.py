"""What a caller may hand to a session: anything that Python has, for any input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

import nmcompile
from nmcompile.errors import NmcompileError
from tools.fuzz import plans
from tools.fuzz.target import Attempt, Target, refused

DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "float16", "float32", "float64", "bool",
          ">i4", ">f4", "complex64", "U3", "S2", "M8[s]", "m8[us]", "O", "V4")  # fmt: skip


class Odd:
    """Becomes an array by an error."""

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("several\nlines")


THINGS: tuple[Any, ...] = (
    None, True, 3, 2**70, "text", b"bytes", {}, set(), [], [[]], [[1], [1, 2]], [[None]], Odd(), object(),
)  # fmt: skip


def _value(rng: random.Random, good: np.ndarray) -> Any:
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(THINGS)
    if kind == 1:
        return good.tolist()
    if kind == 2:
        with np.errstate(all="ignore"):
            try:
                return good.astype(rng.choice(DTYPES))
            except (ValueError, TypeError):
                return good
    if kind == 3:
        changed = good.astype(np.int64) if good.dtype.kind in "iu" else good.copy()
        if changed.size:
            whole = changed.dtype.kind == "i"
            odd = (2**31, -1, 2**32 + 1, -(2**63), 2**63 - 1, 7) if whole else (np.nan, np.inf, 1e38)
            changed.reshape(-1)[rng.randrange(changed.size)] = rng.choice(odd)
        return changed
    if kind == 4:
        flat = good.reshape(-1)
        return rng.choice((good[:0], good[..., :0], good[:, ::-1], good.T, good[None], flat, np.asfortranarray(good)))
    if kind == 5:
        return np.ma.masked_array(good, good == good.flat[0] if good.size else False)
    return good


def prepare(folder: Path) -> Attempt:
    names = ("bert-torchscript", "t5-torchscript")
    sessions = [nmcompile.load(plans.base(folder, name), threads=2) for name in names]

    def attempt(seed: int, now: Path) -> str:
        rng = random.Random(seed)
        session = rng.choice(sessions)
        good = plans.fed(session.inputs, rng.choice((0, 1, 3)), rng.choice((0, 1, 20)))
        assert good is not None
        feeds: Any = {name: _value(rng, values) for name, values in good.items()}
        if rng.random() < 0.05:
            feeds = rng.choice((None, [], "feeds", [*feeds.items()], {**feeds, "more": 1}, {**feeds, 5: 1}, {}))
        try:
            session.run(feeds)
        except NmcompileError as error:
            return refused(error)
        return "runs"

    return attempt


TARGET = Target("feeds", "inputs of a session", prepare)
