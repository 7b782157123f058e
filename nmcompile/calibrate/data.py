"""Calibration data checked against the model's inputs, padded and cut into batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nmcompile import ir as graphs
from nmcompile.calibrate.sources import Record, Source, Tokenizer, load_tokenizer, records
from nmcompile.errors import CalibrationError
from nmcompile.roles import first_of, ids_input, kind_of, made, written
from nmcompile.tensorinfo import TensorInfo

Array = npt.NDArray[Any]
Feed = dict[str, Array]  # input name -> values, with or without the batch axis as the text says

POOL = 8  # batches whose samples are sorted by length together
_SYNTHETIC_BATCHES = 8
_SYNTHETIC_TOKENS = 64
_SYNTHETIC_BYTES = 1 << 27


@dataclass(frozen=True)
class Data:
    """Batches of inputs (name -> array), as often as wanted.

    `synthetic` says that the values are made up, so that ranges taken from them mean little; `samples` counts
    rows of batches.
    """

    inputs: tuple[TensorInfo, ...]
    rows: tuple[Feed, ...]  # one sample each, without the batch axis; whole batches when synthetic
    batch: int
    pad_token: int = 0
    synthetic: bool = False
    fills: Mapping[str, int | float] = field(default_factory=dict)  # what others than ids and masks hold where padded

    @property
    def samples(self) -> int:
        if self.synthetic:
            return sum(_batch_of(feed, self.inputs) for feed in self.rows)
        return sum(map(len, self.groups()))

    def __iter__(self) -> Iterator[Feed]:
        if self.synthetic:
            return iter(self.rows)
        fills = {**_fills(self.inputs, self.pad_token), **self.fills}
        return (_stack(group, self.inputs, fills) for group in self.groups())

    @property
    def fixed(self) -> int | None:
        """The batch size that the model fixes; an input of one row beside free ones is shared by their rows."""
        sizes = [info.shape[0] for info in self.inputs if info.shape and info.name not in shared(self.inputs)]
        return next((size for size in sizes if isinstance(size, int)), None)

    def without(self, names: Collection[str]) -> Data:
        """The same samples without some of their inputs."""
        if not names:
            return self
        rows = tuple({key: values for key, values in row.items() if key not in names} for row in self.rows)
        return replace(self, inputs=tuple(info for info in self.inputs if info.name not in names), rows=rows)

    def groups(self) -> Iterator[Sequence[Feed]]:
        """The samples of each batch; too few for a fixed batch size are dropped."""
        fixed = self.fixed
        for group in self._alike(fixed or self.batch):
            if fixed is None or len(group) == fixed:
                yield group

    def _alike(self, size: int) -> Iterator[Sequence[Feed]]:
        """Of each POOL batches, samples of like lengths together, so that little is padded; the batches in an order
        that has nothing to do with lengths, as some readers look at every eighth."""
        one = shared(self.inputs)
        for start in range(0, len(self.rows), size * POOL):
            pool = self.rows[start : start + size * POOL]
            lengths = [max((value.shape[0] for value in row.values() if value.ndim), default=0) for row in pool]
            mixed = not one and 1 < size < len(pool) and len(set(lengths)) > 1
            if mixed:
                pool = tuple(pool[i] for i in np.argsort(lengths, kind="stable"))
            # A model without a mask would read padding as tokens, so there a batch has one shape.
            runs = [pool] if first_of(self.inputs, "mask") else _equal_shapes(pool)
            runs = list(itertools.chain.from_iterable(_equal_values(run, one) for run in runs))
            found = [run[at : at + size] for run in runs for at in range(0, len(run), size)]
            order = np.random.default_rng(start).permutation(len(found)) if mixed else range(len(found))
            yield from (found[i] for i in order)


def open_data(
    source: Source | None,
    inputs: Sequence[TensorInfo],
    *,
    tokenizer: str | Path | None = None,
    max_length: int = 128,
    batch: int = 8,
    limit: int = 512,
) -> Data:
    """The first `limit` samples of `source`, checked against the model's `inputs`, in batches of `batch`.

    source: a .npz file; a folder of .npz files, or of .npy files named like the inputs; a .jsonl file whose
    lines are {"input_ids": [...]} or {"text": "...", "text_pair": "..."}; an iterable of such dicts; or None
    for made-up data.
    An array with one axis less than its input is one sample, with as many a batch, with one more a stack of
    batches.
    Text needs `tokenizer`, the path of a tokenizer.json, and is cut to `max_length` tokens, as are lists of
    tokens.
    Samples of unequal length are padded when the model takes an attention mask. Token types (zeros),
    attention masks and position ids are made where the data lack them. A batch size fixed in the model wins
    over `batch`.
    CalibrationError when an input is missing, has another type or shape, holds NaN or Inf, or there are no
    samples.
    """
    if batch < 1 or limit < 1 or max_length < 1:
        raise CalibrationError("batch, limit and max_length of the calibration data must be at least 1")
    infos = tuple(inputs)
    for info in infos:
        if info.shape and info.shape[0] == 0:
            raise CalibrationError(f"input {info} takes no samples, its first size is 0; export the model again")
    if not infos:
        raise CalibrationError("the model has no inputs, so there is nothing to calibrate or to run")
    if source is None:
        return Data(infos, tuple(_synthetic(infos, max_length, batch, limit)), batch, synthetic=True)
    length = _token_limit(infos, max_length)
    text = load_tokenizer(tokenizer, length) if tokenizer is not None else None
    rows: list[Feed] = []
    for where, record in records(source):
        feed = _feed(_tokenized(record, infos, text, where), infos, length, where)
        rows.extend(itertools.islice(_rows(feed, infos, where), limit - len(rows)))
        if len(rows) >= limit:
            break
    if not rows:
        raise CalibrationError(f"the calibration data {_name(source)} hold no samples")
    data = Data(infos, tuple(rows), batch, text.pad if text else 0)
    first = next(iter(data), None)
    if first is None:
        raise CalibrationError(
            f"{len(rows)} calibration samples do not fill one batch of the model ({_text(infos)}); give more"
        )
    return data


def split(data: Data) -> tuple[Data, Data]:
    """(for calibration, for measuring the loss): every eighth sample is held out, all serve both when there are few.

    Where the model fixes the batch size, every eighth batch is, or the last: both parts fill whole batches.
    """
    rows = data.rows
    if data.synthetic or len(rows) < 8:
        return data, data
    if data.fixed is not None and data.fixed > 1:
        return _split_batches(data)
    held = tuple(row for i, row in enumerate(rows) if i % 8 == 7)
    return replace(data, rows=tuple(row for i, row in enumerate(rows) if i % 8 != 7)), replace(data, rows=held)


def _split_batches(data: Data) -> tuple[Data, Data]:
    batches = list(data.groups())
    if len(batches) < 2:
        return data, data
    held = [i for i in range(len(batches)) if i % 8 == 7] or [len(batches) - 1]
    seen = tuple(row for i, batch in enumerate(batches) if i not in held for row in batch)
    return replace(data, rows=seen), replace(data, rows=tuple(row for i in held for row in batches[i]))


def _name(source: object) -> str:
    return f"'{source}'" if isinstance(source, str | Path) else "given"


# From a record to samples of the model's inputs.


def _tokenized(record: Record, infos: tuple[TensorInfo, ...], text: Tokenizer | None, where: str) -> Record:
    """The record with the tokens of its text, unless the model itself has an input called text."""
    if "text" not in record or any(info.name == "text" for info in infos):
        return record
    if text is None:
        raise CalibrationError(f"{where} holds text; give the tokenizer of the model (a tokenizer.json)")
    ids, types = ids_input(infos), first_of(infos, "types")
    if ids is None:
        raise CalibrationError(f"{where} holds text, but the model takes no tokens ({_text(infos)})")
    tokens, kinds = text.encode(record)
    return {**record, ids.name: tokens} | ({types.name: kinds} if types else {})


def _feed(record: Record, infos: tuple[TensorInfo, ...], length: int, where: str) -> Feed:
    """The arrays of the model's inputs; lists of tokens are cut to `length`."""
    feed: Feed = {}
    for info in infos:
        if info.name not in record:
            continue
        value = record[info.name]
        try:
            array = np.asarray(value)
        except Exception as error:  # lists of unequal length, numbers of a hundred digits, objects of any kind
            raise CalibrationError(
                f"{where}: input '{info.name}' is ragged, or no array of numbers; give one sample per record"
            ) from error
        cut = isinstance(value, list) and array.ndim == 1 and len(info.shape) == 2
        feed[info.name] = _cast(array[:length] if cut else array, info, where)
    return _complete(feed, infos, where, list(record))


