"""The sizes that an engine is made for: least, usual and greatest, of each input whose sizes are free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nmcompile.errors import InputError
from nmcompile.tensorinfo import TensorInfo

Sizes = tuple[int, ...]
Ranges = Mapping[str, tuple[Sizes, Sizes, Sizes]]  # input -> (min, opt, max), whole shapes

EXAMPLE = "--shapes 1x8,8x128,32x384 (min,opt,max of sequences x tokens)"


def parse_shapes(texts: Sequence[str], inputs: Sequence[TensorInfo]) -> Ranges:
    """The ranges of every input with free sizes, from "MIN,OPT,MAX" for all of them or "NAME=MIN,OPT,MAX" for one.

    Each of the three gives the free sizes in their order, 8x128, or the whole shape. InputError: none are given for an
    input that needs them, they do not fit it, or are not in order.
    """
    free = {info.name: info for info in inputs if any(not isinstance(dim, int) for dim in info.shape)}
    general: list[Sizes] | None = None
    special: dict[str, list[Sizes]] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        if not name:
            general = _three(text, sizes)
        elif name in free:
            special[name] = _three(text, sizes)
        else:
            raise InputError(f"shapes {text!r}: {name!r} is no input with free sizes; "
                             f"there are {', '.join(free) or 'none'}")  # fmt: skip
    found: dict[str, tuple[Sizes, Sizes, Sizes]] = {}
    for name, info in free.items():
        three = special.get(name, general)
        if three is None:
            raise InputError(f"input '{info}' has free sizes, for which an engine is made: give {EXAMPLE}")
        least, usual, greatest = (_filled(info, sizes) for sizes in three)
        for a, b in ((least, usual), (usual, greatest)):
            if any(x > y for x, y in zip(a, b, strict=True)):
                raise InputError(f"shapes of input '{name}': {_text(a)} is not within {_text(b)}; give min,opt,max")
        found[name] = (least, usual, greatest)
    return found


def _three(text: str, sizes: str) -> list[Sizes]:
    parts = sizes.lower().split(",")
    if len(parts) != 3 or not all(re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", part) for part in parts):
        raise InputError(f"shapes {text!r} are not min,opt,max; write for example {EXAMPLE}")
    return [tuple(int(size) for size in part.split("x")) for part in parts]


def _filled(info: TensorInfo, sizes: Sizes) -> Sizes:
    """The whole shape of an input whose free sizes are these."""
    free = sum(not isinstance(dim, int) for dim in info.shape)
    if len(sizes) == len(info.shape):
        if any(isinstance(dim, int) and dim != size for dim, size in zip(info.shape, sizes, strict=True)):
            raise InputError(f"shape {_text(sizes)} does not fit input '{info}'")
        return sizes
    if len(sizes) < free:
        raise InputError(f"shape {_text(sizes)} has {len(sizes)} sizes, input '{info}' needs {free}; give {EXAMPLE}")
    rest = iter(sizes)  # a general shape may name sizes that this input lacks
    return tuple(dim if isinstance(dim, int) else next(rest) for dim in info.shape)


def _text(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))
