"""tools/bench without any peer installed: model forms, the protocol with a made-up worker, rounds, the report.

Run as a module, this file is that worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from nmcompile import sparsity as sp
from tools.bench import report
from tools.bench.__main__ import main, parse_shape, with_pattern
from tools.bench.encoder import INPUTS, OUTPUT, Shape, encoder
from tools.bench.environments import environment
from tools.bench.forms import integer_form, ranges, run_float, u8_parameters
from tools.bench.load import Load
from tools.bench.models import Models, feeds, write_fixed
from tools.bench.neural_engine_ir import write_ir
from tools.bench.peers import OURS, PEERS, Form, Peer
from tools.bench.peers.serve import Feeds, Run, serve
from tools.bench.protocol import ROOT, PeerError, Worker
from tools.bench.rounds import Contender, Measured, Measurement, Settings, measure

SMALL = Shape(2, 128)


class MadeUp:
    """A runtime whose model file says what it does."""

    version = "1.0"

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        text = Path(model).read_text()
        if text == "refuse":
            raise ValueError("this model\nis not for me")
        if text == "die":
            print("out of luck", file=sys.stderr)
            sys.stderr.flush()
            os._exit(3)
        if text == "hang":
            time.sleep(60)
        print("libraries print what they like")
        wait, self.answer = text.split()
        return lambda: time.sleep(float(wait))

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.answer)
        return array


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a worker of this file on a model that holds a text."""
    np.savez(tmp_path / "inputs.npz", x=np.zeros(1))
    started: list[Worker] = []

    def begin(text: str) -> tuple[Worker, dict[str, Any]]:
        (tmp_path / "model").write_text(text)
        worker = Worker(Path(sys.executable), "tests.test_bench_peers", 1, tmp_path / "log")
        started.append(worker)
        request = {"do": "open", "model": str(tmp_path / "model"), "form": "int8", "threads": 1}
        return worker, request | {"inputs": str(tmp_path / "inputs.npz")}

    yield begin
    for worker in started:
        worker.close()


def state(worker: Worker) -> str:
    return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_runs_only_when_asked(start: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "answer.npy", np.ones((1, 2)))
    worker, request = start(f"0.01 {tmp_path / 'answer.npy'}")
    assert worker.version == "1.0"
    assert 0.01 <= worker.ask(**request)["load_seconds"] < 5
    for _ in range(50):  # a signal takes a moment
        if state(worker) == "T":
            break
        time.sleep(0.02)
    assert state(worker) == "T"
    spent = worker.ask(do="run", seconds=0.05, least=2)["nanoseconds"]
    assert len(spent) >= 2 and min(spent) >= 10_000_000
    assert worker.ask(do="memory")["peak_bytes"] > 1_000_000
    worker.ask(do="save", path=str(tmp_path / "found.npy"))
    assert (np.load(tmp_path / "found.npy") == 1).all()


def test_no_worker_survives_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tools.bench.protocol import Worker\n"
        f"worker = Worker(Path(sys.executable), 'tests.test_bench_peers', 1, Path({str(tmp_path / 'log')!r}))\n"
        "print(worker.process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    worker = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(100):
        if not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"still there: {worker.read_text()}")


def test_a_worker_that_refuses_says_why_in_one_line(start: Any) -> None:
    worker, request = start("refuse")
    with pytest.raises(PeerError, match=r"^ValueError: this model is not for me$"):
        worker.ask(**request)
    with pytest.raises(PeerError, match="no model is open"):
        worker.ask(do="run", seconds=0.1, least=1)


def test_a_worker_that_dies_is_told_with_its_last_words(start: Any) -> None:
    worker, request = start("die")
    with pytest.raises(PeerError, match=r"^its process ended with status 3: out of luck$"):
        worker.ask(**request)


def test_a_worker_that_hangs_is_ended(start: Any) -> None:
    worker, request = start("hang")
    worker.patience = 1.0
    with pytest.raises(PeerError, match="no answer for 1 seconds"):
        worker.ask(**request)
    assert worker.process.wait(5) < 0


def test_a_module_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"ended with status 1: .*no_such_module"):
        Worker(Path(sys.executable), "tests.no_such_module", 1, tmp_path / "log")