def _cast(array: Array, info: TensorInfo, where: str) -> Array:
    """The array in the input's type, where no value changes its meaning."""
    floats = info.dtype.kind == "f" or info.dtype.name == "bfloat16"
    if array.size == 0 and 0 not in info.shape:
        raise CalibrationError(f"{where}: input '{info.name}' is empty")
    fits = array.dtype == info.dtype or array.dtype.kind in ("biuf" if floats else "biu")
    if not fits and not (array.dtype.name == "bfloat16" and floats):
        raise CalibrationError(
            f"{where}: input '{info.name}' is {array.dtype}, the model takes {info.dtype.name}"
        )
    if info.dtype.kind in "iu" and array.dtype.kind in "iu" and array.size:
        bounds = np.iinfo(info.dtype)
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            raise CalibrationError(
                f"{where}: input '{info.name}' has values beyond the model's {info.dtype.name}"
            )
    with np.errstate(over="ignore"):
        cast = array.astype(info.dtype, copy=False)
    if floats and not np.isfinite(cast).all():
        raise CalibrationError(
            f"{where}: input '{info.name}' holds NaN or Inf as {info.dtype.name}; mend the data"
        )
    return cast


def _complete(feed: Feed, infos: tuple[TensorInfo, ...], where: str, has: Sequence[str]) -> Feed:
    """The feed with the inputs that can be made from its tokens; they take the tokens' shape, batch axis or
    not.
    """
    tokens = ids_input(infos)
    shape = feed[tokens.name].shape if tokens and tokens.name in feed else _token_shape(feed, infos)
    rng, found = np.random.default_rng(0), dict(feed)
    for info in infos:
        if info.name in feed:
            continue
        known = kind_of(info) in ("mask", "types", "positions")
        if not shape or len(info.shape) != 2 or not known:
            raise CalibrationError(
                f"{where}: input '{info.name}' is missing (the data have: {', '.join(map(str, has))}); "
                "name the arrays like the model's inputs"
            )
        found[info.name] = made(info, shape, rng, types=1)
    return found


