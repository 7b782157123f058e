"""onnxruntime segments of a plan read no file and no memory but the plan's, and allocate no more than they may."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nmcompile
from nmcompile.backends.cpu import onnx_blob
from nmcompile.backends.cpu.onnx_blob import check_blob
from nmcompile.errors import PlanError
from nmcompile.plan import write_plan


def tensor(location: str | None = "secret.txt", name: str = "w", **entries: str) -> onnx.TensorProto:
    made = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[4])
    if location is None:
        made.raw_data = b"1234"
        return made
    made.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        made.external_data.add(key=key, value=value)
    return made


def model(*initializers: onnx.TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    cast = helper.make_node("Cast", ["x"], ["xu"], to=TensorProto.UINT8)
    adding = [cast, helper.make_node("Add", ["w", "xu"], ["y"])]
    graph = helper.make_graph(
        nodes or adding, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [4])], [*initializers],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def constant(location: str | None) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor(location, "c"))


def in_branch(location: str) -> onnx.ModelProto:
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["o"])], "b", [], [], [tensor(location)])
    return model(nodes=[helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])


def in_sparse(location: str) -> onnx.ModelProto:
    made = model(tensor(None))
    made.graph.sparse_initializer.add().values.CopyFrom(tensor(location))
    return made


def in_list(location: str) -> onnx.ModelProto:
    node = constant(None)
    node.attribute.add(name="more", type=onnx.AttributeProto.TENSORS).tensors.append(tensor(location))
    return model(tensor(None), nodes=[node])


@pytest.mark.parametrize("make", [
    lambda at: model(tensor(at)), lambda at: model(tensor(None), nodes=[constant(at)]), in_branch, in_sparse, in_list,
])  # fmt: skip
@pytest.mark.parametrize("location", ["secret.txt", "elsewhere", "*/_ORT_MEM_ADDR_/*"])
def test_data_outside_the_plan_are_refused_wherever_they_stand(make: Any, location: str) -> None:
    weights = [] if make(location).graph.initializer else ["w"]  # a name that is handed over helps inside no branch
    with pytest.raises(PlanError, match="has data outside the plan"):
        check_blob(make(location).SerializeToString(), "segment0", weights)


def test_functions_and_training_are_refused() -> None:
    """A chain of functions that call the one before twice is 2^n nodes for onnxruntime, which inlines them."""
    made = model(tensor(None))
    made.functions.append(helper.make_function("d", "f", [], ["c"], [constant(None)], []))
    with pytest.raises(PlanError, match="has functions, which plans do not"):
        check_blob(made.SerializeToString(), "segment0", [])
    made = model(tensor(None))
    made.training_info.add().algorithm.initializer.append(tensor("secret.txt"))
    with pytest.raises(PlanError, match="has training, which plans do not"):
        check_blob(made.SerializeToString(), "segment0", [])


def test_weights_of_the_plan_are_declared_and_nothing_more() -> None:
    check_blob(model(tensor("elsewhere")).SerializeToString(), "segment0", ["w"])
    check_blob(model(tensor(None)).SerializeToString(), "segment0", [])
    for wrong in (tensor("secret.txt"), tensor("elsewhere", offset="8"), tensor("*/_ORT_MEM_ADDR_/*", offset="4096"),
                  tensor("elsewhere", name="other")):  # fmt: skip
        with pytest.raises(PlanError, match="has data outside the plan"):
            check_blob(model(wrong).SerializeToString(), "segment0", ["w"])
    with pytest.raises(PlanError, match="declares a weight twice"):
        check_blob(model(tensor("elsewhere"), tensor("elsewhere")).SerializeToString(), "segment0", ["w"])


def test_every_way_to_a_tensor_is_known() -> None:
    """By onnx's own description of its messages."""
    named = {"ModelProto": "model", "GraphProto": "graph", "NodeProto": "node", "AttributeProto": "attribute",
             "SparseTensorProto": "sparse"}  # fmt: skip
    others = {"TensorProto": "tensor", "TrainingInfoProto": "training", "FunctionProto": "functions"}
    for message, kind in named.items():
        fields = [field for field in getattr(onnx, message).DESCRIPTOR.fields if field.message_type]
        found = {field.number: (named | others).get(field.message_type.name) for field in fields}
        known = onnx_blob._INSIDE[kind] | (onnx_blob._REFUSED if kind == "model" else {})
        assert {n: inside for n, inside in found.items() if inside} == {
            n: "tensor" if inside == "initializer" else inside for n, inside in known.items()
        }


