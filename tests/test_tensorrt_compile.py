"""From a model to an engine, with a fake TensorRT and GPU in a process of their own, and without either."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import MODELS, feeds
from fake_tensorrt import Script, cuda_driver, install

import nmcompile
from nmcompile import graph as g
from nmcompile.backends.tensorrt.build import description_path, read_description
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.backends.tensorrt.shapes import parse_shapes
from nmcompile.errors import InputError, NmcompileError, NoDeviceError, UnsupportedError
from nmcompile.tensorinfo import TensorInfo

MODEL = MODELS / "bert-torchscript.onnx"
INPUTS: dict[str, tuple[str, list[int]]] = {
    name: ("INT64", [-1, -1]) for name in ("input_ids", "attention_mask", "token_type_ids")
}
OUTPUTS: dict[str, tuple[str, list[int]]] = {"last_hidden_state": ("FLOAT", [-1, -1, 64]),
                                             "pooler_output": ("FLOAT", [-1, 64])}  # fmt: skip
SHAPES = "1x8,8x16,8x33"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "c.npz"
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 200, (16, 12))
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1."""
    folder = tmp_path_factory.mktemp("cuda")
    Path(cuda_driver(folder)).rename(folder / "libcuda.so.1")
    return folder


Machine = Callable[..., Mapping[str, str]]