def _token_shape(feed: Feed, infos: tuple[TensorInfo, ...]) -> tuple[int, ...] | None:
    """[..., tokens] of the first embedded input [batch, tokens, channels]."""
    found = (feed[info.name].shape[:-1] for info in infos if info.name in feed and len(info.shape) == 3)
    return next(found, None)


def _rows(feed: Feed, infos: tuple[TensorInfo, ...], where: str) -> Iterator[Feed]:
    """The samples in a feed that holds one, a batch, or a stack of batches."""
    extra = {info.name: feed[info.name].ndim - len(info.shape) for info in infos if info.shape}
    depths = set(extra.values())
    if len(depths) > 1 or not depths <= {-1, 0, 1}:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise CalibrationError(f"{where}: shapes {shapes} do not fit the model's inputs {_text(infos)}")
    if depths <= {-1}:
        _check_shape(feed, infos, where)
        yield feed
        return
    alone = {name for name in shared(infos) if extra[name] == 0 and feed[name].shape[0] == 1}
    counts = {feed[name].shape[0] for name in extra if name not in alone} or {1}
    if len(counts) > 1:
        sizes = ", ".join(f"{name} {feed[name].shape[0]}" for name in extra)
        raise CalibrationError(f"{where}: the inputs have different numbers of samples: {sizes}")
    for index in range(counts.pop()):
        part = {name: array if name not in extra else _row(array, 0 if name in alone else index)
                for name, array in feed.items()}  # fmt: skip
        yield from _rows(part, infos, where)


def _row(array: Array, index: int) -> Array:
    return np.asarray(array[index], array.dtype)  # of objects the element itself is no array


def _check_shape(sample: Feed, infos: tuple[TensorInfo, ...], where: str) -> None:
    """Fixed sizes must be met, but tokens [batch, tokens] may be fewer, as they are padded."""
    for info in infos:
        sizes = sample[info.name].shape
        for size, dim in zip(sizes, info.shape[1:], strict=False):
            short = len(info.shape) == 2 and (info.dtype.kind in "iu" or kind_of(info) == "mask")
            if isinstance(dim, int) and (size > dim or (size < dim and not short)):
                raise CalibrationError(
                    f"{where}: a sample of shape {list(sizes)} does not fit the model's input {info}"
                )


