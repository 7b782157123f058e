"""Files of arrays from strangers: read, or refused in one line, within what their size accounts for."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nmcompile.npz_file import FileError, load_npy, load_npz


def npy(header: object, body: bytes = bytes(64), version: int = 1) -> bytes:
    text = header if isinstance(header, bytes) else repr(header).encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + body


def described(kind: object, shape: object = (2,)) -> bytes:
    return npy({"descr": kind, "fortran_order": False, "shape": shape})


def refused(path: Path, match: str) -> None:
    with pytest.raises(FileError, match=match) as caught:
        (load_npy if path.suffix == ".npy" else load_npz)(path)
    assert "\n" not in str(caught.value)


def archive(path: Path, content: bytes, name: str = "x.npy") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return path


def test_plain_arrays_come_back_as_they_were_written(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "i": np.arange(6).reshape(2, 3), "f": np.ones(4, np.float16), "b": np.array([True]), "s": np.array(["ab"]),
        "c": np.zeros((0, 3), np.float32), "z": np.array(5.0), "t": np.asfortranarray(np.eye(3)),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        found = load_npz(tmp_path / "a.npz")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            np.save(tmp_path / "a.npy", array)
            np.testing.assert_array_equal(load_npy(tmp_path / "a.npy"), array)
    np.savez(tmp_path / "h.npz", h=np.ones(3, ml_dtypes.bfloat16))
    assert load_npz(tmp_path / "h.npz")["h"].tobytes() == np.ones(3, ml_dtypes.bfloat16).tobytes()


def test_an_archive_that_unpacks_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    header = npy({"descr": "<i8", "fortran_order": False, "shape": (1, 1 << 25)}, b"")
    path = archive(tmp_path / "bomb.npz", header + bytes(1 << 28))
    assert path.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, r"unpacks to 268 MB, more than the 7\d MB")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15  # kB


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 4), (1 << 20, 1 << 20), (9,)])
def test_a_header_that_asks_for_more_than_there_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.npz", described("<i8", shape)), "cut short: an array of shape")
    (tmp_path / "a.npy").write_bytes(described("<i8", shape))
    refused(tmp_path / "a.npy", "cut short: an array of shape")


@pytest.mark.parametrize("kind", ["|O", "m8[s/0]", "M8[s]", "(2,)f4", [("a", "<f4")], "f4, f4", "", None, "<i9", "V-1",
                                  "(" * 100, "S99999999999"])  # fmt: skip
def test_types_that_are_no_plain_numbers_are_refused(kind: object, tmp_path: Path) -> None:
    """Some of these texts would end the process inside numpy."""
    refused(archive(tmp_path / "a.npz", described(kind)), "only plain numbers are read")
    (tmp_path / "a.npy").write_bytes(described(kind))
    refused(tmp_path / "a.npy", "only plain numbers are read")


@pytest.mark.parametrize("shape", [(-1,), (1,) * 65, ("a",), None, 7, (True,), (2.0,), [2]])
def test_shapes_that_are_none_are_refused(shape: object, tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.npz", described("<f4", shape)), "an array of shape")


@pytest.mark.parametrize("content", [
    b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", npy(b"(" * 5000), npy(b"{"), npy(b"5"), npy({"descr": "<f4"}),
    npy({"descr": "<f4"}, version=9), npy(b"x" * 20_000, version=2), b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    b"PK\x03\x04", npy(b"{'descr': '<f4', 'shape': (1or 2,)}")])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_damaged_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.npz", content), "no array|header of an array is damaged")
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", "no array|header of an array is damaged")


def test_every_damaged_byte_of_an_archive_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    stream, path = io.BytesIO(), tmp_path / "a.npz"
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", described("<i8"))
    whole = stream.getvalue()
    for at in range(len(whole)):
        for value in (0, 255, whole[at] ^ 1):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                load_npz(path)
            except FileError as error:
                assert "\n" not in str(error)
        path.write_bytes(whole[:at])
        refused(path, ".")


def test_what_is_no_regular_file_is_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "pipe.npz", "not a regular file")
    refused(tmp_path / "folder.npy", "a folder")
    refused(Path("/dev/zero"), "not a regular file")
    refused(tmp_path / "none.npz", "No such file")
