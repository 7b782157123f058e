"""A plan is read exactly as it was written, or refused with one line."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmcompile import archive
from nmcompile.archive import Member, write_archive
from nmcompile.errors import PlanError
from nmcompile.plan import DTYPES, MAGIC, MAX_HEADER_BYTES, Plan, read_plan, write_plan

HEADER = {"target": "cpu", "steps": [{"op": "linear", "weight": "layer.0"}], "note": "ä", "scale": 0.1}


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {f"kind/{kind}": generator.integers(0, 2, (3, 5)).astype(dtype) for kind, dtype in DTYPES.items()}
    found["weight"] = generator.normal(size=(33, 65)).astype(np.float32)
    found["fortran"] = np.asfortranarray(found["weight"])
    found["strided"] = found["weight"][::2, ::3]
    found["big_endian"] = np.arange(5, dtype=">i4")
    found["scalar"] = np.array(2.5)
    found["empty"] = np.zeros((0, 7), np.int8)
    return found


BLOBS = {"segment.0": b"\x08\x0a" * 101, "segment.1": b""}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plan with every dtype, odd shapes and two blobs."""
    write_plan(tmp_path / "model.plan", HEADER, arrays(), BLOBS)
    return tmp_path / "model.plan"


def assert_refused(path: Path, *words: str) -> str:
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


def test_round_trip(path: Path) -> None:
    plan = read_plan(path)
    assert {key: value for key, value in plan.header.items() if key not in ("format", "members")} == HEADER
    assert plan.arrays.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(plan.arrays[name], array)
        assert plan.arrays[name].dtype == array.dtype.newbyteorder("<")
        assert plan.arrays[name].shape == array.shape
        assert plan.arrays[name].flags.c_contiguous
    assert plan.blob_names == tuple(BLOBS)
    assert {name: plan.blobs(name) for name in BLOBS} == BLOBS
    with pytest.raises(KeyError):
        plan.blobs("segment.2")


def test_arrays_are_mapped_read_only_and_aligned(path: Path) -> None:
    for name, array in read_plan(path).arrays.items():
        if array.size:
            assert array.ctypes.data % 64 == 0, name
            assert not array.flags.writeable and not array.flags.owndata, name


def test_arrays_outlive_the_plan_and_the_replaced_file(path: Path) -> None:
    with read_plan(path) as plan:
        weight = plan.arrays["weight"]
        write_plan(path, {}, {"weight": np.zeros(3)}, {})
    np.testing.assert_array_equal(weight, arrays()["weight"])
    assert not plan.arrays
    assert read_plan(path).arrays["weight"].shape == (3,)


def test_same_input_gives_same_bytes(path: Path, tmp_path: Path) -> None:
    turned = dict(reversed(arrays().items()))
    digest = write_plan(tmp_path / "again.plan", HEADER, turned, dict(reversed(BLOBS.items())))
    assert (tmp_path / "again.plan").read_bytes() == path.read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_header_is_readable_json(path: Path) -> None:
    text = zipfile.ZipFile(path).read("plan.json").decode()
    assert text.startswith('{\n  "format": 1,\n  "target": "cpu",\n  "steps": [{"op": "linear", ')
    assert '\n    "weight.npy": "float32[33,65]"' in text
    assert '"scalar.npy": "float64[]"' in text
    assert json.loads(text) == read_plan(path).header


def test_long_header_values_are_broken_into_lines(tmp_path: Path) -> None:
    header: dict[str, Any] = {
        "layers": [{"name": "x" * 80, "shape": [1, 2]}] * 3,
        "none": [],
        "deep": {"a": {"b": 1}},
    }
    write_plan(tmp_path / "a.plan", header, {}, {})
    text = zipfile.ZipFile(tmp_path / "a.plan").read("plan.json").decode()
    assert max(map(len, text.splitlines())) <= 120
    assert '"deep": {"a": {"b": 1}}' in text
    assert json.loads(text)["layers"] == header["layers"]


