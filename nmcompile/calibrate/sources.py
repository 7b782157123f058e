"""Calibration data as their source has them: files and Python objects as records (dicts), text as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmcompile.errors import CalibrationError
from nmcompile.npz_file import FileError, check_regular, load_npy, load_npz

Record = Mapping[str, object]
Source = str | Path | Iterable[Record]

_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>")
LINE = 1 << 25  # bytes of one line of JSON


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
    elif not path.exists():
        raise CalibrationError(f"calibration data '{path}' do not exist")
    elif path.suffix == ".npz":
        yield str(path), _read(load_npz, path)
    elif path.suffix == ".jsonl":
        yield from _load_jsonl(path)
    else:
        raise CalibrationError(
            f"calibration data '{path}': kind not known; give .npz, .jsonl or a folder of .npz or .npy"
        )


def _folder(path: Path) -> Iterator[tuple[str, Record]]:
    archives = sorted(path.glob("*.npz"))
    for archive in archives:
        yield str(archive), _read(load_npz, archive)
    arrays = [] if archives else sorted(path.glob("*.npy"))
    if arrays:
        yield str(path), {array.stem: _read(load_npy, array) for array in arrays}


def _read(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except FileError as error:
        raise CalibrationError(f"calibration data '{path}' cannot be read: {error}; write plain arrays with np.savez"
                               ) from None  # fmt: skip


def _load_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    _read(check_regular, path)
    number = 0
    try:
        with path.open("rb") as lines:
            while line := lines.readline(LINE + 1):
                number += 1
                where = f"'{path}', line {number}"
                if len(line) > LINE:
                    raise CalibrationError(f"{where} is longer than {LINE >> 20} MB; give one sample per line")
                if line.strip():
                    yield where, _record(line, where)
    except OSError as error:
        raise CalibrationError(f"calibration data '{path}' cannot be read: {error.strerror or error}") from None


def _record(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise CalibrationError(f"{where} is not JSON: not UTF-8; write the file as UTF-8") from None
    except RecursionError:
        raise CalibrationError(f"{where} is nested too deep; give one sample per line") from None
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise CalibrationError(f'{where} is not an object such as {{"text": "..."}}')
    return record


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
        check_regular(file)
        model = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the only class that tokenizers raises, or what its Rust code panics with
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CalibrationError(f"'{file}' is not a readable tokenizer.json: {_line(error)}") from None
    padding = model.padding or {}
    known = [token for token in map(model.token_to_id, _PAD_TOKENS) if token is not None]
    model.no_padding()
    model.enable_truncation(max_length)

    def encode(record: Record) -> tuple[list[int], list[int]]:
        pair = record.get("text_pair")
        try:
            encoded = model.encode(str(record["text"]), None if pair is None else str(pair))
        except Exception as error:  # half of a surrogate pair, for one
            raise CalibrationError(f"a text cannot be tokenized: {_line(error)}") from None
        return list(encoded.ids), list(encoded.type_ids)

    return Tokenizer(encode, int(padding.get("pad_id", known[0] if known else 0)))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
