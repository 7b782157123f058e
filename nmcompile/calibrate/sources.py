"""Calibration data as their source has them: files and Python objects as records (dicts), text as tokens."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nmcompile.errors import CalibrationError

Record = Mapping[str, object]
Source = str | Path | Iterable[Record]

_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
_UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile)  # a pickle, a short file, a damaged archive


@dataclass(frozen=True)
class Tokenizer:
    """`encode` turns {"text", "text_pair"} into (token ids, token types); `pad` is the token to pad with."""

    encode: Callable[[Record], tuple[list[int], list[int]]]
    pad: int


def records(source: Source) -> Iterator[tuple[str, Record]]:
    """(where it came from, record) in order; folders are read in the order of their names."""
    if not isinstance(source, str | Path):
        for number, record in enumerate([source] if isinstance(source, Mapping) else source):
            if not isinstance(record, Mapping):
                raise CalibrationError(
                    f"calibration item {number} is a {type(record).__name__}; give dicts of name to array"
                )
            yield f"calibration item {number}", record
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path)
    elif not path.is_file():
        raise CalibrationError(f"calibration data '{path}' do not exist")
    elif path.suffix == ".npz":
        yield str(path), _load_npz(path)
    elif path.suffix == ".jsonl":
        yield from _load_jsonl(path)
    else:
        raise CalibrationError(
            f"calibration data '{path}': kind not known; give .npz, .jsonl or a folder of .npz or .npy"
        )


def _folder(path: Path) -> Iterator[tuple[str, Record]]:
    archives = sorted(path.glob("*.npz"))
    for archive in archives:
        yield str(archive), _load_npz(archive)
    arrays = [] if archives else sorted(path.glob("*.npy"))
    if arrays:
        yield str(path), {array.stem: _load(array) for array in arrays}


def _load_npz(path: Path) -> dict[str, object]:
    archive = _load(path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise _unreadable(path, "it is not an archive")
    try:
        with archive:
            return {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, why: object) -> CalibrationError:
    return CalibrationError(
        f"calibration data '{path}' cannot be read ({why}); write plain arrays with np.savez"
    )


def _load_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise CalibrationError(f'{where} is not an object such as {{"text": "..."}}')
            yield where, record


def load_tokenizer(path: str | Path, max_length: int) -> Tokenizer:
    """The tokenizer of a tokenizer.json (or of the folder that holds it), cutting text to `max_length`
    tokens.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise CalibrationError(
            "a tokenizer needs the tokenizers package: pip install nmcompile[hf]"
        ) from error
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the only class that tokenizers raises
        raise CalibrationError(f"'{file}' is not a readable tokenizer.json: {error}") from error
    padding = model.padding or {}
    known = [token for token in map(model.token_to_id, _PAD_TOKENS) if token is not None]
    model.no_padding()
    model.enable_truncation(max_length)

    def encode(record: Record) -> tuple[list[int], list[int]]:
        pair = record.get("text_pair")
        encoded = model.encode(str(record["text"]), None if pair is None else str(pair))
        return list(encoded.ids), list(encoded.type_ids)

    return Tokenizer(encode, int(padding.get("pad_id", known[0] if known else 0)))