def test_other_programs_read_it(path: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        names = opened.namelist()
        assert names == ["plan.json", *sorted(names[1:])]
        assert {info.date_time for info in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        for name, array in arrays().items():
            np.testing.assert_array_equal(np.load(io.BytesIO(opened.read(f"{name}.npy"))), array)
        opened.extractall(tmp_path / "out")
    np.testing.assert_array_equal(np.load(tmp_path / "out/weight.npy"), arrays()["weight"])
    np.testing.assert_array_equal(np.load(path)["weight"], arrays()["weight"])


def test_unzip_reads_it(path: Path) -> None:
    try:
        shown = subprocess.run(["unzip", "-p", path, "plan.json"], capture_output=True, check=True).stdout
        subprocess.run(["unzip", "-tq", path], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("unzip is not installed")
    assert json.loads(shown)["target"] == "cpu"


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a//b", "a/../b", "", "a b", "ä", "a\\b", ".x", "x" * 600, "C:x", "a\n"]
)
def test_writer_refuses_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="cannot name a member"):
        write_plan(tmp_path / "a.plan", {}, {name: np.zeros(1)}, {})
    with pytest.raises(PlanError, match="cannot name a member"):
        write_plan(tmp_path / "a.plan", {}, {}, {name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [object, "U3", "V2", complex, "datetime64[s]", np.longdouble])
def test_writer_refuses_dtypes(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(PlanError, match=r"array 'x': .* cannot be stored"):
        write_plan(tmp_path / "a.plan", {}, {"x": np.zeros(2).astype(dtype)}, {})


@pytest.mark.parametrize(
    "header", [{"members": 1}, {"format": 2}, {"x": float("nan")}, {"x": object()}, {1: 2}]
)
def test_writer_refuses_headers(tmp_path: Path, header: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        write_plan(tmp_path / "a.plan", header, {}, {})


def test_nothing_is_left_when_writing_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match=r"cannot write .*: No space left"):
        write_plan(path, {}, {}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(PlanError, match="No such file"):
        write_plan(path.parent / "missing" / "a.plan", {}, {}, {})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing.plan", "No such file")
    assert_refused(tmp_path, "cannot be read")
    for content in (b"", b"P", MAGIC, b"ftrt" + bytes(500), b"\x7fELF" * 100, MAGIC + bytes(200)):
        (tmp_path / "a.plan").write_bytes(content)
        assert_refused(tmp_path / "a.plan")


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    cuts = {*range(0, len(content), 97), *range(len(content) - 300, len(content))}
    for cut in sorted(cuts, reverse=True):
        path.write_bytes(content[:cut])
        assert_refused(path)
    for more in (b"\0", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content + more)
        assert_refused(path)
    path.write_bytes(b"\0" + content)
    assert_refused(path, "not a plan")


def test_every_flipped_byte_is_refused(path: Path) -> None:
    content = path.read_bytes()
    generator = random.Random(0)
    spots = (
        generator.sample(range(len(content)), 1500)
        + list(range(200))
        + list(range(len(content) - 300, len(content)))
    )
    for spot in spots:
        path.write_bytes(
            content[:spot] + bytes([content[spot] ^ 1 << generator.randrange(8)]) + content[spot + 1 :]
        )
        assert_refused(path)


def test_random_damage_never_raises_anything_else(path: Path) -> None:
    content = path.read_bytes()
    generator = random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 6)):
            spot = generator.choice(
                (generator.randrange(len(content)), len(content) - generator.randrange(1, 1500))
            )
            size = generator.choice((1, 2, 4, 8, 60))
            damaged[spot : spot + size] = generator.choice(
                (bytes(size), b"\xff" * size, generator.randbytes(size), b"")
            )
        path.write_bytes(damaged)
        if damaged != content:
            assert_refused(path)


# Hostile plans that are sound as archives: their checksums and directory are right.


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def plant(path: Path, header: Any, **members: bytes) -> Path:
    """A zip in the writer's form with any plan.json and members; `_` in a keyword stands for the dot."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_archive(
        path, {"plan.json": (text,), **{name.replace("_", "."): (data,) for name, data in members.items()}}
    )
    return path


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def listing(**members: str) -> dict[str, Any]:
    return {"format": 1, "members": {name.replace("_", "."): content for name, content in members.items()}}


def test_planted_plan_is_read_when_right(tmp_path: Path) -> None:
    plan = read_plan(plant(tmp_path / "a.plan", listing(x_npy="float32[2,3]"), x_npy=npy(X)))
    np.testing.assert_array_equal(plan.arrays["x"], X)


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ("float32[2,3]", npy(np.asfortranarray(X))),
        ("float32[2,3]", npy(X, version=(2, 0))),
        ("float32[2,3]", npy(X.astype(">f4"))),
        ("float32[2,3]", npy(X.astype(np.int32))),
        ("float32[2,3]", npy(X.T)),
        ("float32[2,3]", npy(X)[:-1]),
        ("float32[2,3]", npy(X) + b"\0"),
        ("float32[2,3]", b""),
        ("float32[2,4]", npy(X)),
        ("float32[6]", npy(X)),
        ("float64[3]", npy(X)),
        ("object[2]", npy(np.array([None, 1]), allow_pickle=True)),
        ("blob[24]", npy(X)),
        ("float32[-2,-3]", npy(X)),
        ("float32[2,03]", npy(X)),
        ("float32[2, 3]", npy(X)),
        ("float32[2,3]\n", npy(X)),
        ("float32", npy(X)),
        ("", npy(X)),
        ("float32[0,99999999999999999,99999999999999999]", npy(X)),
        ("float32[99999999999999999,99999999999999999]", npy(X)),
        ("float32[999999999999999999999999]", npy(X)),
        ("float32[" + "1," * 70 + "6]", npy(X)),
    ],
)
def test_array_that_is_not_as_listed_is_refused(tmp_path: Path, content: str, data: bytes) -> None:
    assert_refused(plant(tmp_path / "a.plan", listing(x_npy=content), x_npy=data), "'x.npy'")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"format": 1, "format": 1, "members": {}}', "a key stands twice"),
        (b'{"format": 1, "x": NaN, "members": {}}', "NaN is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", "nested too deeply"),
        ([], "without a format version"),
        ({"members": {}}, "without a format version"),
        ({"format": 2, "members": {}}, "format version 2, this nmcompile reads 1"),
        ({"format": "1", "members": {}}, "format version 1"),
        ({"format": True, "members": {}}, "format version True"),
        ({"format": [[]], "members": {}}, "format version unknown"),
        ({"format": 1}, "does not list the members"),
        ({"format": 1, "members": []}, "does not list the members"),
        ({"format": 1, "members": {"x.npy": 3}}, "does not list the members"),
        ({"format": 1, "members": {"x.npy": "float32[1]"}}, "lacks the member 'x.npy'"),
        ({"format": 1, "members": {"../x\n.npy": "float32[1]"}}, "lacks the member"),
    ],
)
def test_bad_header_is_refused(tmp_path: Path, header: Any, words: str) -> None:
    assert_refused(plant(tmp_path / "a.plan", header), words, "compile the model again")


def test_header_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    assert_refused(plant(tmp_path / "a.plan", b" " * (MAX_HEADER_BYTES + 1)), "more than")
    with pytest.raises(PlanError, match="a plan may have"):
        write_plan(tmp_path / "b.plan", {"x": " " * MAX_HEADER_BYTES}, {}, {})


def test_member_that_is_unlisted_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    assert_refused(plant(path, listing(), x_npy=npy(X)), "not listed, 'x.npy'")
    assert_refused(plant(path, listing(x_py="blob[4]"), x_py=b"1234"), "unknown content")
    assert_refused(plant(path, listing(x_onnx="blob[2,2]"), x_onnx=b"1234"), "unknown content")
    assert_refused(plant(path, listing(x_onnx="uint8[4]"), x_onnx=b"1234"), "unknown content")
    assert_refused(plant(path, listing(x_onnx="blob[5]"), x_onnx=b"1234"), "size is not that of blob[5]")
    write_archive(
        path, {"x.npy": (npy(X),), "plan.json": (json.dumps(listing(x_npy="float32[2,3]")).encode(),)}
    )
    assert_refused(path, "no plan.json as its first member")


@pytest.mark.parametrize(
    "name", ["../x.npy", "/x.npy", "a/../x.npy", "x\\y.npy", "C:x.npy", "a//x.npy", "x\0.npy", "", "."]
)
def test_path_tricks_are_refused(tmp_path: Path, name: str) -> None:
    text = json.dumps({"format": 1, "members": {name: "float32[2,3]"}}).encode()
    write_archive(tmp_path / "a.plan", {"plan.json": (text,), name: (npy(X),)})
    assert_refused(tmp_path / "a.plan", "cannot name a member")


def forge(
    path: Path, change: Callable[[list[Member]], list[Member]], patch: Callable[[bytes], bytes] = bytes
) -> Path:
    """A plan of two equal arrays whose directory is changed; `patch` edits its bytes in place."""
    data = npy(X)
    text = json.dumps(listing(x_npy="float32[2,3]", y_npy="float32[2,3]")).encode()
    members, body = [], b""
    for name, content in {"plan.json": text, "x.npy": data, "y.npy": data}.items():
        member = Member(name, zlib.crc32(content), len(content), len(body))
        members.append(member)
        body += member.local() + content
    path.write_bytes(body + patch(archive._directory(change(members), len(body))))
    return path


def test_forged_directories_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    read_plan(forge(path, lambda members: members))

    def replaced(index: int, **fields: Any) -> Callable[[list[Member]], list[Member]]:
        def change(members: list[Member]) -> list[Member]:
            member = Member(**{**vars(members[index]), **fields})
            return [*members[:index], member, *members[index + 1 :]]

        return change

    assert_refused(forge(path, lambda members: [*members, members[-1]]), "same name")
    assert_refused(forge(path, lambda members: members[:-1]), "damaged directory")
    assert_refused(
        forge(path, lambda members: [members[0], members[2], members[1]]), "overlap or leave a gap"
    )
    assert_refused(forge(path, lambda members: []), "damaged directory")
    assert_refused(forge(path, replaced(2, offset=192)), "overlap")
    assert_refused(forge(path, replaced(2, offset=2**64 - 1)), "overlap")
    assert_refused(forge(path, replaced(2, size=2**64 - 1)), "too short")
    assert_refused(forge(path, replaced(1, size=8)), "damaged header")
    assert_refused(forge(path, replaced(1, name="z.npy")), "damaged header")
    assert_refused(forge(path, replaced(2, crc=0)), "damaged header")

    def patched(offset: int, value: int) -> Callable[[bytes], bytes]:
        return lambda data: data[:offset] + bytes([value]) + data[offset + 1 :]

    assert_refused(forge(path, list, patched(8, 1)), "encrypted member, 'plan.json'")
    assert_refused(forge(path, list, patched(10, 8)), "compressed member, 'plan.json'")
    assert_refused(forge(path, list, patched(28, 12)), "cannot name a member")
    assert_refused(forge(path, list, patched(30, 99)), "damaged directory entry")
    assert_refused(forge(path, list, patched(32, 1)), "damaged directory")
    assert_refused(forge(path, list, patched(14, 1)), "damaged directory")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_plan_zipped_by_another_program_is_refused(path: Path, method: int) -> None:
    contents = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", method) as other:
        for name, content in contents.items():
            other.writestr(name, content)
    assert_refused(path, "was zipped by another program")


def test_zip_bomb_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("plan.json", b" " * (64 << 20))
    start = time.perf_counter()
    assert_refused(path)
    assert time.perf_counter() - start < 0.1


def test_25_mb_load_in_milliseconds(tmp_path: Path) -> None:
    weights = {f"layer.{index}": np.full((256, 1024), index, np.int8) for index in range(100)}
    write_plan(tmp_path / "a.plan", HEADER, weights, {})

    def seconds() -> float:
        start = time.perf_counter()
        read_plan(tmp_path / "a.plan")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1  # 10 ms measured; the limit allows for a slow zlib


def test_plan_needs_neither_onnx_nor_click() -> None:
    script = "import sys, nmcompile.plan; print({'onnx', 'onnx_graphsurgeon', 'click'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "set()"


def test_close_twice_is_fine(path: Path) -> None:
    plan: Plan = read_plan(path)
    plan.close()
    plan.close()
    with pytest.raises(KeyError):
        plan.blobs("segment.0")