def test_what_pip_cannot_install_is_left_out_with_its_reason(tmp_path: Path) -> None:
    peer = Peer("absent", (Form("fp32"),), (str(tmp_path / "no_such-1.0-py3-none-any.whl"),))
    with pytest.raises(PeerError, match=r"^cannot be installed: .*no_such") as caught:
        environment(peer, tmp_path / "environments")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "environments" / "absent" / "installed.txt").exists()


def test_every_peer_has_a_worker_and_ours_needs_no_environment(tmp_path: Path) -> None:
    folder = Path(report.__file__).parent / "peers"
    assert all((folder / f"{peer.module.rpartition('.')[2]}.py").is_file() for peer in PEERS)
    assert environment(next(peer for peer in PEERS if peer.name == OURS), tmp_path) == Path(sys.executable)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["2x4", "1x4", "4x1"])
def test_encoders_have_the_share_of_zero_blocks(pattern: str) -> None:
    model = encoder(SMALL, 0.75, pattern)
    onnx.checker.check_model(model)
    rows, columns = (int(size) for size in pattern.split("x"))
    layers = [item for item in model.graph.initializer if item.name.startswith("encoder") and len(item.dims) == 2]
    assert len(layers) == 6 * SMALL.layers
    for item in layers:
        weight = numpy_helper.to_array(item).T  # [outputs, inputs]
        blocks = weight.reshape(weight.shape[0] // rows, rows, -1, columns)
        assert (blocks == 0).all(axis=(1, 3)).mean() == 0.75


def test_an_encoder_depends_on_nothing_but_its_arguments() -> None:
    assert encoder(SMALL).SerializeToString() == encoder(SMALL).SerializeToString()
    assert encoder(SMALL, seed=1).SerializeToString() != encoder(SMALL).SerializeToString()


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("share", [0.0, 0.8])
def test_the_form_for_deepsparse_computes_the_same(share: float) -> None:
    model = encoder(SMALL, share, "1x4")
    integer = integer_form(model, ranges(model, feeds(4, 64, seed=1)))
    onnx.checker.check_model(integer, full_check=True)
    fed = feeds(2, 48, seed=2)
    (expected,), (found,) = run_float(model, fed), run_float(integer, fed)
    assert found.shape == expected.shape == (2, 48, SMALL.hidden)
    assert cosine(found, expected) > 0.999
    assert np.abs(found - expected).max() < 0.5  # values are of unit variance


def test_the_form_for_deepsparse_is_sparsemls() -> None:
    model = encoder(SMALL)
    integer = integer_form(model, ranges(model, feeds(1, 16, seed=1)))
    nodes = {name: node for node in integer.graph.node for name in node.output}
    assert not any(node.op_type in ("MatMul", "DequantizeLinear") for node in integer.graph.node)
    node = nodes["encoder.layer.1.output.dense"]
    for kind in ("Mul", "Cast", "Add", "MatMulInteger", "QuantizeLinear"):
        assert node.op_type == kind
        node = nodes.get(node.input[0], node)
    weights = {item.name: item for item in integer.graph.initializer}
    assert weights["encoder.layer.1.output.dense.weight.s8"].data_type == onnx.TensorProto.INT8
    assert weights["encoder.layer.1.output.dense.bias.s32"].data_type == onnx.TensorProto.INT32
    assert "encoder.layer.1.output.dense.weight" not in weights


def test_a_model_of_fixed_sizes_is_a_copy(tmp_path: Path) -> None:
    onnx.save(encoder(SMALL), tmp_path / "any.onnx")
    before = (tmp_path / "any.onnx").read_bytes()
    fixed = onnx.load(write_fixed(tmp_path / "any.onnx", tmp_path / "fixed.onnx", (2, 48)))
    for item, sizes in [
        *((item, [2, 48]) for item in fixed.graph.input),
        (fixed.graph.output[0], [2, 48, SMALL.hidden]),
    ]:
        assert [axis.dim_value for axis in item.type.tensor_type.shape.dim] == sizes
    onnx.checker.check_model(fixed, full_check=True)
    assert (tmp_path / "any.onnx").read_bytes() == before


def test_u8_parameters_hold_the_range() -> None:
    scale, zero = u8_parameters((-1.0, 3.0))
    assert zero == 64 and scale == pytest.approx(4 / 255)
    assert u8_parameters((0.0, 0.0)) == (1e-8, 0)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_ir_of_the_neural_engine_holds_the_weights(sparse: bool, tmp_path: Path) -> None:
    model = encoder(SMALL, 0.75, "4x1")
    write_ir(tmp_path, model, SMALL, ranges(model, feeds(1, 16, seed=1)), sparse=sparse)
    operators = json.loads((tmp_path / "conf.yaml").read_text())["model"]["operator"]
    data = (tmp_path / "model.bin").read_bytes()
    tensors = operators["input_data"]["output"]
    assert list(tensors)[: len(INPUTS)] == list(INPUTS)

    def read(name: str) -> NDArray[Any]:
        at, size = tensors[name]["location"]
        kinds = {"fp32": np.float32, "s8": np.int8}
        array: NDArray[Any] = np.frombuffer(data[at : at + size], kinds[tensors[name]["dtype"]])
        return array.reshape(tensors[name]["shape"])

    name = "encoder.layer.1.intermediate.dense"
    (original,) = (numpy_helper.to_array(item) for item in model.graph.initializer if item.name == f"{name}.weight")
    step = read(f"{name}.weight.max") / 127
    rounded = read(f"{name}.weight")
    found = (rounded.T if sparse else rounded) * step
    assert np.abs(found - original).max() <= step.max() / 2 + 1e-6
    inputs = list(operators[f"{name}.op"]["input"])
    assert inputs.index(f"{name}.weight") == (0 if sparse else 1)
    # Every operand is a tensor of the file, an input, or an earlier operator's result.
    known = set(tensors)
    for operator in list(operators.values())[1:]:
        assert set(operator["input"]) <= known
        known |= set(operator.get("output", {}))
    assert OUTPUT in known and list(operators["output_data"]["input"]) == [OUTPUT]
    assert sum(tensor["location"][1] for tensor in tensors.values() if "location" in tensor) == len(data)


def test_load_counts_other_processes_only() -> None:
    """By time on cores, not by the clock: the machine may be busy otherwise."""
    code = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        start, mixed, counted = time.monotonic(), Load([]), Load([other.pid])
        assert other.stdout is not None and other.stdout.readline()
        both, rest, passed = mixed.others(), counted.others(), time.monotonic() - start
    assert (both - rest) * passed > 0.3


def contender(folder: Path, name: str, form: Form, text: dict[str, str], source: Path) -> Contender:
    files = {}
    for candidate, content in text.items():
        files[candidate] = folder / f"{name}-{candidate}"
        files[candidate].write_text(content)

    class Here(Peer):
        module = "tests.test_bench_peers"

    return Contender(Here(name, (form,)), form, 0.0, Path(sys.executable), files, source)


def test_contenders_take_turns_and_failing_ones_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["tools.bench.models"].MODELS, "small", SMALL)
    models = Models("small", tmp_path)
    source = models.float_model(None, 0.0)
    answer = run_float(str(source), feeds(1, 8, seed=2))[0]
    np.save(tmp_path / "good.npy", answer)
    np.save(tmp_path / "bad.npy", -answer)
    np.save(tmp_path / "short.npy", answer[:, 1:])
    good = tmp_path / "good.npy"
    form = Form("int8", candidates=("a", "b"))
    found = measure(
        "small",
        models,
        [
            contender(tmp_path, "two", form, {"a": f"0.02 {good}", "b": f"0.002 {good}"}, source),
            contender(tmp_path, "half", form, {"a": "refuse", "b": f"0.002 {good}"}, source),
            contender(tmp_path, "wrong", form, {"a": f"0.002 {tmp_path / 'bad.npy'}"}, source),
            contender(tmp_path, "short", form, {"a": f"0.002 {tmp_path / 'short.npy'}"}, source),
            contender(tmp_path, "none", form, {"a": "refuse"}, source),
        ],
        (1, 8),
        Settings(1, 2, 0.02),
        lambda _: None,
    )
    two, half, wrong = found.contenders
    assert (two.peer, two.candidate, half.candidate) == ("two", "b", "b")
    assert two.cosine == pytest.approx(1) and two.agrees and not wrong.agrees and wrong.cosine == pytest.approx(-1)
    assert all(len(each.medians) == 2 and each.medians[0] >= 2 and each.runs >= 6 for each in found.contenders)
    assert all(each.peak_bytes > 0 and each.file_bytes > 0 for each in found.contenders)
    assert len(found.reference) == len(found.others) == 2 and min(found.reference) > 0 and min(found.others) >= 0
    assert found.left_out["none int8"] == "ValueError: this model is not for me"
    assert "shape (1, 7, 128), not (1, 8, 128)" in found.left_out["short int8"]


