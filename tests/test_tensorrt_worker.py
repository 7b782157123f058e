"""The worker against a fake TensorRT and a fake CUDA driver: what it builds, keeps, says and refuses."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Script, install
from tensorrt_names import DATA
from tensorrt_work import Work, left, write_recipe

from nmcompile.backends.tensorrt import worker

PROFILES = ["8.6", "10", "11"]
WORKER = Path(worker.__file__)


# ---- what logs and inspectors say


def test_sparsity_of_8_6() -> None:
    query = "/encoder/layer.0/attention/self/query"
    up = "/encoder/layer.0/intermediate"
    fused = f"{up}/dense/MatMul + PWN(PWN({up}/Erf), {up}/Mul)"
    assert worker.sparsity_lines((DATA / "made_log_8.6.txt").read_text().splitlines()) == {
        "eligible": [
            f"{query}/MatMul + {query}/Add",
            fused,
            "{ForeignNode[/encoder/layer.0/output/LayerNorm.../encoder/layer.1/output/dense/MatMul]}",
        ],
        "chosen": [fused],
    }


def test_sparsity_of_10_is_the_union_of_all_pairs() -> None:
    found = worker.sparsity_lines((DATA / "made_log_10.txt").read_text().splitlines())
    output = "/encoder/layer.0/output/dense/MatMul_myl1_5"  # eligible in two pairs, chosen in the last
    up = [f"/encoder/layer.{layer}/intermediate/dense/MatMul_myl1_{at}" for layer, at in ((0, 2), (1, 9))]
    assert len(found["eligible"]) == 5 and found["eligible"].count(output) == 1
    assert (
        "/encoder/layer.0/attention/output/dense/MatMul + /encoder/layer.0/attention/output/Add[fused]_myl0_7"
        in (found["eligible"])
    )
    assert found["chosen"] == [*up, output]


@pytest.mark.parametrize("line", ["", "(Sparsity) ", "(Sparsity) Found 0 layer(s) eligible to use sparse tactics: ",
                                  "(Sparsity) Chose 0 layer(s) using sparse tactics", "layers: a, b",
                                  "(Sparsity) Layers eligible for sparse math: "])  # fmt: skip
def test_lines_that_name_no_layer(line: str) -> None:
    assert worker.sparsity_lines([line]) == {"eligible": [], "chosen": []}


def test_layers_of_8_6_and_10() -> None:
    gather, up, down, copy, pooler = worker.layers_of((DATA / "made_inspector_8.6.json").read_text())
    assert gather["type"] == "Gather" and gather["tactic"] == "0x0000000000000000" and gather["sparse"] is None
    assert gather["inputs"] == [{"name": "input_ids", "dtype": "int32", "shape": [8, 128]}]
    assert gather["outputs"][0]["dtype"] == "float32"
    assert up["sparse"] is True and up["name"] == "/encoder/layer.0/intermediate/dense/MatMul"
    assert up["outputs"] == [{"name": "h0", "dtype": "int8", "shape": [8, 256, 128, 1]}]
    assert down["sparse"] is False, "marked HasSparseWeights, but its tactic is a dense one"
    assert copy["outputs"][0]["dtype"] is None and copy["inputs"][0]["dtype"] == "float16"
    assert pooler["sparse"] is False and pooler["inputs"] == []


def test_layers_of_11() -> None:
    gather, up, down, move = worker.layers_of((DATA / "made_inspector_11.json").read_text())
    assert gather["inputs"] == [{"name": "input_ids", "dtype": "int64", "shape": [8, 128]}]
    assert [layer["sparse"] for layer in (gather, up, down, move)] == [False, True, False, None]
    assert up["tactic"].startswith("sm90_xmma_sparse_gemm_i8i8") and up["type"] == "gemm"
    assert move["tactic"] is None
    assert [move["inputs"][0]["dtype"], move["outputs"][0]["dtype"]] == ["bfloat16", "float32"]


def test_layers_that_are_names_only() -> None:
    layers = worker.layers_of((DATA / "made_inspector_names_only.json").read_text())
    assert layers[1] == {
        "name": "/encoder/layer.0/intermediate/dense/MatMul + /encoder/Add", "type": None, "tactic": None,
        "sparse": None, "inputs": [], "outputs": [],
    }  # fmt: skip


# ---- which engine is kept


@pytest.mark.parametrize(("medians", "kept"), [
    ({"sparse": 1.0}, "sparse"), ({"dense": 1.0}, "dense"), ({"sparse": 0.98, "dense": 1.0}, "sparse"),
    ({"sparse": 0.99, "dense": 1.0}, "dense"), ({"sparse": 1.2, "dense": 1.0}, "dense"),
    ({"sparse": 0.9, "mixed": 0.8, "dense": 1.0}, "mixed"), ({"sparse": 0.9, "mixed": 0.9}, "mixed"),
    ({"sparse": 0.8, "mixed": 0.9, "dense": 1.0}, "sparse"), ({"sparse": 0.895, "mixed": 0.9, "dense": 1.0}, "mixed"),
])  # fmt: skip
def test_the_most_exact_is_kept_unless_clearly_beaten(medians: dict[str, float], kept: str) -> None:
    assert worker.fastest(medians) == kept


def test_rounds_take_turns() -> None:
    order: list[str] = []

    class Quick:
        def __init__(self, name: str) -> None:
            self.enqueue = lambda: order.append(name)

    class Clock:
        ticks = iter(range(1000))

        def event(self) -> int:
            return 0

        def record(self, event: int, stream: int) -> None: ...

        def elapsed_ms(self, start: int, end: int) -> float:
            return float(next(self.ticks))

    runs: Any = {"a": Quick("a"), "b": Quick("b")}
    clock: Any = Clock()
    found = worker.time_in_turns(runs, clock, 0, 11)
    assert "".join(order) == "abba" * 10 + "ab"
    first = 2 * worker.WARM_UP
    assert found["a"]["median"] == pytest.approx(first + 10.5, abs=1) and found["b"]["p10"] < found["b"]["p90"]
    assert found["a"]["p10"] == first + 3 and found["a"]["p90"] == first + 19


# ---- builds


@pytest.mark.parametrize("profile", PROFILES)
def test_the_faster_engine_takes_the_place_of_the_plan(
    profile: str, work: Callable[..., Work], tmp_path: Path, driver: str
) -> None:
    done = work(Script(profile=profile, ms={"sparse": 1.0, "dense": 2.0}), strong=profile != "8.6")
    result = done.result
    assert [line["progress"] for line in done.lines[:-1]] == [
        ["building sparse", 1, 4], ["building dense", 2, 4], ["timing", 3, 4], ["writing m.plan", 4, 4],
    ]  # fmt: skip
    assert result["kept"] == "sparse" and result["engine"] == str(tmp_path / "m.plan") and result["warnings"] == []
    assert result["tensorrt"] == done.fake.__version__
    assert result["gpu"] == {"name": "Fake GPU", "sm": [9, 0], "memory": 64 << 30, "driver": 13000}
    assert result["shapes"] == {"x": [8, 4]} and result["batch"] == 8
    sparse, dense = result["variants"]["sparse"], result["variants"]["dense"]
    assert sparse["ms"] == {"median": 1.0, "p10": 1.0, "p90": 1.0} and dense["ms"]["median"] == 2.0
    assert sparse["chosen"] and set(sparse["chosen"]) <= set(sparse["eligible"])
    assert dense["eligible"] == dense["chosen"] == [], "the dense engine is built without SPARSE_WEIGHTS"
    assert sparse["layers"][1]["sparse"] is True and sparse["build_seconds"] >= 0
    assert sparse["bytes"] == (tmp_path / "m.plan").stat().st_size
    assert json.loads((tmp_path / "m.plan").read_text())["variant"] == "sparse"
    assert left(tmp_path) == ["m.plan"]
    assert ctypes.CDLL(driver).fakeLeft() == 0, "all device memory, streams and events were given back"


def test_dense_wins_where_sparse_is_no_faster(work: Callable[..., Work], tmp_path: Path) -> None:
    assert work(Script(ms={"sparse": 1.995, "dense": 2.0})).result["kept"] == "dense"
    assert json.loads((tmp_path / "m.plan").read_text())["variant"] == "dense"


def test_one_variant_and_another_place(work: Callable[..., Work], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    result = work(Script(), "-o", str(tmp_path / "other" / "e.plan"), variants="mixed").result
    assert result["kept"] == "mixed" and list(result["variants"]) == ["mixed"]
    assert left(tmp_path / "other") == ["e.plan"] and not (tmp_path / "m.plan").exists()


@pytest.mark.parametrize(("profile", "strong", "network", "sparse", "dense"), [
    ("8.6", False, ["EXPLICIT_BATCH"], {"INT8", "FP16", "SPARSE_WEIGHTS"}, {"INT8", "FP16"}),
    ("10", True, ["STRONGLY_TYPED"], {"SPARSE_WEIGHTS"}, set()),
    ("10", False, [], {"INT8", "FP16", "SPARSE_WEIGHTS"}, {"INT8", "FP16"}),
    ("11", True, ["STRONGLY_TYPED"], {"SPARSE_WEIGHTS"}, set()),
])  # fmt: skip
def test_flags_by_version(
    profile: str, strong: bool, network: list[str], sparse: set[str], dense: set[str], work: Callable[..., Work]
) -> None:
    done = work(Script(profile=profile), strong=strong)
    assert done.result and done.calls("create_network") == [network, network]
    built: list[set[str]] = [set()]
    for _, name, arguments in done.fake._calls:
        if name == "set_flag":
            built[-1].add(arguments[0])
        elif name == "build_serialized_network":
            built.append(set())
    assert built[:2] == [sparse, dense]


def test_options_reach_the_builder(work: Callable[..., Work]) -> None:
    done = work(Script(), workspace=1 << 30, level=4, variants="sparse")
    assert done.result and done.calls("set_memory_pool_limit") == [["WORKSPACE", 1 << 30]]
    assert done.calls("builder_optimization_level =") == [[4]]
    assert done.calls("set_shape") == [["x", [1, 4], [8, 4], [32, 4]]]
    assert [flag.name for (flag,) in done.calls("profiling_verbosity =")] == ["DETAILED"]


def test_a_static_model_needs_no_shapes(work: Callable[..., Work]) -> None:
    done = work(Script(inputs={"x": ("INT8", [2, 4])}, outputs={"y": ("HALF", [2, 3])}), shapes=None)
    assert done.result["shapes"] == {"x": [2, 4]} and done.calls("add_optimization_profile") == []


def test_inputs_are_filled_as_the_recipe_says(work: Callable[..., Work]) -> None:
    inputs: dict[str, tuple[str, list[int]]] = {
        "x": ("INT64", [-1, 4]), "f": ("FLOAT", [2]), "h": ("HALF", [2]), "b": ("BF16", [2]), "t": ("BOOL", [2])
    }  # fmt: skip
    values = {"x": {"dtype": "int64", "fill": 7}, "h": {"fill": 0.5}, "b": {"fill": -2}}
    done = work(Script(inputs=inputs), inputs=values, variants="sparse")
    assert done.result
    filled = {name: bytes.fromhex(arguments[0]) for kind, name, arguments in done.fake._calls if kind == "input"}
    assert filled["x"] == struct.pack("<32q", *[7] * 32)
    assert filled["f"] == struct.pack("<2f", 1, 1) and filled["h"] == struct.pack("<2e", 0.5, 0.5)
    assert filled["b"] == b"\x00\xc0" * 2 and filled["t"] == b"\x01\x01"


def test_8_6_takes_wide_integers_as_narrow_ones(work: Callable[..., Work]) -> None:
    done = work(Script(profile="8.6", inputs={"x": ("INT64", [-1, 4])}), strong=False, variants="sparse")
    assert done.result and done.calls("x")[0] == [struct.pack("<32i", *[1] * 32).hex()]


@pytest.mark.parametrize("profile", ["8.6", "11"])
def test_the_timing_cache_is_kept(profile: str, work: Callable[..., Work], tmp_path: Path) -> None:
    for expected in (b" sparse dense", b" sparse dense sparse dense"):
        done = work(Script(profile=profile), strong=profile != "8.6", timing_cache="cache")
        assert done.result["warnings"] == []
        assert (tmp_path / "cache").read_bytes() == done.fake.__version__.encode() + expected
    assert left(tmp_path) == ["cache", "m.plan"]


@pytest.mark.parametrize("content", [b"damaged", b"9.9.9 sparse"])
def test_a_timing_cache_that_does_not_fit_is_replaced(
    content: bytes, work: Callable[..., Work], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_bytes(content)
    (warning,) = work(Script(), timing_cache="cache").result["warnings"]
    assert "cache" in warning and "started anew" in warning
    assert (tmp_path / "cache").read_bytes() == b"10.16.1.11 sparse dense"


def test_an_engine_without_an_inspectors_answer_is_kept(work: Callable[..., Work]) -> None:
    result = work(Script(inspector=""), variants="sparse").result
    assert result["variants"]["sparse"]["layers"] == [] and "inspector" in result["warnings"][0]


# ---- as a process


def process(arguments: list[str], environment: dict[str, str], script: Path = WORKER) -> tuple[int, list[Any]]:
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_probe(tmp_path: Path, driver: str) -> None:
    environment = install(tmp_path / "site", Script(profile="8.6", cuda=driver))
    facts = {
        "gpu": {"name": "Fake GPU", "sm": [9, 0], "memory": 64 << 30, "driver": 13000}, "tensorrt": "8.6.0",
        "python": sys.version.split()[0], "cuda_error": None, "tensorrt_error": None,
    }  # fmt: skip
    assert process(["--probe", "--cuda", driver], environment) == (0, [{"result": facts}])
    environment["FAKE_CUDA_FAIL"] = "cuDevicePrimaryCtxRetain=2"
    (line,) = process(["--probe", "--cuda", driver], environment)[1]
    assert "OUT_OF_MEMORY" in line["result"]["cuda_error"] and line["result"]["tensorrt"] == "8.6.0"


@pytest.mark.parametrize("arguments", [["--probe"], ["m.recipe.json"]])
def test_without_a_gpu_tensorrt_is_not_touched(arguments: list[str], tmp_path: Path, driver: str) -> None:
    write_recipe(tmp_path)
    environment = install(tmp_path / "site", Script(cuda=driver))
    (tmp_path / "site" / "tensorrt.py").write_text("import os; os.abort()")
    arguments = [str(tmp_path / name) if name.endswith(".json") else name for name in arguments]
    status, lines = process([*arguments, "--cuda", driver], {**environment, "FAKE_CUDA_DEVICES": "0"})
    assert status == 3 and lines[-1]["kind"] == "no-gpu" and "no GPU 0" in lines[-1]["error"]
    status, lines = process([*arguments, "--cuda", str(tmp_path / "libno.so")], environment)
    assert status == 3 and lines[-1]["kind"] == "no-gpu" and "NVIDIA" in lines[-1]["error"]


def test_without_tensorrt(tmp_path: Path, driver: str) -> None:
    environment = install(tmp_path / "site", Script())
    (tmp_path / "site" / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    status, lines = process([str(write_recipe(tmp_path)), "--cuda", driver], environment)
    assert status == 3 and lines[-1]["kind"] == "no-tensorrt" and "libnvinfer.so.10" in lines[-1]["error"]
    status, (line,) = process(["--probe", "--cuda", driver], environment)
    assert status == 0 and line["result"]["tensorrt"] is None and "libnvinfer" in line["result"]["tensorrt_error"]


def test_copies_of_the_two_files_work_by_themselves(tmp_path: Path, driver: str) -> None:
    copy = Path(shutil.copy(WORKER, tmp_path / "copied.py"))
    shutil.copy(WORKER.with_name("cuda_driver.py"), tmp_path)
    environment = install(tmp_path / "site", Script(profile="11", cuda=driver, ms={"sparse": 1, "dense": 2}))
    for name in ("nmcompile", "numpy", "onnx"):
        (tmp_path / "site" / f"{name}.py").write_text("raise RuntimeError('not here')")
    status, lines = process([str(write_recipe(tmp_path, version="11")), "--cuda", driver], environment, copy)
    assert status == 0 and lines[-1]["result"]["kept"] == "sparse", lines[-1]
    assert len(lines) == 5, "what the fake's native half prints does not get between the lines"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_build_leaves_nothing(number: int, tmp_path: Path, driver: str) -> None:
    environment = install(tmp_path / "site", Script(cuda=driver, sleep=20))
    command = [sys.executable, str(WORKER), str(write_recipe(tmp_path)), "--cuda", driver]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if json.loads(line)["progress"][0] == "building dense":
                break
        assert [name for name in left(tmp_path) if name != "site"], "the sparse engine is there already"
        running.send_signal(number)
        assert running.wait(10) == 128 + number
    assert [name for name in left(tmp_path) if name != "site"] == []
