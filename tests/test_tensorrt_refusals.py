"""What the TensorRT worker refuses: one line that names the thing and the remedy, and no file left."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Script, load
from tensorrt_work import SHAPES, Work, left, write_recipe

from nmcompile.backends.tensorrt import cuda_driver, worker

PROFILES = ["8.6", "10", "11"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"format": 2}, ["format 2", "0.1.0"]), ({"version": ...}, ["no 'version'"]), ({"strong": 1}, ["'strong'", "bool"]),
    ({"plan": None}, ["no 'plan'"]), ({"version": "9"}, ["'9'", "8.6, 10, 11"]), ({"models": {}}, ["nothing"]),
    ({"models": {"sparse": "m.sparse.onnx", "thin": "x"}}, ["thin"]), ({"repeats": 0}, ["'repeats' is 0"]),
    ({"shapes": {"x": {"min": [2], "opt": [1], "max": [3]}}}, ["'x'", "--shapes"]),
    ({"shapes": {"x": {"min": [2], "opt": [2, 2], "max": [3]}}}, ["'x'", "--shapes"]),
    ({"shapes": {"x": [1]}}, ["'x'", "--shapes"]), ({"inputs": {"x": {"fill": "a"}}}, ["'x'", "fill"]),
    ({"level": True}, ["'level'", "int"]),
])  # fmt: skip
def test_wrong_recipes(changes: dict[str, Any], words: list[str], work: Callable[..., Work], tmp_path: Path) -> None:
    text = work(Script(), **changes).error("recipe")
    assert all(word in text for word in ["m.recipe.json", "anew", *words]), text
    assert left(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", "1", '"\\ud800"'])
def test_what_is_no_recipe(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(cuda_driver.Failure, match=r"r\.json.*nmcompile"):
        worker.read_recipe(path)


def test_missing_files(work: Callable[..., Work], tmp_path: Path) -> None:
    assert "gone.onnx" in work(Script(), models={"sparse": "gone.onnx"}).error("io")
    assert "make its folder" in work(Script(), plan="no/m.plan").error("io")
    with pytest.raises(cuda_driver.Failure, match=r"cannot read .*gone\.json: No such file"):
        worker.read_recipe(tmp_path / "gone.json")


@pytest.mark.parametrize(("profile", "found", "words"), [
    ("8.6", "10.16.1", ["TensorRT 8.6,", "10.16.1", "--trt-version 10", "--trt-python"]),
    ("10", "8.6.0", ["--trt-version 8.6"]), ("11", "10.3.0", ["--trt-version 10"]), ("8.6", "8.5.3", ["--trt-python"]),
    ("11", "12.0.1", ["12.0.1"]),
])  # fmt: skip
def test_graphs_for_another_version(profile: str, found: str, words: list[str], work: Callable[..., Work]) -> None:
    text = work(Script(version=found), version=profile).error("version")
    assert all(word in text for word in words), text


def test_shapes_that_do_not_fit(work: Callable[..., Work]) -> None:
    text = work(Script(), shapes=None).error("recipe")
    assert "input 'x'" in text and "--shapes" in text
    wrong = {"x": {"min": [1, 5], "opt": [8, 5], "max": [32, 5]}}
    assert "[1, 5] does not fit input 'x' of shape [-1, 4]" in work(Script(), shapes=wrong).error("recipe")
    text = work(Script(), shapes={**SHAPES, "mask": SHAPES["x"]}).error("recipe")
    assert "no input 'mask'" in text and "the model has x" in text


@pytest.mark.parametrize("profile", PROFILES)
def test_all_parser_errors_are_told(profile: str, work: Callable[..., Work], tmp_path: Path) -> None:
    errors = [{"node": i, "name": f"/n{i}", "op": "Einsum", "text": f"reason {i}\nmore"} for i in range(7)]
    text = work(Script(profile=profile, parse_errors=errors), strong=profile != "8.6").error("parse")
    assert f"TensorRT {load(Script(profile=profile)).__version__} cannot read" in text and "m.sparse.onnx" in text
    assert ("node 4: reason 4" if profile == "8.6" else "node '/n4' (Einsum): reason 4 more; and 2 more") in text
    assert "reason 5" not in text and "--trt-version" in text and left(tmp_path) == []


def test_a_failed_build_gives_the_last_errors(work: Callable[..., Work], tmp_path: Path) -> None:
    text = work(Script(build_errors=[f"Error Code {i}: no tactic" for i in range(6)])).error("build")
    assert "sparse engine: Error Code 3" in text and "Error Code 5" in text and "Error Code 2" not in text
    assert left(tmp_path) == []


def test_engines_that_do_not_load_or_run(work: Callable[..., Work], tmp_path: Path, driver: str) -> None:
    assert "not compatible" in work(Script(loads=False)).error("build")
    assert "does not run" in work(Script(runs=False)).error("build")
    assert left(tmp_path) == []


def test_a_type_that_cannot_be_filled(work: Callable[..., Work]) -> None:
    assert "type FP8 for tensor 'x'" in work(Script(inputs={"x": ("FP8", [2])}), shapes=None).error("recipe")
    text = work(Script(inputs={"x": ("INT8", [2])}), shapes=None, inputs={"x": {"fill": 300}}).error("recipe")
    assert "no value 300 of type INT8 for tensor 'x'" in text


def test_memory_of_the_gpu_runs_out(work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2=2")
    text = work(Script()).error("build")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in text and "smaller shapes" in text and left(tmp_path) == []


def test_a_full_disk(work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: Path, mode: str) -> Full:
        path.write_bytes(b"half")
        return Full()

    monkeypatch.setattr(worker, "open", open_full, raising=False)
    text = work(Script()).error("io")
    assert f"cannot write {tmp_path / 'm.plan'}: No space left" in text and "-o" in text and left(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", load(Script(cuda=driver)))

    def say(line: dict[str, Any]) -> None:
        if line["progress"][0] == "timing":
            assert len(left(tmp_path)) == 2, "both engines lie there, under names that are not the plan's"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.main([str(write_recipe(tmp_path)), "--cuda", driver], say, worker.Files())
    assert left(tmp_path) == []


def test_a_plan_that_was_there_survives_a_failure(work: Callable[..., Work], tmp_path: Path) -> None:
    (tmp_path / "m.plan").write_bytes(b"older")
    work(Script(runs=False)).error("build")
    assert (tmp_path / "m.plan").read_bytes() == b"older"


def test_what_went_wrong_unexpectedly_is_one_line_too(
    work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "fastest", lambda medians: 1 / 0)
    assert "ZeroDivisionError" in work(Script()).error("build")
    assert "Traceback" in capfd.readouterr().err
