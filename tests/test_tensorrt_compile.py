"""From a model to an engine, with a fake TensorRT and GPU in a process of their own, and without either."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import MODELS, feeds, held_of
from fake_tensorrt import Script, cuda_driver, install

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.tensorrt.build import description_path, read_description
from nmcompile.backends.tensorrt.engine import _idle
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.backends.tensorrt.shapes import parse_shapes
from nmcompile.errors import InputError, NmcompileError, NoDeviceError, PlanError, UnsupportedError
from nmcompile.passes import NMPrune
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes
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
    # layers that TensorRT found eligible and ran dense have their weights back; all are timed in one run
    assert facts["kept"] == "mixed" and set(facts["variants"]) == {"sparse", "mixed", "dense"}
    assert json.loads((tmp_path / "m.plan").read_bytes())["variant"] == facts["kept"]
    assert "eligible layers run sparse" in result.stdout
    shares = {layer["name"]: layer["pattern"] for layer in facts["layers"]}
    assert set(shares.values()) == {True, False}  # of the variant that was kept
    fourths = [shares[f"/encoder/layer.0/attention/self/{name}/MatMul"] for name in ("query", "key", "value")]
    assert len(set(fourths)) == 1  # they run as one product: all go back or none


def test_a_sparse_engine_that_is_not_faster_is_not_kept(tmp_path: Path, data: Path, machine: Machine) -> None:
    result = build(tmp_path, data, "--trt-version", "10", env=machine(ms={"sparse": 2.0, "dense": 2.0}))
    assert result.returncode == 0, result.stderr
    facts = read_description(tmp_path / "m.plan")
    assert facts is not None and facts["kept"] == "dense"
    loss = facts["loss"]["last_hidden_state"]
    assert loss["cosine"] > 0.99 > facts["variants"]["sparse"]["loss"]["last_hidden_state"]["cosine"]
    assert not any(layer["pattern"] for layer in facts["layers"])
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
    ],
)  # fmt: skip
def test_what_the_builder_says_is_one_line_and_the_graphs_are_kept(
    script: dict[str, Any], version: str, said: str, tmp_path: Path, data: Path, machine: Machine
) -> None:
    result = build(tmp_path, data, "--trt-version", version, env=machine(**script))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(errors) == 1 and said in errors[0], result.stderr
    assert f"the graphs are kept: nmcompile build-engine {tmp_path}/m.recipe.json" in errors[0]
    assert names(tmp_path) == ["m.dense.onnx", "m.recipe.json", "m.sparse.onnx"]


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


# ---- files that are there already


@pytest.mark.parametrize("name", ["m.dense.onnx", "m.sparse.onnx", "m.mixed.onnx", "m.recipe.json", "m.plan.json"])
@pytest.mark.parametrize("option", ["model", "report", "emit_onnx"])
def test_no_other_file_is_where_one_will_be_written(name: str, option: str, tmp_path: Path, data: Path) -> None:
    model = MODEL
    options: dict[str, Any] = {}
    if option == "model":
        model = tmp_path / name
        model.write_bytes(MODEL.read_bytes())
    else:
        options[option] = tmp_path / name
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NmcompileError, match=f"{name} is written beside .*m.plan; give another name"):
        nmcompile.compile(model, tmp_path / "m.plan", target="tensorrt", calibration=data,
                          engine=EngineOptions(shapes=(SHAPES,)), **options)  # fmt: skip
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failure_leaves_what_was_there(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(tmp_path, data, "--no-build").returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    real, count = g.save, 0

    def full(graph: object, path: Path) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise NmcompileError(f"cannot write {path}: No space left on device")
        real(graph, path)

    monkeypatch.setattr(g, "save", full)
    with pytest.raises(NmcompileError, match="No space left"):
        nmcompile.compile(MODEL, tmp_path / "m.plan", target="tensorrt", calibration=data, solver="magnitude",
                          preset="fast", engine=EngineOptions(version="8.6", shapes=(SHAPES,)))  # fmt: skip
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_recipe_knows_its_graphs(tmp_path: Path, data: Path) -> None:
    assert build(tmp_path, data, "--no-build").returncode == 0
    other = command("build-engine", tmp_path / "m.recipe.json", "-o", tmp_path / "m.sparse.onnx")
    assert other.returncode == 1 and "would overwrite" in other.stderr
    (tmp_path / "m.dense.onnx").write_bytes(b"another")
    changed = command("build-engine", tmp_path / "m.recipe.json")
    assert changed.returncode == 1 and "is not the graph that the recipe" in changed.stderr
    (tmp_path / "m.dense.onnx").unlink()
    gone = command("build-engine", tmp_path / "m.recipe.json")
    assert gone.returncode == 1 and "there is no " in gone.stderr and gone.stderr.count("\n") == 1
    (tmp_path / "m.recipe.json").write_text("[1]")
    assert "is not a recipe of nmcompile" in command("build-engine", tmp_path / "m.recipe.json").stderr


@pytest.mark.parametrize("change", [
    {"gpu": None}, {"gpu": {"name": "x"}}, {"shapes": {"input_ids": {"opt": [1, 2]}}}, {"shapes": {"other": {
        "min": [1], "opt": [1], "max": [1]}}}, {"layers": [{"name": "x"}]}, {"inputs": 3}, {"variants": []},
])  # fmt: skip
def test_a_damaged_description_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    content = {
        "target": "tensorrt", "tensorrt": "10.1.0", "kept": "dense", "variants": {}, "outputs": [], "layers": [],
        "gpu": {"name": "x", "sm": [8, 0]}, "shapes": None,
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["b", "s"]}],
    }  # fmt: skip
    plan = tmp_path / "m.plan"
    plan.write_bytes(b"engine")
    description_path(plan).write_text(json.dumps(content))
    assert read_description(plan) is not None
    description_path(plan).write_text(json.dumps({**content, **change}))
    with pytest.raises(PlanError, match=r"m.plan.json is damaged; build the engine again"):
        nmcompile.load(plan)


# ---- models of other kinds


def test_a_model_that_came_with_its_zeros_is_built_sparse_too(tmp_path: Path, data: Path, machine: Machine) -> None:
    pruned, _ = Pipeline([*canonical_passes(), NMPrune(multiple=32)]).run(g.load(MODEL))
    model = tmp_path / "pruned" / "m.onnx"
    model.parent.mkdir()
    g.save(pruned, model)
    folder = tmp_path / "out"
    folder.mkdir()
    env = machine(ms={"sparse": 1.0, "dense": 2.0}, record=str(tmp_path / "calls"))
    result = command(model, "-o", folder / "m.plan", "--target", "tensorrt", "--shapes", SHAPES, "--calibration", data,
                     "--pattern", "dense", "--preset", "fast", env=env)  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts = read_description(folder / "m.plan")
    assert facts is not None and set(facts["variants"]) == {"sparse", "dense"}
    assert "SPARSE_WEIGHTS" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("name", ["bert-torchscript", "vit-dynamo", "gpt2-dynamo"])
def test_models_of_fixed_sizes(name: str, tmp_path: Path) -> None:
    model = onnx.load(str(MODELS / f"{name}.onnx"))
    for item in model.graph.input:
        for axis, size in zip(item.type.tensor_type.shape.dim, (2, 8), strict=False):
            if not axis.dim_value:
                axis.dim_value = size
    infos = g.inputs(g.load(model))
    samples = [g.random_feeds(infos, seed) for seed in range(4)]
    result = nmcompile.compile(model, tmp_path / "m.plan", target="tensorrt", calibration=samples, solver="magnitude",
                               engine=EngineOptions(version="8.6", build=False))  # fmt: skip
    assert result.engine is not None and (tmp_path / "m.recipe.json").exists()
    assert json.loads((tmp_path / "m.recipe.json").read_text())["shapes"] is None


def test_what_goes_back_goes_with_its_neighbours(tmp_path: Path, data: Path) -> None:
    """Query, key and value run as one product, also where an accuracy limit takes layers back."""
    result = nmcompile.compile(MODEL, tmp_path / "m.plan", target="tensorrt", calibration=data, solver="magnitude",
                               preset="fast", max_drop="cosine=0.1",
                               engine=EngineOptions(version="10", shapes=(SHAPES,), build=False))  # fmt: skip
    assert 0 < len(held_of(result).dense) < 12 and not any("S4" in finding for finding in result.findings)
    excluded = nmcompile.compile(MODEL, None, target="tensorrt", calibration=data, preset="fast",
                                 passes="n-m-prune(exclude=*query*, multiple=32)", emit_onnx=tmp_path / "e.onnx")
    assert not any("S4" in finding for finding in excluded.findings) and excluded.findings


def test_names_that_are_the_beginning_of_others() -> None:
    found = {"variants": {"sparse": {"eligible": ["linear_10 + add", "linear_1 + add"], "chosen": ["linear_10 + add"]}}}
    assert _idle(found, ["linear_1", "linear_10", "linear_100"]) == ["linear_1"]


@pytest.mark.parametrize("options, said", [
    ({"target": "tensorrt", "pattern": "2x4"}, "TensorRT runs 2:4 zeros only, not 2x4"),
    ({"target": "tensorrt", "size": "0.3x"}, "TensorRT runs 2:4 zeros only, not size 0.3x"),
    ({"target": "tensorrt", "sparsity": 0.8}, "always has 0.5 zeros"),
    ({"engine": EngineOptions()}, "options of an engine are for target tensorrt"),
])  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, Any], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(NmcompileError, match=said):
        nmcompile.compile(MODEL, None, calibration=data, emit_onnx=tmp_path / "x.onnx", **options)


def test_terminated_while_building(tmp_path: Path, data: Path, machine: Machine) -> None:
    env = machine(sleep=60.0, record=str(tmp_path / "calls"))
    words = [MODEL, "-o", tmp_path / "m.plan", "--target", "tensorrt", "--shapes", SHAPES, "--calibration", data,
             "--solver", "magnitude", "--preset", "fast"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", "from nmcompile.cli import main; main()", *map(str, words)],
                               env=env, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and "build_serialized_network" not in _read(tmp_path / "calls"):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert {path.name for path in tmp_path.iterdir()} <= {"calls", "cache", "site"}


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


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
