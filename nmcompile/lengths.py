"""Inputs of other lengths than the samples have, and a look at what runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nmcompile.calibrate import Data
from nmcompile.compare import Comparison, Difference
from nmcompile.errors import NmcompileError
from nmcompile.roles import described, kept, kind_of, real_tokens, role_of, written
from nmcompile.tensorinfo import TensorInfo

Arrays = dict[str, np.ndarray]
Sizes = dict[str, int]  # of a free dimension that counts tokens, by its key
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

FAR = 512  # tokens, where position tables allow: beyond the windows and buckets of today's models
ROWS = 2  # samples of each length
MOST_VALUES = 50_000_000  # of all outputs together, in a run that is looked at
TRIES = 12  # to find the longest that a model takes
# An output is out of line where it loses this many times what it loses at the samples' own lengths, and so much more.
TIMES, MORE = 3.0, 0.01
DECIBEL = 12.0  # likewise of outputs that have no cosine
LABELS = 0.05


# ---- which axes count tokens -------------------------------------------------------------------------------------


def token_axes(infos: Sequence[TensorInfo]) -> dict[str, dict[int, str]]:
    """By input, its free axes but the batch, each with a key that axes of equal size share."""
    found: dict[str, dict[int, str]] = {}
    for info in infos:
        for axis, dim in enumerate(info.shape):
            if axis and not isinstance(dim, int):
                found.setdefault(info.name, {})[axis] = dim if isinstance(dim, str) else f"{info.name}.{axis}"
    return found


def sizes_of(row: Mapping[str, np.ndarray], axes: Mapping[str, Mapping[int, str]], lead: int = 1) -> Sizes:
    """The sizes that a sample has, the greatest of each key; `lead` axes of the model's are missing from it."""
    found: Sizes = {}
    for name, keys in axes.items():
        for axis, key in keys.items():
            if name in row and row[name].ndim > axis - lead:
                found[key] = max(found.get(key, 0), row[name].shape[axis - lead])
    return found


def scaled(sizes: Sizes, to: int) -> Sizes:
    """Sizes in the same proportions, the greatest of which is `to`; "a + b" stays the sum of a and b."""
    most = max(sizes.values(), default=0)
    found = {key: max(1, round(size * to / most)) if size else 0 for key, size in sizes.items()}
    for key in found:
        parts = [part.strip() for part in key.split("+")]
        if len(parts) > 1 and all(part in found or part.isdecimal() for part in parts):
            found[key] = sum(int(part) if part.isdecimal() else found[part] for part in parts)
    return found


def resized(
    row: Mapping[str, np.ndarray], infos: Sequence[TensorInfo], sizes: Sizes, lead: int = 1
) -> Arrays:
    """The sample cut or repeated along its token axes to `sizes`; positions that count go on counting."""
    axes = token_axes(infos)
    found: Arrays = {}
    for info in infos:
        array = np.asarray(row[info.name])
        for axis, key in axes.get(info.name, {}).items():
            at = axis - lead
            if key in sizes and 0 <= at < array.ndim and array.shape[at]:
                array = _along(array, at, sizes[key], info)
        found[info.name] = np.ascontiguousarray(array)
    return found


def _along(array: np.ndarray, axis: int, size: int, info: TensorInfo) -> np.ndarray:
    now = array.shape[axis]
    if size <= now:
        return np.asarray(np.take(array, np.arange(size), axis=axis))
    steps = np.diff(array, axis=axis)
    if info.dtype.kind in "iu" and kind_of(info) == "positions" and now > 1 and (steps == 1).all():  # 0, 1, 2, ...
        more = np.arange(1, size - now + 1, dtype=array.dtype)
        last = np.take(array, [now - 1], axis=axis)
        shape = [1] * array.ndim
        shape[axis] = len(more)
        return np.concatenate([array, last + more.reshape(shape)], axis=axis)
    return np.asarray(np.take(array, np.arange(size) % now, axis=axis))


# ---- feeds -------------------------------------------------------------------------------------------------------


def rows_of(data: Data) -> tuple[list[Arrays], int]:
    """(samples, how many of the model's axes they lack): made-up samples are whole batches."""
    return [dict(row) for row in data.rows], 0 if data.synthetic else 1


def lengths_of(data: Data) -> list[int]:
    """The most tokens of each sample along one axis; 0 where no axis is free."""
    rows, lead = rows_of(data)
    axes = token_axes(data.inputs)
    return [max(sizes_of(row, axes, lead).values(), default=0) for row in rows]


def feeds_at(data: Data, rows: Sequence[Mapping[str, np.ndarray]], lead: int, sizes: Sizes) -> Arrays | None:
    """One batch of samples, all of these sizes; None where samples do not make one."""
    made = [resized(row, data.inputs, sizes, lead) for row in rows]
    if not lead:
        return made[0]
    return next(iter(replace(data, rows=tuple(made), batch=len(made))), None)