@pytest.fixture
def machine(driver: Path, tmp_path: Path) -> Machine:
    """Environment variables of a machine with a GPU and TensorRT, both fake."""

    def make(**script: Any) -> Mapping[str, str]:
        lib = str(driver / "libcuda.so.1")
        made = Script(**{"inputs": INPUTS, "outputs": OUTPUTS, "cuda": lib, **script})
        places = {"LD_LIBRARY_PATH": str(driver), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return {**install(tmp_path / "site", made), **places}

    return make


def command(*words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Any:
    code = "from nmcompile.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], env=env, cwd=cwd, text=True,
                          capture_output=True, timeout=300)  # fmt: skip


def build(folder: Path, data: Path, *words: object, env: Mapping[str, str] | None = None) -> Any:
    return command(MODEL, "-o", folder / "m.plan", "--target", "tensorrt", "--shapes", SHAPES, "--calibration", data,
                   "--solver", "magnitude", "--preset", "fast", *words, env=env)  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# ---- without a GPU


def test_without_a_gpu_all_that_builds_it_elsewhere_is_written(tmp_path: Path, data: Path) -> None:
    result = build(tmp_path, data, "--trt-version", "8.6", "--report", tmp_path / "r.json")
    assert result.returncode == 3, result.stderr
    assert names(tmp_path) == ["m.dense.onnx", "m.recipe.json", "m.sparse.onnx", "r.json"]
    assert "not built: no CUDA driver" in result.stdout
    assert f"nmcompile build-engine {tmp_path}/m.recipe.json" in result.stdout
    assert "loss      graph in onnxruntime against model" in result.stdout
    recipe = json.loads((tmp_path / "m.recipe.json").read_text())
    assert recipe["models"] == {"sparse": "m.sparse.onnx", "dense": "m.dense.onnx"} and recipe["plan"] == "m.plan"
    assert recipe["version"] == "8.6" and recipe["strong"] is False
    assert recipe["shapes"]["input_ids"] == {"min": [1, 8], "opt": [8, 16], "max": [8, 33]}
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["plan"] is None and report["engine"]["built"] is False and len(report["layers"]) == 13
    for variant in ("sparse", "dense"):
        onnx.checker.check_model(str(tmp_path / f"m.{variant}.onnx"), full_check=True)
    again = command("build-engine", tmp_path / "m.recipe.json")
    assert again.returncode == 3 and again.stderr.startswith("error: no CUDA driver") and again.stderr.count("\n") == 1
    assert names(tmp_path) == ["m.dense.onnx", "m.recipe.json", "m.sparse.onnx", "r.json"]


def test_not_building_is_no_failure(tmp_path: Path, data: Path) -> None:
    result = build(tmp_path, data, "--no-build", "--pattern", "dense")
    assert result.returncode == 0 and names(tmp_path) == ["m.dense.onnx", "m.recipe.json"]
    assert "dense INT8" in result.stdout


def test_a_failure_leaves_nothing(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(graph: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise NmcompileError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(g, "save", full)
    with pytest.raises(NmcompileError, match="No space left"):
        nmcompile.compile(MODEL, tmp_path / "m.plan", target="tensorrt", calibration=data, solver="magnitude",
                          preset="fast", engine=EngineOptions(shapes=(SHAPES,)))  # fmt: skip
    assert names(tmp_path) == []


# ---- with one


@pytest.mark.parametrize("profile", ["8.6", "10", "11"])
def test_the_faster_engine_is_kept_with_its_description(
    profile: str, tmp_path: Path, data: Path, machine: Machine
) -> None:
    env = machine(profile=profile, ms={"sparse": 1.0, "dense": 2.0, "mixed": 1.0})
    result = build(tmp_path, data, "--trt-version", profile, env=env)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == ["m.plan", "m.plan.json"]
    facts = read_description(tmp_path / "m.plan")
    assert facts is not None and facts["profile"] == profile and facts["gpu"]["name"] == "Fake GPU"
    # layers that TensorRT found eligible and ran dense have their weights back
    assert facts["kept"] == "mixed"
    assert json.loads((tmp_path / "m.plan").read_bytes())["variant"] == facts["kept"]
    assert "eligible layers run sparse" in result.stdout and set(facts["loss"]) == {"dense", "sparse", "mixed"}


def test_a_sparse_engine_that_is_not_faster_is_not_kept(tmp_path: Path, data: Path, machine: Machine) -> None:
    result = build(tmp_path, data, "--trt-version", "10", env=machine(ms={"sparse": 2.0, "dense": 2.0}))
    assert result.returncode == 0, result.stderr
    facts = read_description(tmp_path / "m.plan")
    assert facts is not None and facts["kept"] == "dense"
    loss = facts["loss"]["dense"]["last_hidden_state"]
    assert loss["cosine"] > 0.99 > facts["loss"]["sparse"]["last_hidden_state"]["cosine"]
    assert f"{loss['cosine']:.5f}" in result.stdout  # what is reported is what was kept


def test_a_recipe_builds_elsewhere(tmp_path: Path, data: Path, machine: Machine) -> None:
    assert build(tmp_path, data, "--trt-version", "10").returncode == 3
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in names(tmp_path):
        (tmp_path / name).rename(moved / name)
    result = command("build-engine", moved / "m.recipe.json", env=machine(ms={"sparse": 1.0, "dense": 2.0}))
    assert result.returncode == 0, result.stderr
    facts = read_description(moved / "m.plan")
    assert facts is not None and facts["kept"] == "sparse" and facts["layers"] and facts["inputs"][0]["name"]


@pytest.mark.parametrize(
    "script, version, said",
    [
        ({"crash": True}, "10", "error: the builder's process was killed by signal 11"),
        ({"build_errors": ["out of memory"]}, "10", "out of memory"),
        ({"parse_errors": [{"node": 3, "name": "n", "op": "Loop", "text": "no importer"}]}, "10", "no importer"),
        ({"version": "8.6.1", "profile": "8.6"}, "10", "8.6"),
    ],
)  # fmt: skip
def test_what_the_builder_says_is_one_line_and_leaves_nothing(
    script: dict[str, Any], version: str, said: str, tmp_path: Path, data: Path, machine: Machine
) -> None:
    result = build(tmp_path, data, "--trt-version", version, env=machine(**script))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(errors) == 1 and said in errors[0], result.stderr
    assert names(tmp_path) == []


def test_run_inspect_and_compare_take_engines(tmp_path: Path, data: Path, machine: Machine) -> None:
    env = machine(ms={"sparse": 1.0, "dense": 2.0})
    assert build(tmp_path, data, "--trt-version", "10", env=env).returncode == 0
    inputs = tmp_path / "x.npz"
    batch = next(feeds(MODEL, ((2, 9),)))
    np.savez(inputs, **batch)  # type: ignore[arg-type]
    ran = command("run", tmp_path / "m.plan", "--input", inputs, "--output", tmp_path / "y.npz", env=env)
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "y.npz") as found:
        assert found["last_hidden_state"].shape == (2, 9, 64) and (found["last_hidden_state"] == 1).all()
    seen = command("inspect", tmp_path / "m.plan", env=env)
    assert seen.returncode == 0 and "engine for tensorrt" in seen.stdout and "Fake GPU" in seen.stdout, seen.stderr
    compared = command("compare", MODEL, tmp_path / "m.plan", "--data", data, env=env)
    assert compared.returncode == 0 and "last_hidden_state" in compared.stdout, compared.stderr
    timed = command("bench", tmp_path / "m.plan", "--seconds", "0.1", "--shape", "2x8", env=env)
    assert timed.returncode == 0 and "2x8" in timed.stdout, timed.stderr
    lacking = command("run", tmp_path / "m.plan", "--input", inputs)
    assert lacking.returncode == 3 and lacking.stderr.startswith("error: no CUDA driver")
    description_path(tmp_path / "m.plan").unlink()
    alone = command("run", tmp_path / "m.plan", "--input", inputs, env=env)
    assert alone.returncode == 1 and "an engine needs its description" in alone.stderr


# ---- options


INFOS = (TensorInfo("ids", np.dtype(np.int64), ("batch", "tokens")), TensorInfo("pixels", np.dtype(np.float32),
         ("batch", 3, 8, 8)), TensorInfo("fixed", np.dtype(np.int64), (1, 8)))  # fmt: skip


def test_shapes_of_all_inputs_and_of_one() -> None:
    assert parse_shapes(["1x8,2x16,4x32"], INFOS) == {
        "ids": ((1, 8), (2, 16), (4, 32)), "pixels": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}  # fmt: skip
    assert parse_shapes(["1x8,2x16,4x32", "pixels=1,1,1x3x8x8"], INFOS)["pixels"] == ((1, 3, 8, 8),) * 3
    assert parse_shapes([], INFOS[2:]) == {}


@pytest.mark.parametrize(
    "texts, said",
    [
        ([], "input 'ids: int64[batch, tokens]' has free sizes"),
        (["1x8,2x16"], "are not min,opt,max"),
        (["1x8,2x16,axb"], "are not min,opt,max"),
        (["1x0,2x16,3x16"], "are not min,opt,max"),
        (["1,2,3"], "has 1 sizes, input 'ids: int64[batch, tokens]' needs 2"),
        (["2x8,1x16,4x32"], "2x8 is not within 1x16"),
        (["1x8,2x16,4x32", "fixed=1x8,1x8,1x8"], "'fixed' is no input with free sizes; there are ids, pixels"),
        (["1x8,2x16,4x32", "pixels=1x3x8x9,1x3x8x9,1x3x8x9"], "1x3x8x9 does not fit input 'pixels"),
    ],
)
def test_wrong_shapes(texts: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_shapes(texts, INFOS)
    assert said in str(error.value)


@pytest.mark.parametrize("option", [{"version": "9"}, {"outputs": "some"}, {"weights": "int4"}, {"level": 6},
                                    {"workspace": 0}])  # fmt: skip
def test_wrong_options(option: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        EngineOptions(**option)


def test_a_model_that_the_version_cannot_take_is_named(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        graph (float[1,4,4] x) => (float[1] y) { z = Relu(x) y = Det(z) }""")
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.6 will not take the model: error U1, node 'Det.*Det"):
        nmcompile.compile(model, tmp_path / "m.plan", target="tensorrt",
                          calibration=[{"x": np.ones((1, 4, 4), np.float32)}],
                          engine=EngineOptions(version="8.6"))  # fmt: skip
    assert names(tmp_path) == []


def test_no_device_is_told_apart() -> None:
    assert issubclass(NoDeviceError, UnsupportedError)


def test_a_recipe_file_and_a_baseline(tmp_path: Path, data: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'target = "tensorrt"\ntrt-version = "8.6"\nshapes = ["{SHAPES}", "input_ids=1x8,2x16,4x33"]\npreset = "fast"\n'
        f'calibration = "{data}"\nsolver = "magnitude"\nno-build = true\n'
    )
    made = command(MODEL, "-o", tmp_path / "m.plan", "--recipe", recipe)
    assert made.returncode == 0, made.stderr
    shapes = json.loads((tmp_path / "m.recipe.json").read_text())["shapes"]
    assert shapes["input_ids"]["max"] == [4, 33] and shapes["attention_mask"]["max"] == [8, 33]
    for _ in range(2):
        checked = command("check", MODEL, "--recipe", recipe, "--baseline", tmp_path / "baselines")
        assert checked.returncode == 0, checked.stderr
    assert "agrees with" in checked.stdout
    recipe.write_text(recipe.read_text().replace('"8.6"', '"10"'))
    changed = command("check", MODEL, "--recipe", recipe, "--baseline", tmp_path / "baselines")
    assert changed.returncode == 1 and "narrow-floats" in changed.stdout


def test_the_table_of_times(tmp_path: Path, machine: Machine) -> None:
    env = dict(machine(inputs={name: ("INT64", [-1, -1]) for name in INPUTS}, ms={"sparse": 1.0, "dense": 2.0},
                       outputs={"last_hidden_state": ("FLOAT", [-1, -1, 256])}))  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    env["PYTHONPATH"] += f":{root}"
    words = ["-m", "tools.bench_tensorrt", "--model", "bert-mini", "--tokens", 8, "--batch", 2, "--output", tmp_path]
    done = subprocess.run([sys.executable, *map(str, words)], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tensorrt-bert-mini.md").read_text()
    assert "Fake GPU" in text and "| 8 | 2 | 2 | 2 | 1 | 2.00 | 2.00 |" in text and " ! |" in text  # ones are no BERT
    bare = {name: value for name, value in env.items() if name != "LD_LIBRARY_PATH"}
    lacking = subprocess.run([sys.executable, *map(str, words)], env=bare, text=True, capture_output=True, timeout=300)
    assert lacking.returncode == 3 and lacking.stderr.startswith("error: no CUDA driver")