def measured(peer: str, share: float, pattern: str | None, medians: list[float], *, agrees: bool = True) -> Measured:
    return Measured(peer, "int8", pattern, share, "model", "1.0", 0.5, 10**6, 0.999, agrees, 10**8, 9, medians)


@pytest.fixture
def measurement() -> Measurement:
    contenders = [
        measured(OURS, 0.0, "2x4", [10.0, 20.0, 10.0]),
        measured(OURS, 0.8, "2x4", [4.0, 8.0, 4.0]),
        measured("deepsparse", 0.0, "1x4", [15.0, 30.0, 16.0]),
        measured("deepsparse", 0.8, "1x4", [8.0, 20.0, 6.0]),
        measured("openvino", 0.0, None, [12.0, 30.0, 11.0]),
        measured("broken", 0.0, None, [1.0, 1.0, 1.0], agrees=False),
    ]
    return Measurement(
        "bert-base", 1, 128, contenders, {"pytorch": "cannot be installed: no wheel"}, [100.0, 101.0], [0.0, 0.5]
    )


def test_ratios_are_taken_within_rounds(measurement: Measurement) -> None:
    dense, sparse = report.rows([measurement], [0.0, 0.8])
    assert dense.ours == 10 and dense.best == "openvino int8"
    assert dense.ratio == pytest.approx(1.2) and dense.least == pytest.approx(1.1) and dense.most == pytest.approx(1.5)
    assert sparse.ours == 4 and sparse.best == "deepsparse int8" and sparse.ratio == pytest.approx(2.0)
    assert sparse.peers == {"deepsparse int8": 8.0, "openvino int8": 12.0, "broken int8": 1.0}
    assert sparse.disagree == ("broken int8",)