# From samples to batches.


def shared(infos: Sequence[TensorInfo]) -> frozenset[str]:
    """Inputs of one row, fixed in the model, beside others of any number of rows: all rows of a batch share it."""
    free = any(info.shape and not isinstance(info.shape[0], int) for info in infos)
    return frozenset(info.name for info in infos if free and info.shape and info.shape[0] == 1)


def _stack(rows: Sequence[Feed], infos: tuple[TensorInfo, ...], fills: Mapping[str, int | float]) -> Feed:
    one = shared(infos)
    return {
        info.name: _pad([row[info.name] for row in (rows[:1] if info.name in one else rows)], info,
                        fills.get(info.name, 0))
        if info.shape
        else rows[0][info.name]
        for info in infos
    }


def _fills(infos: Sequence[TensorInfo], pad_token: int) -> dict[str, int | float]:
    """What inputs hold where a sample is padded, if it is not 0: ids the padding token, masks what hides."""
    ids = ids_input(infos)
    masks = {info.name: written(np.zeros((), bool), info).item() for info in infos if kind_of(info) == "mask"}
    return masks | ({ids.name: pad_token} if ids else {})


def _pad(values: Sequence[Array], info: TensorInfo, fill: int | float) -> Array:
    """[batch, ...]: the first axis of each sample padded at its end to the longest, or to the model's fixed
    size.
    """
    if values[0].ndim == 0:
        return np.stack(values)
    fixed = info.shape[1]
    length = fixed if isinstance(fixed, int) else max(value.shape[0] for value in values)
    batch = np.full((len(values), length, *values[0].shape[1:]), fill, info.dtype)
    for row, value in zip(batch, values, strict=True):
        if value.shape[1:] != row.shape[1:]:
            raise CalibrationError(
                f"input '{info.name}' has samples of shapes {list(value.shape)} and {list(values[0].shape)}; "
                "only the first axis is padded"
            )
        row[: value.shape[0]] = value
    return batch


def _synthetic(infos: tuple[TensorInfo, ...], max_length: int, batch: int, limit: int) -> Iterator[Feed]:
    dims: dict[str, int] = {}
    for info in infos:
        if info.shape and isinstance(info.shape[0], str):
            dims[info.shape[0]] = min(batch, limit)
        if len(info.shape) == 2 and info.dtype.kind in "iu" and isinstance(info.shape[1], str):
            dims[info.shape[1]] = min(max_length, _SYNTHETIC_TOKENS)
    sample = sum(math.prod(dim if isinstance(dim, int) else dims.get(str(dim), 8) for dim in info.shape[1:])
                 for info in infos)  # fmt: skip
    for info in infos:  # large images come in smaller batches
        if info.shape and isinstance(info.shape[0], str):
            dims[info.shape[0]] = max(1, min(dims[info.shape[0]], graphs.LARGEST // max(sample, 1)))
    room = _SYNTHETIC_BYTES
    for seed in range(min(_SYNTHETIC_BATCHES, -(-limit // batch))):
        feed = graphs.random_feeds(infos, seed=seed, dims=dims)
        room -= sum(array.nbytes for array in feed.values())
        if room < 0 < seed:
            return
        yield feed


def _batch_of(feed: Feed, infos: tuple[TensorInfo, ...]) -> int:
    return next((feed[info.name].shape[0] for info in infos if info.shape), 1)


def _text(infos: tuple[TensorInfo, ...]) -> str:
    return ", ".join(map(str, infos))


def _token_limit(infos: tuple[TensorInfo, ...], max_length: int) -> int:
    ids = ids_input(infos)
    fixed = ids.shape[1] if ids else None
    return min(max_length, fixed) if isinstance(fixed, int) else max_length


def _equal_shapes(rows: Sequence[Feed]) -> list[Sequence[Feed]]:
    runs = itertools.groupby(rows, key=lambda row: [value.shape for value in row.values()])
    return [tuple(run) for _, run in runs]


def _equal_values(rows: Sequence[Feed], names: Collection[str]) -> list[Sequence[Feed]]:
    """Neighbours that agree in the values of some inputs."""
    runs = itertools.groupby(rows, key=lambda row: [(row[name].shape, row[name].tobytes()) for name in names])
    return [tuple(run) for _, run in runs] if names else [rows]