@pytest.mark.parametrize("damage", [
    b"\x08", b"\x3a\xff\xff\xff\x7f", b"\x0b\x0c", b"\x07\x00", b"\x08" + b"\xff" * 11, b"\x08\x01" * 1_100_000,
])  # fmt: skip
def test_damaged_onnx_is_one_line(damage: bytes) -> None:
    with pytest.raises(PlanError, match="is damaged"):
        check_blob(damage, "segment0", [])
    with pytest.raises(PlanError, match="is not ONNX"):
        check_blob(b"\x20\0\0\0ORTM" + damage, "segment0", [])
    with pytest.raises(PlanError, match="EPContext, which reads files"):
        check_blob(model(nodes=[helper.make_node("EPContext", ["x"], ["y"])]).SerializeToString(), "segment0", [])


def write_onnx(path: Path, made: onnx.ModelProto, weights: Any = None, kind: str = "uint8") -> Path:
    segment = {"kind": "onnxruntime", "inputs": ["x"], "outputs": ["y"], "model": "m", "weights": weights or {}}
    content = {"target": "cpu", "inputs": [{"name": "x", "dtype": "float32", "shape": [1]}],
               "outputs": [{"name": "y", "dtype": kind, "shape": [None]}], "segments": [segment]}  # fmt: skip
    write_plan(path, content, {"v": np.arange(4, dtype=np.uint8)}, {"m": made.SerializeToString()})
    return path


def test_a_segment_gets_the_plans_weights_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").write_bytes(b"SECRET")
    Path("secret.txt").write_bytes(b"SECRET")
    plan = write_onnx(tmp_path / "a.plan", model(tensor("elsewhere")), {"w": {"array": "v"}})
    assert nmcompile.load(plan).run({"x": np.ones(1, np.float32)})["y"].tolist() == [1, 2, 3, 4]
    with pytest.raises(PlanError, match="has data outside the plan"):
        nmcompile.load(write_onnx(plan, model(tensor("secret.txt"))))
    with pytest.raises(PlanError, match="native_only was asked for"):
        nmcompile.load(write_onnx(plan, model(tensor(None))), native_only=True)


def test_onnxruntime_looks_into_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second wall, should the first let something through."""
    monkeypatch.chdir(tmp_path)
    Path("secret.txt").write_bytes(b"SECRET")
    monkeypatch.setattr("nmcompile.backends.cpu.session.check_blob", lambda *_: 1)
    session = nmcompile.load(write_onnx(tmp_path / "a.plan", model(tensor("secret.txt"))))
    with pytest.raises(PlanError, match="onnxruntime cannot open"):
        session.run({"x": np.ones(1, np.float32)})


@pytest.mark.parametrize("weights", [{"w": [1, 2]}, {"w": None}, {"w": "v"}, {"w": {"a": 1}}, {"w": 3.5}, [1], "w"])
def test_weights_that_are_no_arrays(tmp_path: Path, weights: Any) -> None:
    with pytest.raises(PlanError):
        nmcompile.load(write_onnx(tmp_path / "a.plan", model(tensor("elsewhere")), weights))


BOMB = """
import sys, time, numpy as np, nmcompile
session = nmcompile.load(sys.argv[1], memory=256 << 20)
begin = time.perf_counter()
try:
    session.run({"x": np.zeros(1, np.float32)})
except nmcompile.NmcompileError as error:
    print(error)
# of this program alone: ru_maxrss begins with what the process that forked it had
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(time.perf_counter() - begin < 2, not peak or peak[0] < 500 << 10)
"""


@pytest.mark.parametrize("count", [1 << 28, 1 << 36])
@pytest.mark.parametrize("op", ["Range", "ConstantOfShape", "Tile"])
def test_a_segment_allocates_no_more_than_it_may(tmp_path: Path, op: str, count: int) -> None:
    """In a process of its own: there is one such bound for all segments of a process."""
    size = helper.make_tensor("n", TensorProto.INT64, [1], [count])
    scalar = helper.make_tensor("n", TensorProto.INT64, [], [count])
    zero, one = (helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in (("a", 0), ("b", 1)))
    given = {"Range": ([zero, scalar, one], ["a", "n", "b"]), "ConstantOfShape": ([size], ["n"]),
             "Tile": ([helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]), size], ["t", "n"])}[op]  # fmt: skip
    nodes = [helper.make_node(op, given[1], ["big"]), helper.make_node("Cast", ["big"], ["f"], to=TensorProto.FLOAT),
             helper.make_node("Add", ["x", "f"], ["y"])]  # fmt: skip
    made = model(*given[0], nodes=nodes)
    made.graph.output[0].type.tensor_type.Clear()
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    plan = write_onnx(tmp_path / "a.plan", made, kind="float32")
    done = subprocess.run([sys.executable, "-c", BOMB, plan], capture_output=True, text=True, check=True, timeout=60)
    assert re.search("needs more memory for m than the 256 MB allowed|exceeds the supported maximum", done.stdout)
    assert done.stdout.splitlines()[-1] == "True True"