def test_a_row_without_ours_or_without_peers_has_no_ratio(measurement: Measurement) -> None:
    (row,) = report.rows([measurement], [0.9])
    assert row.ours is None and row.best == "openvino int8" and row.ratio is None
    alone = Measurement("bert-base", 1, 128, measurement.contenders[:1], {}, [1.0], [0.0])
    (row,) = report.rows([alone], [0.0])
    assert row.best is None and row.ratio is None and row.peers == {}


def test_the_report_is_written(measurement: Measurement, tmp_path: Path) -> None:
    machine = {**report.machine(), "threads": 2, "rounds": 3}
    found = report.write(tmp_path, [measurement], [0.0, 0.8], machine)
    table = (tmp_path / "results.md").read_text()
    assert (
        "| bert-base | 1x128 | 0% | 10.00 | 16.00 | 12.00 | 1.00 (!) | openvino int8 | 1.20 (1.10 to 1.50) |" in table
    )
    assert "- pytorch: cannot be installed: no wheel" in table and "100 us / 0.00, 101 us / 0.50" in table
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["table"][1]["ratio"] == pytest.approx(2.0) and stored["machine"]["threads"] == 2
    assert stored["measurements"][0]["contenders"][3]["medians"] == [8.0, 20.0, 6.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    why = report.plot(tmp_path, found)
    assert (why is None) == (tmp_path / "results.png").is_file()
    assert why is None or why.startswith("no plot: ")


def test_shapes_and_patterns_from_the_command_line(tmp_path: Path) -> None:
    assert parse_shape("32x128") == (32, 128)
    assert with_pattern(PEERS[0], "1x4").forms[0].pattern == "1x4"
    assert all(with_pattern(peer, "1x4") == peer for peer in PEERS[1:])
    for arguments, said in (
        (["--shape", "128"], "--shape '128' is not of the form 1x128"),
        (["--shape", "1x513"], "at most 512 tokens"),
        (["--pattern", "two"], "two"),
    ):
        result = CliRunner().invoke(main, ["--output", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pruning_that_compilation_would_repeat_keeps_the_same_blocks() -> None:
    """Ours is compiled from a model that is pruned already: the pass must find the same zeros."""
    model = encoder(SMALL, 0.8, "2x4")
    for item in model.graph.initializer:
        if item.name.startswith("encoder") and len(item.dims) == 2:
            weight = numpy_helper.to_array(item).T
            keep = sp.keep_mask(sp.magnitude(weight), sp.parse_pattern("2x4"), 0.8)
            assert (weight * keep == weight).all()


if __name__ == "__main__":
    serve(MadeUp())
