"""What each input of a model is for: what is made up for it, and which tokens of it are real; numpy only.

Where a graph is at hand, `input_roles` finds roles by what it does with its inputs. What is left, and plans that do not
state roles, go by name: here, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nmcompile.errors import CalibrationError, InputError, PlanError
from nmcompile.tensorinfo import TensorInfo

Array = np.ndarray[Any, np.dtype[Any]]
KINDS = ("ids", "mask", "positions", "types", "cache", "features", "text")
KEEPS = ("nonzero", "zero", "added")

FEW_IDS = 20  # ids when the table is not known
HIDDEN = -5e3  # a score below this hides its key: exporters add -10000 or the lowest float
HIDES = -1e4  # what is written into a mask that is added: of every float type, and nothing is left beside it


@dataclass(frozen=True)
class Role:
    """What an input is for.

    kind: ids, positions and types are looked up, in tables of which the smallest has `rows` (None: not known); a mask
    hides tokens; a cache holds keys or values of earlier ones; features are all other numbers.
    keeps: at which values of a mask a token is seen: all but 0; "zero" alone (PyTorch's key_padding_mask, where True
    hides); or "added" to scores, where 0 leaves them as they are and numbers far below hide.
    """

    kind: str
    rows: int | None = None
    keeps: str = "nonzero"


def role_of(info: TensorInfo) -> Role:
    """What is known of the input, or else what its name says."""
    return by_name(info) if info.role is None else info.role


def kind_of(info: TensorInfo) -> str:
    return role_of(info).kind


# ---- by name: the last resort --------------------------------------------------------------------------------------

_MASK = re.compile(r"mask([:._]\d+)?$")  # attention_mask, input_mask:0, but not masked_positions
_TYPES = re.compile(r"token_type|segment")
_POSITIONS = re.compile(r"position|(^|[._])pos([._]|$)")
_CACHE = re.compile(r"past|cache")


def by_name(info: TensorInfo) -> Role:
    """What an input is called and shaped like."""
    name, kind = info.name.lower(), info.dtype.kind
    if kind in "OSUT":
        return Role("text")
    if _MASK.search(name):
        return Role("mask", keeps="added" if kind in "fV" and len(info.shape) != 2 else "nonzero")
    if kind in "iu":
        return Role("types" if _TYPES.search(name) else "positions" if _POSITIONS.search(name) else "ids")
    return Role("cache" if kind in "fV" and len(info.shape) == 4 and _CACHE.search(name) else "features")


def roles_by_name(infos: Iterable[TensorInfo]) -> dict[str, Role]:
    return {info.name: by_name(info) for info in infos}


def called_ids(info: TensorInfo) -> bool:
    """Whether the name says that it is tokens, where `by_name` only finds nothing else."""
    return "input_ids" in info.name.lower()


def ids_input(infos: Sequence[TensorInfo]) -> TensorInfo | None:
    """The tokens [batch, tokens] that a text becomes: of several, the one named input_ids, or the first."""
    tokens = [info for info in infos if len(info.shape) == 2 and kind_of(info) == "ids"]
    return next(filter(called_ids, tokens), tokens[0] if tokens else None)


def first_of(infos: Iterable[TensorInfo], kind: str) -> TensorInfo | None:
    """The first input [batch, tokens] of a kind."""
    return next((info for info in infos if len(info.shape) == 2 and kind_of(info) == kind), None)


# ---- what is made up -----------------------------------------------------------------------------------------------


def made(
    info: TensorInfo, shape: tuple[int, ...], rng: np.random.Generator, *,
    lengths: np.random.Generator | None = None, ids: tuple[int, int] = (0, FEW_IDS), types: int = 2,
) -> Array:  # fmt: skip
    """Content of a shape that a Transformer accepts: ids from ids[0] on, below ids[1] and the rows of their table;
    types below `types`; positions 0, 1, 2, ...; other numbers normal.

    lengths: draws how many tokens masks [batch, tokens] keep in each row, of which the first is full; None: all masks
    are full. InputError for what is neither text nor a number.
    """
    role = role_of(info)
    if role.kind == "text":
        return np.full(shape, "text", object)
    if role.kind == "mask":
        return written(_prefixes(shape, lengths), info)
    if info.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if info.dtype.kind not in "iufV":
        raise InputError(f"input {info} cannot be made up; only numbers can")
    if role.kind == "positions" and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(info.dtype)
    if info.dtype.kind in "fV":
        return rng.standard_normal(shape).astype(info.dtype)
    low, high = (0, types) if role.kind == "types" else ids
    high = high if role.rows is None else max(1, min(high, role.rows))
    return rng.integers(min(low, high - 1), high, shape).astype(info.dtype)


def _prefixes(shape: tuple[int, ...], lengths: np.random.Generator | None) -> Array:
    if lengths is None or len(shape) != 2:
        return np.ones(shape, bool)
    counts = lengths.integers(1, max(2, shape[1] + 1), shape[0])
    counts[:1] = shape[1]
    return np.asarray(np.arange(shape[1]) < counts[:, None])


# ---- masks ---------------------------------------------------------------------------------------------------------


def written(keep: Array, info: TensorInfo) -> Array:
    """A mask that keeps these tokens, in the input's own values."""
    keeps = role_of(info).keeps
    if keeps == "added":
        return np.where(keep, 0.0, HIDES).astype(info.dtype)
    return (keep if keeps == "nonzero" else ~keep).astype(info.dtype)


