"""Measuring: made-up inputs, the worker's protocol, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import nmcompile
from nmcompile.bench import Contender, Latency, Worker, bench, ratios
from nmcompile.cli import cli
from nmcompile.errors import InputError, NmcompileError
from nmcompile.made_up import made_up
from nmcompile.session import load_cpu
from nmcompile.tensorinfo import TensorInfo

MODELS = Path(__file__).parents[1] / "models"
MODEL = MODELS / "roberta-torchscript.onnx"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "roberta.plan"
    nmcompile.compile(MODEL, path, preset="fast", measure=False, sparsity=0.5)
    return path


def info(name: str, dtype: str, *shape: int | str) -> TensorInfo:
    return TensorInfo(name, np.dtype(dtype), shape)


TEXT = (
    info("input_ids", "int64", "b", "s"),
    info("attention_mask", "int64", "b", "s"),
    info("token_type_ids", "int32", "b", "s"),
)


def test_made_up_inputs_fit_the_model() -> None:
    feeds = made_up(TEXT, 3, 50, vocabulary={"input_ids": 30})
    assert {name: array.shape for name, array in feeds.items()} == {item.name: (3, 50) for item in TEXT}
    assert feeds["input_ids"].min() >= 3 and feeds["input_ids"].max() < 30
    assert (feeds["attention_mask"] == 1).all() and feeds["token_type_ids"].dtype == np.int32
    image = made_up([info("pixel_values", "float32", "b", 3, 8, 8)], 2, 99)["pixel_values"]
    assert image.shape == (2, 3, 8, 8) and image.dtype == np.float32


def test_made_up_inputs_depend_on_name_and_seed_alone() -> None:
    one, other = made_up(TEXT, 2, 9), made_up(TEXT[::-1], 2, 9)
    assert all((one[name] == other[name]).all() for name in one)
    assert (made_up(TEXT, 2, 9, seed=1)["input_ids"] != one["input_ids"]).any()


def test_ragged_masks_are_prefixes() -> None:
    mask = made_up(TEXT, 5, 20, ragged=True)["attention_mask"]
    assert mask[0].all() and not mask.all() and (np.diff(mask, axis=1) <= 0).all() and mask[:, 0].all()


def test_limits_of_a_plan(plan: Path) -> None:
    vocabulary, longest = load_cpu(plan).limits()
    assert vocabulary["input_ids"] == 256
    feeds = made_up(nmcompile.load(plan).inputs, 1, longest or 0, vocabulary=vocabulary)
    nmcompile.load(plan).run(feeds)
    with pytest.raises(InputError):
        nmcompile.load(plan).run(made_up(nmcompile.load(plan).inputs, 1, (longest or 0) + 1, vocabulary=vocabulary))


def test_two_models_take_turns_on_the_same_inputs(plan: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    a, b = bench(
        [plan, MODEL], threads=1, shapes=[(1, 8), (2, None)], seconds=0.1, progress=lambda *state: seen.append(state)
    )
    assert a.runtime == "nmcompile" and b.runtime.startswith("onnxruntime") and a.threads == b.threads == 1
    for contender in (a, b):
        assert (contender.latencies[0].batch, contender.latencies[0].tokens) == (1, 8)
        for item in contender.latencies:
            assert 0 < item.p50 <= item.p90 <= item.p99 and item.sequences > 0 and len(item.rounds) == 10
        assert contender.load_seconds > 0 and 10e6 < contender.peak_bytes < 2e9
    assert seen[-1] == ("measuring", 20, 20)


def test_ratios_are_of_medians_with_their_range() -> None:
    def contender(*rounds: float) -> Contender:
        return Contender("m", "r", "", 1, 0.1, 1, (Latency(1, 8, 3, float(np.median(rounds)), 9, 9, 1, rounds),))

    assert ratios(contender(1, 2, 4), contender(4, 4, 4)) == [(2.0, 1.0, 4.0)]


def test_the_worker_of_a_plan_imports_only_numpy_and_the_session(plan: Path) -> None:
    code = (
        "import sys\nfrom nmcompile.bench import worker\nworker()\nsys.stderr.write('MODULES ' + ' '.join(sys.modules))"
    )
    requests = [{"do": "open", "model": str(plan), "threads": 1},
                {"do": "feed", "batch": 1, "tokens": 4, "default_tokens": 4, "vocabulary": {}},
                {"do": "run", "seconds": 0.0, "least": 2}, {"do": "memory"}]  # fmt: skip
    text = "".join(json.dumps(item) + "\n" for item in requests)
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True)
    opened, fed, ran, memory = map(json.loads, done.stdout.splitlines())
    assert (
        opened["threads"] == 1
        and fed == {"batch": 1, "tokens": 4}
        and len(ran["nanoseconds"]) == 2
        and memory["peak_bytes"] > 1e6
    )
    modules = set(done.stderr.partition("MODULES")[2].split())
    assert not modules & {"onnx", "onnx_graphsurgeon", "onnxruntime", "click", "rich", "nmcompile.compiler"}


def test_a_worker_that_dies_is_told(plan: Path) -> None:
    with Worker(str(plan), 1) as worker:
        worker.process.kill()
        with pytest.raises(NmcompileError, match="was killed by signal 9"):
            worker.ask(do="memory")


def test_fixed_sizes_and_bad_shapes_are_told(tmp_path: Path) -> None:
    import onnx
    from onnx.tools.update_model_dims import update_inputs_outputs_dims

    model = onnx.load(str(MODELS / "bert-classifier.onnx"))
    sizes = {item.name: [1, 16] for item in model.graph.input}
    onnx.save(update_inputs_outputs_dims(model, sizes, {"logits": [1, "classes"]}), str(tmp_path / "fixed.onnx"))
    bench([tmp_path / "fixed.onnx"], shapes=[(1, 16)], seconds=0.05)
    for shape in ((2, 16), (1, 8)):
        with pytest.raises(InputError, match="that size is fixed"):
            bench([tmp_path / "fixed.onnx"], shapes=[shape], seconds=0.05)
    with pytest.raises(InputError, match="must be positive"):
        bench([tmp_path / "fixed.onnx"], shapes=[(0, 16)])


def test_the_command_prints_a_table_and_json(plan: Path) -> None:
    words = ["bench", str(plan), "--against", str(MODEL), "--seconds", "0.1", "--threads", "1", "--shape", "2x8"]
    text = CliRunner().invoke(cli, words).stdout
    assert "p99 ms" in text and "2x8: roberta.plan is " in text and "over rounds" in text and "peak memory" in text
    content = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert [item["threads"] for item in content["contenders"]] == [1, 1] and content["ratios"][0]["median"] > 0
    alone = CliRunner().invoke(cli, ["bench", str(plan), "--seconds", "0.1"]).stdout
    assert "as fast as" not in alone


def test_images_have_no_tokens() -> None:
    (found,) = bench([MODELS / "vit-dynamo.onnx"], shapes=[(2, None)], seconds=0.05)
    assert found.latencies[0].shape == "2" and found.latencies[0].tokens is None
