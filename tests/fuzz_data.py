"""Mutated calibration data and inputs: read, or refused by an error of ours."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from nmcompile.calibrate import open_data, split
from nmcompile.cli.run import read_npz
from nmcompile.errors import NmcompileError
from nmcompile.tensorinfo import TensorInfo

INT = np.dtype(np.int64)
INPUTS = (
    (TensorInfo("input_ids", INT, ("b", "s")), TensorInfo("attention_mask", INT, ("b", "s"))),
    (TensorInfo("x", np.dtype(np.float32), ("b", 3, 4)),),
    (TensorInfo("x", np.dtype(np.float16), (2, "s", 4)), TensorInfo("position_ids", INT, (1, "s"))),
    (TensorInfo("x", np.dtype(np.float32), ("b", "s", 4)), TensorInfo("scale", np.dtype(np.float32), ())),
)
DTYPES = ("<i8", "<f4", "|b1", "<U3", "|O", "m8[s/0]", "M8[s]", "<f2", "|V2", ">i4", "<c8", "f8", "(2,)f4", "(" * 50,
          [["a", "<f4"]], {"names": ["a"], "formats": ["f4"]}, "<i9", "<U99999999", "", None, 5)  # fmt: skip
SHAPES = ((), (0,), (3, 5), (2, 3, 4), (1, 3, 4), (8, 3, 4), (1 << 40,), (1 << 62, 4), (-1,), (1,) * 65, ("a",), None,
          7, (True,), (2.0, 3))  # fmt: skip
VALUES = ("5", "-1", "1e400", "NaN", "Infinity", "true", "null", '"text"', '"\\ud800"', "[1, 2, 3]", "[[1], [2, 3]]",
          "{}", "[" * 3000 + "]" * 3000, "9" * 5000, "[9223372036854775808]", "[]", "[[]]", "[1.5, 2]", "[null]",
          '["a"]', "[true, false]", "[" + "0," * 300 + "0]")  # fmt: skip


def fuzz_data(seed: int) -> str:
    """A .npz, a folder of .npy or a .jsonl of strange arrays, some of its bytes changed; `seed` says which and how."""
    rng = np.random.default_rng(seed)
    infos, outcome = INPUTS[int(rng.integers(len(INPUTS)))], "right"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = int(rng.integers(3))
        if kind == 0:
            path = folder / "d.npz"
            path.write_bytes(_damaged(_npz(infos, rng), rng))
        elif kind == 1:
            path = folder
            for info in infos:
                (folder / f"{info.name}.npy").write_bytes(_damaged(_npy(info, rng), rng))
        else:
            path = folder / "d.jsonl"
            path.write_bytes(_damaged(_jsonl(infos, rng), rng))
        try:
            data = open_data(path, infos, batch=int(rng.integers(1, 5)), max_length=16, limit=64)
            for part in split(data):
                for feed in part:
                    assert set(feed) == {info.name for info in infos}
                    assert all(feed[info.name].dtype == info.dtype for info in infos)
        except NmcompileError as error:
            assert "\n" not in str(error), str(error)
            outcome = type(error).__name__
        if kind == 0:
            try:
                read_npz(path)
            except NmcompileError as error:
                assert "\n" not in str(error), str(error)
    return outcome


def _array(info: TensorInfo, rng: np.random.Generator) -> np.ndarray:
    """What fits the input, or nearly."""
    count = int(rng.integers(1, 12))
    sizes = {"b": count, "s": int(rng.integers(1, 20))}
    shape = [sizes[dim] if isinstance(dim, str) else int(dim or 1) for dim in info.shape]
    if rng.random() < 0.3:
        shape = [count, *shape]
    elif shape and rng.random() < 0.2:
        shape = shape[1:]
    elif shape and rng.random() < 0.2:
        shape[int(rng.integers(len(shape)))] = int(rng.integers(0, 9))
    values = rng.integers(-2, 9, shape).astype(info.dtype)
    if rng.random() < 0.1 and values.size and info.dtype.kind == "f":
        values.reshape(-1)[0] = (np.nan, np.inf)[int(rng.integers(2))]
    return values


def _npy(info: TensorInfo, rng: np.random.Generator) -> bytes:
    """An array's file; now and then its header says something else than what follows."""
    stream = io.BytesIO()
    np.save(stream, _array(info, rng))
    if rng.random() < 0.6:
        return stream.getvalue()
    kind, shape = DTYPES[int(rng.integers(len(DTYPES)))], SHAPES[int(rng.integers(len(SHAPES)))]
    header = repr({"descr": kind, "fortran_order": bool(rng.integers(2)), "shape": shape}).encode()
    version = int(rng.integers(0, 5))
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + stream.getvalue()[-64:]


def _npz(infos: tuple[TensorInfo, ...], rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(stream, "w", methods[int(rng.integers(4))]) as archive:
        for info in infos:
            if rng.random() < 0.95:
                archive.writestr(f"{info.name}.npy", _npy(info, rng))
        if rng.random() < 0.1:
            archive.writestr(("../x.npy", "a.txt", "z.npy")[int(rng.integers(3))], b"\x93NUMPY")
    return stream.getvalue()


def _jsonl(infos: tuple[TensorInfo, ...], rng: np.random.Generator) -> bytes:
    lines = []
    for _ in range(int(rng.integers(0, 12))):
        if rng.random() < 0.1:
            lines.append(VALUES[int(rng.integers(len(VALUES)))])
            continue
        parts = [f'"{info.name}": ' + (json.dumps(_array(info, rng).tolist()) if rng.random() < 0.7
                                       else VALUES[int(rng.integers(len(VALUES)))]) for info in infos]  # fmt: skip
        lines.append("{" + ", ".join(parts) + "}")
    return "\n".join(lines).encode()


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.6 or not content:
        return content
    data, at = bytearray(content), int(rng.integers(len(content)))
    kind = int(rng.integers(3))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data[:at] + data[max(0, at - 30) :])
    for _ in range(int(rng.integers(1, 12))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(data)