def kept(array: Array, role: Role) -> Array | None:
    """Which elements of a mask keep what they stand for; None where its values are those of another kind of mask."""
    if role.keeps == "zero":
        return np.asarray(array == 0)
    if role.keeps == "added":
        wide = array.astype(np.float32)
        return None if np.isnan(wide).any() else np.asarray(wide > HIDDEN)
    return np.asarray(array != 0) if array.min(initial=0) >= 0 else None  # what is added has negative values


def described(feeds: Mapping[str, Array], infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """What is known of each of the feeds; of those that are not among `infos`, what the arrays and their names tell."""
    known = {info.name: info for info in infos}
    arrays = {name: np.asarray(values) for name, values in feeds.items()}
    return [known.get(name) or TensorInfo(name, array.dtype, array.shape) for name, array in arrays.items()]


def real_tokens(feeds: Mapping[str, Array], infos: Sequence[TensorInfo] = ()) -> Array | None:
    """bool [batch, tokens] of the tokens that a mask among the inputs keeps, None when nothing is padded.

    infos: the model's inputs, with their roles; without them names decide. A mask [batch, 1, queries, keys] keeps the
    keys that any query sees. CalibrationError for a mask that keeps nothing.
    """
    for info in described(feeds, infos):
        array, role = np.asarray(feeds[info.name]), role_of(info)
        over_keys = array.ndim in (2, 4) or (array.ndim == 3 and array.shape[1] == 1)
        keep = kept(array, role) if role.kind == "mask" and over_keys and array.size else None
        if keep is None:
            continue
        real = keep.reshape(len(keep), -1, keep.shape[-1]).any(axis=1)
        if not real.any():
            raise CalibrationError(f"input '{info.name}' masks every token of a batch; mend the data")
        if not real.all():
            return np.asarray(real)
    return None


# ---- in a plan -----------------------------------------------------------------------------------------------------


def stated(infos: Iterable[TensorInfo]) -> dict[str, dict[str, str]]:
    """For plan.json: the roles that names do not tell."""
    found = {}
    for info in infos:
        role, named = role_of(info), by_name(info)
        if (role.kind, role.keeps) != (named.kind, named.keeps):
            found[info.name] = {"kind": role.kind} | ({"keeps": role.keeps} if role.kind == "mask" else {})
    return found


def read_roles(items: object, infos: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """The inputs with the roles that a plan states. PlanError for one that this version does not know."""
    if not isinstance(items, Mapping):
        raise PlanError("the roles of the plan's inputs are damaged; compile it again")
    names = {info.name for info in infos}
    found = {}
    for name, item in items.items():
        kind, keeps = (item.get("kind"), item.get("keeps", "nonzero")) if isinstance(item, Mapping) else (None, None)
        if name not in names or kind not in KINDS or keeps not in KEEPS:
            raise PlanError(f"the plan states the role {str(item)[:60]} of input {str(name)[:60]!r}, which is unknown "
                            "here; it is damaged or from a newer nmcompile")  # fmt: skip
        found[name] = Role(str(kind), None, str(keeps))
    return tuple(replace(info, role=found.get(info.name, info.role)) for info in infos)
