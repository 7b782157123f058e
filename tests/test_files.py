"""Files are written whole or not at all, by any number of writers, and what killed ones leave is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nmcompile import files
from nmcompile.errors import GraphError, NmcompileError, PlanError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def killed_while_writing(path: Path) -> list[str]:
    """Names that a writer killed in the midst of its work leaves."""
    code = "import sys, os, signal; from pathlib import Path; from nmcompile.files import replacing\n" \
           "with replacing(Path(sys.argv[1])) as partial:\n" \
           "    partial.write_bytes(bytes(1000)); os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -signal.SIGKILL
    return [name for name in names(path.parent) if name.endswith(".partial")]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "one")
    files.write(path, "two\u00e4")
    assert path.read_bytes() == "two\u00e4".encode() and names(tmp_path) == ["a.txt"]
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "two\u00e4" and names(tmp_path) == ["a.txt"]


def test_threads_of_one_process_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    path, wrong = tmp_path / "cache.json", []
    contents = {f"{letter * 200_000}" for letter in "abc"}

    def work(content: str) -> None:
        for _ in range(40):
            try:
                files.write(path, content)
                if path.read_text() not in contents:
                    wrong.append("torn")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and names(tmp_path) == ["cache.json"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.plan"
    assert len(killed_while_writing(path)) == 1
    with files.replacing(path) as partial:
        assert [name for name in names(tmp_path) if name.endswith(".partial")] == []
        partial.write_text("whole")
    assert names(tmp_path) == ["m.plan"]


def test_partial_files_of_living_writers_of_others_and_of_other_names_stay(tmp_path: Path) -> None:
    path, other = tmp_path / "m.plan", tmp_path / "m.plan.json"
    (left,) = killed_while_writing(other)
    place, rest = left.split(".")[-2].split("-", 1)
    elsewhere = tmp_path / f".m.plan.{'0' * 8 if place != '0' * 8 else '1' * 8}-{rest}.partial"
    elsewhere.write_bytes(b"another machine writes this")
    living = tmp_path / f".m.plan.{place}-{os.getpid()}-00000000.partial"
    living.write_bytes(b"so do we")
    alike = tmp_path / ".m.plan.partial"
    alike.write_bytes(b"not ours")
    files.write(path, "x")
    assert names(tmp_path) == sorted([left, elsewhere.name, living.name, alike.name, "m.plan"])
    old = time.time() - files.STALE - 60
    os.utime(elsewhere, (old, old))
    os.utime(living, (old, old))
    files.write(path, "x")
    assert names(tmp_path) == sorted([left, living.name, alike.name, "m.plan"])


def test_what_a_symbolic_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for there in (True, False):
        target, link = tmp_path / "real" / f"{there}.plan", tmp_path / f"{there}.link"
        if there:
            target.write_text("old")
        link.symlink_to(target)
        files.write(link, "new")
        assert link.is_symlink() and target.read_text() == "new"
    assert names(tmp_path / "real") == ["False.plan", "True.plan"]


def test_names_as_long_as_the_system_takes_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00e4" * 127, "n" * 245 + ".plan"):
        files.check_outputs({"the plan": tmp_path / name})
        files.write(tmp_path / name, "x")
        assert names(tmp_path) == [name] and killed_while_writing(tmp_path / name)
        files.write(tmp_path / name, "x")
        assert names(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_what_cannot_be_written_is_one_line_of_the_kind_asked_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    before = names(tmp_path)
    for name in ("missing/a", "folder", "fifo", "n" * 256, "a"):
        for kind in (PlanError, GraphError):
            with pytest.raises(kind) as caught, files.replacing(tmp_path / name, kind) as partial:
                partial.write_text("x")
            assert str(caught.value).startswith(f"cannot write {tmp_path / name}: ") and "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_outputs_that_are_one_file_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    plan = tmp_path / "m.plan"
    plan.write_text("x")
    (tmp_path / "link").symlink_to(plan)
    os.link(plan, tmp_path / "second")
    same = [plan, tmp_path / "sub" / ".." / "m.plan", tmp_path / "link", tmp_path / "second",
            Path(os.path.relpath(plan))]  # fmt: skip
    for other in same:
        with pytest.raises(NmcompileError, match="--report and the plan are the same file"):
            files.check_outputs({"the plan": plan, "--report": other})
        with pytest.raises(NmcompileError, match="--report and the model are the same file"):
            files.check_outputs({"--report": other}, {"the model": plan})
    files.check_outputs({"the plan": plan, "--report": tmp_path / "sub" / "m.plan"}, {"the model": tmp_path / "m.onnx"})


def test_outputs_that_could_not_be_written_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("x")
    wrong = {"x" * 256: "256 bytes is too long", "\u00e4" * 128: "256 bytes is too long", ".": "is a folder",
             "fifo": "not a regular file", "circle": "not a regular file", "no/m.plan": "there is no folder",
             "file/m.plan": "folder|directory", "a\0b": "NUL", "/dev/null": "not a regular file"}  # fmt: skip
    for name, why in wrong.items():
        with pytest.raises(NmcompileError, match=why) as caught:
            files.check_outputs({"the plan": tmp_path / name})
        assert str(caught.value).startswith("the plan: ") and "\n" not in str(caught.value)
    assert names(tmp_path) == ["circle", "fifo", "file"]
