"""What else a stranger may hand to a session: files that are none, odd types and shapes, a plan that changes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from compiled import compiled
from small_plans import ENTER, FEATURES, LEAVE, header, native, refused

import nmcompile
from nmcompile.archive import write_archive
from nmcompile.cli import cli
from nmcompile.errors import InputError, NmcompileError, PlanError
from nmcompile.plan import read_plan, write_plan
from nmcompile.session import is_plan, load_cpu


def test_files_that_are_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.plan"
    os.mkfifo(pipe)
    other = tmp_path / "engine.plan"
    other.write_bytes(b"ftrt")
    os.mkfifo(tmp_path / "engine.plan.json")
    assert not is_plan(other)
    with pytest.raises(PlanError, match="is not a plan"):
        nmcompile.load(other)
    for path, said in ((pipe, "it is a pipe, not a file"), (Path("/dev/zero"), "it is a device"),
                       (tmp_path, "it is a folder"), (Path("a\0b"), "No such file")):  # fmt: skip
        for reader in (nmcompile.load, is_plan):
            with pytest.raises(NmcompileError, match=said):
                reader(path)
    with pytest.raises(PlanError, match="it is a pipe"):
        read_plan(pipe)


@pytest.mark.parametrize("threads", ["4", 2.5, True, [], 1.0])
def test_threads_that_are_no_number(threads: Any) -> None:
    with pytest.raises(InputError, match=r"threads=.* is not between 1 and 1024"):
        nmcompile.load(compiled("bert-torchscript").plan, threads=threads)


@pytest.mark.parametrize("isa", [5, b"avx2", ["avx2"], "mmx", "\ud800", "avx2\0"])
def test_kernels_that_there_are_not(isa: Any) -> None:
    with pytest.raises(NmcompileError) as caught:
        nmcompile.load(compiled("bert-torchscript").plan, isa=isa)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "dtype", ["m8[s/0]", "(", "f4,(", "V-1", "O", "float128", "f4", ["f4", -1], {"a": 1}, None, True, 5, ">i4"]
)
def test_types_go_by_our_own_names_alone(tmp_path: Path, dtype: Any) -> None:
    segment = native([[4, "f32", "tokens"]], [ENTER, LEAVE])
    said = "input 'x': the type .* is unknown"
    refused(tmp_path / "a.plan", header(segment, takes={**FEATURES, "dtype": dtype}), said)


@pytest.mark.parametrize("layers", [None, 3, ["a"], [{}], {"name": 1}])
def test_layers_are_named_objects(tmp_path: Path, layers: Any) -> None:
    segment = native([[4, "f32", "tokens"]], [ENTER, LEAVE])
    refused(tmp_path / "a.plan", header(segment, layers=layers), "list of layers is damaged")


@pytest.mark.parametrize("change", [{"outputs": "x"}, {"layers": [{"name": 1, "pattern": None}]}, {"passes": 3},
                                    {"segments": [5]}, {"inputs": [{"name": "x"}]}])  # fmt: skip
def test_inspect_says_in_one_line_that_a_header_makes_no_sense(tmp_path: Path, change: dict[str, Any]) -> None:
    content = header(native([[4, "f32", "tokens"]], [ENTER, LEAVE]), layers=[])
    write_plan(tmp_path / "a.plan", {**content, **change}, {}, {})
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.plan")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the description in ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("shape", [[-1, 2], [2.5], [True], ["x" * 2000], [[1]], "ab", None, 3, [1 << 64], ["a\nb"]])
def test_shapes_are_sizes_and_names(tmp_path: Path, shape: Any) -> None:
    segment = native([[4, "f32", "tokens"]], [ENTER, LEAVE])
    refused(tmp_path / "a.plan", header(segment, takes={**FEATURES, "shape": shape}), "the shape is no list")


@pytest.mark.parametrize("depth", [80, 500, 200_000])
def test_nested_headers(tmp_path: Path, depth: int) -> None:
    text: Any = json.loads("[" * 20 + "]" * 20)
    segment = native([[4, "f32", "tokens"]], [ENTER, {**LEAVE, "junk": text}])
    refused(tmp_path / "a.plan", header(segment), "does not fit together")
    content = {"format": 1, **header(segment), "members": {}}
    deep = json.dumps({**content, "junk": "@"}).replace('"@"', "[" * depth + "]" * depth)
    write_archive(tmp_path / "a.plan", {"plan.json": (deep.encode(),)})
    with pytest.raises(PlanError, match="nested too deeply"):
        nmcompile.load(tmp_path / "a.plan")
    flat = json.dumps({**content, "junk": "[" * 100 + '\\"{' * 100})  # brackets inside of texts nest nothing
    write_archive(tmp_path / "a.plan", {"plan.json": (flat.encode(),)})
    with pytest.raises(PlanError, match="does not fit together"):
        nmcompile.load(tmp_path / "a.plan")


# ---- a file that changes -----------------------------------------------------------------------------------------

ONE = {"x": np.ones((1, 2, 4), np.float32)}


def doubling(factor: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    affine = {"step": "affine", "x": 0, "y": 0, "mul": {"array": "m"}, "add": None}
    return header(native([[4, "f32", "tokens"]], [ENTER, affine, LEAVE])), {"m": np.full(4, factor, np.float32)}


@pytest.mark.parametrize("cut", [False, True])
def test_a_plan_that_is_written_over_is_an_error_and_a_copy_is_not(tmp_path: Path, cut: bool) -> None:
    path, other = tmp_path / "a.plan", tmp_path / "b.plan"
    write_plan(path, *doubling(2), {})
    write_plan(other, *doubling(3), {})
    mapped, copied = load_cpu(path), load_cpu(path, copy=True)
    assert mapped.run(ONE)["y"].max() == 2
    time.sleep(0.02)  # a clock tick of the file system
    if cut:
        os.truncate(path, 10)
    else:
        path.write_bytes(other.read_bytes())
    for method in (mapped.run, mapped.profile, mapped.trace):
        with pytest.raises(PlanError, match=r"a\.plan: the plan file changed on disk; load it again"):
            method(ONE)
    assert copied.run(ONE)["y"].max() == 2


def test_a_plan_that_is_replaced_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    write_plan(path, *doubling(2), {})
    session = load_cpu(path)
    write_plan(path, *doubling(3), {})
    assert session.run(ONE)["y"].max() == 2
    path.unlink()
    assert session.run(ONE)["y"].max() == 2


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    write_plan(tmp_path / "a.plan", *doubling(2), {})
    (tmp_path / "bad.plan").write_bytes((tmp_path / "a.plan").read_bytes()[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        load_cpu(tmp_path / "a.plan").run(ONE)
        read_plan(tmp_path / "a.plan").close()
        with pytest.raises(PlanError):
            read_plan(tmp_path / "bad.plan")
    assert len(os.listdir("/proc/self/fd")) <= before + 1
