"""Files of a compile appear together or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import MODELS

import nmcompile
from nmcompile import ir as g
from nmcompile import outputs
from nmcompile.errors import NmcompileError
from nmcompile.outputs import pending, real_path

BERT = MODELS / "bert-torchscript.onnx"


def samples(count: int = 16) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"input_ids": rng.integers(5, 200, rng.integers(4, 20))}


def test_files_move_when_all_are_made(tmp_path: Path) -> None:
    with pending() as files:
        for name in ("a", "b"):
            files.place(tmp_path / name).write_text(name)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
        files.publish()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b"}


def test_what_is_not_published_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), pending() as files:
        files.place(tmp_path / "a").write_text("half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before"}


def test_where_one_cannot_be_moved_all_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NmcompileError, match=r"cannot write .*folder"), pending() as files:
        for name in ("old", "new", "folder"):
            files.place(tmp_path / name).write_text("made")
        files.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old"]
    assert (tmp_path / "old").read_text() == "before"


def test_what_a_killed_compile_left_is_swept_and_a_running_one_is_not(tmp_path: Path) -> None:
    with pending() as running:
        kept = running.folder(tmp_path)
        left = tmp_path / f"{outputs.PREFIX}killed"
        left.mkdir()
        (left / "plan").write_bytes(b"half")
        long_ago = time.time() - 2 * outputs.SETTLED
        for folder in (kept, left):
            os.utime(folder, (long_ago, long_ago))
        with pending() as files:
            files.folder(tmp_path)
            assert kept.exists() and not left.exists()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link.plan").symlink_to(tmp_path / "far" / "real.plan")
    nmcompile.compile(BERT, tmp_path / "link.plan", preset="fast", measure=False)
    assert (tmp_path / "link.plan").is_symlink() and (tmp_path / "far" / "real.plan").is_file()
    assert real_path(tmp_path / "other") == tmp_path / "other"


Step = Callable[[pytest.MonkeyPatch], None]


def fails(where: str, at: int = 1) -> Step:
    """Let the `at`-th call of a function fail."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        count = 0

        def broken(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:
                raise NmcompileError("it fails here")
            return real(*args, **options)

        module, name = where.rsplit(".", 1)
        real = getattr(sys.modules[module], name)
        monkeypatch.setattr(sys.modules[module], name, broken)

    return patch


@pytest.mark.parametrize("where", [
    "nmcompile.compiler.measured_loss", "nmcompile.compiler.look_beyond", "nmcompile.compiler.layer_noise",
    "nmcompile.compiler.coverage", "nmcompile.ir.save", "nmcompile.compiler.keep", "nmcompile.compiler.model_bytes",
])  # fmt: skip
@pytest.mark.parametrize("before", [False, True])
def test_a_compile_that_fails_leaves_no_file(
    where: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"output": tmp_path / "m.plan", "emit_onnx": tmp_path / "q.onnx", "report": tmp_path / "r.json",
            "tuning": tmp_path / "t.json"}  # fmt: skip
    if before:
        for name in ("output", "emit_onnx", "report"):
            made[name].write_text("as it was")
    monkeypatch.setattr("nmcompile.backends.cpu.measure.seconds", lambda cases, **_: [1e-6] * len(list(cases)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    fails(where)(monkeypatch)
    size = "0.45x" if where.endswith("model_bytes") else None
    with pytest.raises(NmcompileError, match="it fails here"):
        nmcompile.compile(BERT, calibration=samples(), preset="fast", size=size, **made)  # type: ignore[arg-type]
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["as it was"] * 3 * before


def test_a_large_graph_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = g.save
    monkeypatch.setattr(g, "save", lambda graph, path: real(graph, path, external=True))
    nmcompile.compile(BERT, None, emit_onnx=tmp_path / "q.onnx", preset="fast")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.onnx", "q.onnx.data"]
    graph = g.load(tmp_path / "q.onnx")
    assert "last_hidden_state" in g.run(graph, g.random_feeds(g.inputs(graph)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report": "m.plan"}, "are the same file"),
        ({"emit_onnx": "m.plan"}, "are the same file"),
        ({"emit_onnx": "x", "report": "x"}, "are the same file"),
        ({"tuning": "m.plan"}, "are the same file"),
        ({"emit_onnx": "q.onnx", "report": "q.onnx.data"}, "where the weights of .*q.onnx go"),
        ({"report": "r" * 256}, "is too long"),
        ({"output": "r" * 252 + ".plan"}, "is too long"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(
    options: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g, "load", lambda _: pytest.fail("the model is read"))
    made = {name: tmp_path / value for name, value in {"output": "m.plan", **options}.items()}
    with pytest.raises(NmcompileError, match=said):
        nmcompile.compile(BERT, **made)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_models_weights_are_not_written_over(tmp_path: Path) -> None:
    g.save(g.load(BERT), tmp_path / "m.onnx", external=True)
    before = (tmp_path / "m.onnx.data").read_bytes()
    with pytest.raises(NmcompileError, match=r"-o and the model's weights m.onnx.data are the same file"):
        nmcompile.compile(tmp_path / "m.onnx", tmp_path / "m.onnx.data", preset="fast")
    assert (tmp_path / "m.onnx.data").read_bytes() == before


def test_names_of_the_longest_length_are_taken(tmp_path: Path) -> None:
    plan, report, qdq = (tmp_path / f"{letter * 250}.plan" for letter in "prq")
    nmcompile.compile(BERT, plan, emit_onnx=qdq, report=report, preset="fast", measure=False)
    assert {path.name for path in tmp_path.iterdir()} == {plan.name, report.name, qdq.name}


def test_two_compiles_of_one_output_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = (f"import nmcompile; nmcompile.compile({str(BERT)!r}, {str(tmp_path / 'm.plan')!r}, preset='fast', "
            f"tuning='off', emit_onnx={str(tmp_path / 'q.onnx')!r}, report={str(tmp_path / 'r.json')!r})")  # fmt: skip
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.plan", "q.onnx", "r.json"]
    nmcompile.load(tmp_path / "m.plan")