def batch_size(infos: Sequence[TensorInfo], otherwise: int) -> int:
    return next((info.shape[0] for info in infos if info.shape and isinstance(info.shape[0], int)), otherwise)


def masks(feeds: Mapping[str, np.ndarray], infos: Sequence[TensorInfo] = ()) -> list[TensorInfo]:
    """The inputs that are masks of padding, [batch, tokens]."""
    return [info for info in described(feeds, infos) if kind_of(info) == "mask" and len(info.shape) == 2]


def left_padded(feeds: Mapping[str, np.ndarray], infos: Sequence[TensorInfo] = ()) -> Arrays | None:
    """The batch with a third of the first row's tokens masked at its begin, more of the next; None without a mask."""
    return _masked(feeds, infos, lambda tokens, row: np.arange(tokens) >= (row * tokens) // 3 % max(tokens, 1))


def with_holes(feeds: Mapping[str, np.ndarray], infos: Sequence[TensorInfo] = ()) -> Arrays | None:
    """The batch with every third token masked, other ones in each row; None without a mask."""
    return _masked(feeds, infos, lambda tokens, row: (np.arange(tokens) + row) % 3 != 1)


def _masked(
    feeds: Mapping[str, np.ndarray], infos: Sequence[TensorInfo], keep: Callable[[int, int], np.ndarray]
) -> Arrays | None:
    found = masks(feeds, infos)
    if not found:
        return None
    made = dict(feeds)
    for info in found:
        rows, tokens = feeds[info.name].shape
        shown = np.stack([keep(tokens, row + 1) for row in range(rows)])
        shown[:, -1] |= ~shown.any(axis=1)  # a row of nothing means nothing
        made[info.name] = written(shown, info)
    return made


def ends_padded(feeds: Mapping[str, np.ndarray], infos: Sequence[TensorInfo] = ()) -> bool:
    """Whether masks of padding, if there are any, keep a prefix of each row."""
    shown = (kept(feeds[info.name], role_of(info)) for info in masks(feeds, infos))
    return all((np.diff(keep, axis=1).sum(axis=1) <= 1).all() and keep[:, 0].all()
               for keep in shown if keep is not None)  # fmt: skip


# ---- the look at the end of a compile ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What runs against the model on inputs of one length."""

    length: int
    outputs: Mapping[str, Difference]


@dataclass(frozen=True)
class Look:
    """At lengths that calibration had not. calibrated: the lengths that it had, least and greatest. skipped: why there
    was nothing to look at. notes: where the loss is out of line."""

    calibrated: tuple[int, int] = (0, 0)
    seen: tuple[Seen, ...] = ()
    skipped: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {"calibrated": list(self.calibrated), "skipped": self.skipped, "out_of_line": list(self.notes),
                "at": [{"tokens": item.length,
                        "outputs": {name: found.to_json() for name, found in item.outputs.items()}}
                       for item in self.seen]}  # fmt: skip


def look(
    reference: Run, run: Run, data: Data, calibrated: Sequence[int], outputs: Sequence[TensorInfo],
    loss: Mapping[str, Difference],
) -> Look:  # fmt: skip
    """Run both on samples of `data` that are cut and repeated to lengths that calibration had not, shorter and longer.

    calibrated: the lengths of all samples; loss: what is lost at these.
    """
    rows, lead = rows_of(data)
    axes = token_axes(data.inputs)
    if not any(axes.values()):
        return Look(skipped="the model's inputs have one length")
    least, most = min(calibrated, default=0), max(calibrated, default=0)
    if not rows or not most:
        return Look(skipped="there are no samples to make longer")
    rows = sorted(rows, key=lambda row: -max(sizes_of(row, axes, lead).values(), default=0))
    rows = [rows[index % len(rows)] for index in range(batch_size(data.inputs, min(ROWS, len(rows))))]
    base = sizes_of(rows[0], axes, lead)

    def feeds(length: int) -> Arrays | None:
        return feeds_at(data, rows, lead, scaled(base, length))

    seen, notes = [], []
    shorter = [length for length in dict.fromkeys((1, least // 2)) if 0 < length < least]
    for length, expected, given in [*_each(reference, feeds, shorter), *_longer(reference, feeds, most)]:
        try:
            found = run(given)
        except NmcompileError as error:
            notes.append(f"at {length} tokens (calibration had {_span(least, most)}) the model runs and the plan does "
                         f"not: {error}")  # fmt: skip
            continue
        comparison = Comparison(outputs)
        comparison.add(expected, found, real_tokens(given, data.inputs))
        seen.append(Seen(length, comparison.differences()))
        notes += [f"at {length} tokens output '{name}' has {what}; calibration had {_span(least, most)} tokens: "
                  "give samples of the lengths that the model will see, or compare with nmcompile compare"
                  for name, what in out_of_line(seen[-1].outputs, loss)]  # fmt: skip
    skipped = "" if seen or notes else "the model does not run on samples that are cut or repeated"
    return Look((least, most), tuple(seen), skipped, tuple(notes))


def _span(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _each(
    reference: Run, feeds: Callable[[int], Arrays | None], lengths: Sequence[int]
) -> Iterator[tuple[int, Mapping[str, np.ndarray], Arrays]]:
    """(length, what the model gives, inputs) of the lengths that it takes."""
    for length in lengths:
        given = feeds(length)
        if given is None:
            continue
        try:
            yield length, reference(given), given
        except NmcompileError:
            continue


def _longer(
    reference: Run, feeds: Callable[[int], Arrays | None], most: int
) -> Iterator[tuple[int, Mapping[str, np.ndarray], Arrays]]:
    """Twice the longest sample, and far beyond; the longest that the model takes where these are too long."""
    good, bad, values = most, 0, 0
    for length in dict.fromkeys((2 * most, max(FAR, 2 * most))):
        if values * length > MOST_VALUES * good:
            return
        found = list(_each(reference, feeds, [length]))
        yield from found
        good, bad = (length, 0) if found else (good, length)
        if bad:
            break
        values = sum(np.asarray(value).size for value in found[0][1].values())
    found = []
    for _ in range(TRIES if bad > good + 1 else 0):  # its table of positions ends between the two
        middle = (good + bad) // 2
        here = list(_each(reference, feeds, [middle]))
        found, good, bad = (here, middle, bad) if here else (found, good, middle)
        if bad <= good + 1:
            break
    yield from found


def out_of_line(found: Mapping[str, Difference], usual: Mapping[str, Difference]) -> Iterator[tuple[str, str]]:
    """(output, both figures) where much more is lost than usual."""
    for name, item in found.items():
        before = usual.get(name)
        if before is None:
            continue
        if np.isfinite(before.cosine) and not np.isnan(item.cosine):
            if not 1 - item.cosine <= max(TIMES * (1 - before.cosine), 1 - before.cosine + MORE):
                yield name, f"cosine {item.cosine:.4f}, {before.cosine:.4f} on samples as they are"
        elif np.isfinite(before.top1) and not np.isnan(item.top1):
            if not item.top1 >= before.top1 - LABELS:
                yield name, f"{item.top1:.1%} of its values alike, {before.top1:.1%} on samples as they are"
        elif not item.sqnr >= min(before.sqnr, 40.0) - DECIBEL:
            yield name, f"SQNR {item.sqnr:.1f} dB, {before.sqnr:.1f} dB on samples as they are"


# ---- inputs for --verify -----------------------------------------------------------------------------------------

FARTHEST = (FAR, 384, 256, 192, 128, 96, 64, 48, 32)  # tokens; the first that the model takes
SMALL = (8, 1, 33)


def small_sizes(infos: Sequence[TensorInfo]) -> list[Sizes]:
    """For made-up inputs: all axes of one length, and axes of different names of different lengths."""
    keys = _keys(infos)
    if not keys:
        return [{}]
    found = [scaled(dict.fromkeys(keys, 1), length) for length in SMALL]
    if len(keys) > 1:
        found.append(scaled({key: 5 + 4 * index for index, key in enumerate(keys)}, 1 + 4 * len(keys)))
    return found


def far_sizes(infos: Sequence[TensorInfo]) -> list[Sizes]:
    """Beyond all samples, the farthest first."""
    keys = _keys(infos)
    return [scaled(dict.fromkeys(keys, 1), length) for length in FARTHEST] if keys else []


def _keys(infos: Sequence[TensorInfo]) -> list[str]:
    return list(dict.fromkeys(key for found in token_axes(infos).values() for key in found.values()))


def variants(feeds: Arrays, infos: Sequence[TensorInfo]) -> Iterator[Arrays]:
    """The inputs, and what is left of them with padding at the left and with holes in the mask."""
    yield feeds
    if any(feeds[info.name].shape[1] > 2 for info in masks(feeds, infos)):
        yield from filter(None, (left_padded(feeds, infos), with_holes(feeds, infos)))


def of_samples(data: Data) -> Iterator[Arrays]:
    """The shortest and the longest sample, one token of it, and a length beyond; all of them in variants."""
    axes = token_axes(data.inputs)
    rows, lead = rows_of(data)
    rows = sorted(rows, key=lambda row: max(sizes_of(row, axes, lead).values(), default=0))
    count = batch_size(data.inputs, 1)
    for sample, factors in zip((rows[0], rows[-1]), ((1,), (1, 0, 2)), strict=True):
        sizes = sizes_of(sample, axes, lead)
        most = max(sizes.values(), default=0)
        for factor in factors if most else (1,):
            wanted = sizes if factor == 1 else scaled(sizes, factor * most + 1)
            feeds = feeds_at(data, [sample] * count, lead, wanted)
            if feeds is not None:
                yield from variants(feeds, data.inputs)
