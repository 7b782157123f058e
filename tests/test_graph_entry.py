"""What comes in is checked where it comes in: types, constants as outputs, names of dimensions, sizes of files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_text import assert_same_outputs, parse, parse_model

import nmcompile
from nmcompile import ir as g
from nmcompile.errors import BudgetError, GraphError, NmcompileError
from nmcompile.ir import onnx_file
from nmcompile.ir.budget import NODES

TEXT = """(float[b,s,8] x) => (float[b,s,8] y) <float[8,8] w, float[8,8] v> {
    h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
X = np.linspace(-1, 1, 16 * 4 * 8, dtype=np.float32).reshape(16, 4, 8)


def refused(model: onnx.ModelProto, match: str) -> None:
    with pytest.raises(GraphError, match=match) as caught:
        g.admit(model)
    assert "\n" not in str(caught.value)


# ---- types -----------------------------------------------------------------------------------------------------


def test_sequences_maps_and_optionals_are_refused_by_name() -> None:
    model = parse_model("(float[4] x) => (float[4] y) { y = Relu(x) parts = SplitToSequence(x) }")
    model.graph.output.add().name = "parts"
    refused(model, "output 'parts' is of the type sequence, only tensors are supported")
    g.load(model)  # what only edits graphs takes it
    for kind in ("sequence_type", "optional_type", "map_type"):
        model = parse_model("(float[4] x) => (float[4] y) { y = Relu(x) }")
        info = model.graph.input.add(name="other")
        if kind == "map_type":
            info.type.map_type.key_type = 7
            info.type.map_type.value_type.tensor_type.elem_type = 1
        else:
            getattr(info.type, kind).elem_type.tensor_type.elem_type = 1
        refused(model, f"input 'other' is of the type {kind.removesuffix('_type')}")


def test_an_input_without_a_rank_or_a_type_is_refused_by_name() -> None:
    model = parse_model(TEXT)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    refused(model, "input 'x' has no shape, not even a number of dimensions")
    model = parse_model(TEXT)
    model.graph.input[0].ClearField("type")
    refused(model, "input 'x' has no (element type|shape)")


def test_a_compile_of_them_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model = parse_model(TEXT)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(GraphError, match=r"m\.onnx: input 'x' has no shape"):
        nmcompile.compile(tmp_path / "m.onnx", tmp_path / "m.plan", calibration=[{"x": X}], tuning="off")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_sizes_that_no_array_has_are_refused() -> None:
    for dims, match in (([1 << 62, 4], "no array is as large"), ([1] * 65, "65 dimensions"), ([2] * 63, "no array")):
        for kind in ("input", "initializer"):
            model = parse_model(TEXT)
            if kind == "input":
                info = helper.make_tensor_value_info("x", 1, dims)
                model.graph.input[0].CopyFrom(info)
            else:
                del model.graph.initializer[0].dims[:]
                model.graph.initializer[0].dims.extend(dims)
            refused(model, f"{kind} '.' .*{match}" if "dimensions" in match else match)


@pytest.mark.parametrize("how", ["initializer", "constant node", "weight of a layer"])
def test_an_output_that_is_a_constant_is_handed_out(how: str, tmp_path: Path) -> None:
    model = parse_model(TEXT)
    if how == "weight of a layer":
        model.graph.output.append(helper.make_tensor_value_info("w", 1, [8, 8]))
    else:
        model.graph.output.append(helper.make_tensor_value_info("k", 1, [3]))
        k = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "k")
        if how == "initializer":
            model.graph.initializer.append(k)
        else:
            model.graph.node.append(helper.make_node("Constant", [], ["k"], value=k))
    assert_same_outputs(g.load(model), g.admit(model))
    nmcompile.compile(model, tmp_path / "m.plan", calibration=[{"x": X}], tuning="off")
    found = nmcompile.load(tmp_path / "m.plan").run({"x": X[:2]})
    wanted = g.run(g.load(model), {"x": X[:2]})
    name = model.graph.output[1].name
    np.testing.assert_array_equal(found[name], wanted[name])
    assert found["y"].shape == wanted["y"].shape


def test_float64_layers_stay_as_they_are(tmp_path: Path) -> None:
    model = parse_model("(double[b,s,8] x) => (double[b,s,8] y) <double[8,8] w> { y = MatMul(x, w) }")
    data = {"x": X.astype(np.float64)}
    result = nmcompile.compile(model, tmp_path / "m.plan", calibration=[data], tuning="off")
    assert any("float64, which is not quantized" in note for note in result.notes)
    found = nmcompile.load(tmp_path / "m.plan").run(data)["y"]
    np.testing.assert_allclose(found, g.run(g.load(model), data)["y"])


# ---- names of dimensions -----------------------------------------------------------------------------------------


def test_one_name_for_two_sizes_is_parted_by_axis() -> None:
    graph = parse("(int64[n,n] ids, float[n,n,4] x, float[m] z) => (float[n,n,4] y) { y = Relu(x) }")
    same = [{"ids": np.zeros((3, 3)), "x": np.zeros((3, 3, 4)), "z": np.zeros(7)}]
    assert g.separate_dims(graph, same) is graph
    parted = g.separate_dims(graph, [*same, {"ids": np.zeros((3, 5)), "x": np.zeros((3, 5, 4)), "z": np.zeros(7)}])
    assert [info.shape for info in g.inputs(parted)] == [("n", "n_1"), ("n", "n_1", 4), ("m",)]
    assert g.outputs(parted)[0].shape == ("n", "n_1", 4)
    assert g.inputs(graph)[0].shape == ("n", "n")


def test_a_model_that_calls_batch_and_tokens_alike_compiles(tmp_path: Path) -> None:
    model = parse_model(TEXT.replace("b,s,8", "n,n,8"))
    nmcompile.compile(model, tmp_path / "m.plan", calibration=[{"x": X}], tuning="off")
    session = nmcompile.load(tmp_path / "m.plan")
    for shape in ((2, 4, 8), (3, 7, 8), (5, 5, 8)):
        x = np.resize(X, shape)
        wanted = g.run(parse(TEXT), {"x": x})["y"]
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, atol=0.05 * np.abs(wanted).max())


# ---- budgets of reading ------------------------------------------------------------------------------------------


def functions(bodies: dict[str, list[str]], node_size: int = 0) -> onnx.ModelProto:
    """A model of local functions; each body is a list of operators that are called one after another."""
    made = []
    for name, body in bodies.items():
        nodes = [helper.make_node(op, ["a" if i == 0 else f"t{i}"], [f"t{i + 1}" if i + 1 < len(body) else "o"],
                                  domain="l" if op in bodies else "", doc_string="x" * node_size)
                 for i, op in enumerate(body)]  # fmt: skip
        made.append(helper.make_function("l", name, ["a"], ["o"], nodes,
                                         [helper.make_opsetid("", 17), helper.make_opsetid("l", 1)]))  # fmt: skip
    graph = helper.make_graph([helper.make_node(list(bodies)[-1], ["x"], ["y"], domain="l")], "g",
                              [helper.make_tensor_value_info("x", 1, [1])],
                              [helper.make_tensor_value_info("y", 1, [1])])  # fmt: skip
    return helper.make_model(graph, functions=made, ir_version=9,
                             opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("l", 1)])  # fmt: skip


def test_functions_that_double_are_counted_before_they_are_inlined() -> None:
    chain = {"f0": ["Relu", "Relu"]} | {f"f{i}": [f"f{i - 1}"] * 2 for i in range(1, 40)}
    with pytest.raises(BudgetError, match="2,199,023,255,551 nodes with its functions inlined"):
        g.load(functions(chain))
    few = {"f0": ["Relu", "Relu"]} | {f"f{i}": [f"f{i - 1}"] * 2 for i in range(1, 6)}
    assert len(g.load(functions(few)).nodes) == 64
    with pytest.raises(BudgetError, match="unfold to"):
        g.load(functions({"f0": ["Relu"] * 2} | {f"f{i}": [f"f{i - 1}"] * 2 for i in range(1, 12)}, 200_000))


def test_functions_that_call_themselves_are_refused() -> None:
    for bodies in ({"f0": ["Relu", "f0"]}, {"f0": ["f1"], "f1": ["f2"], "f2": ["f0"]}):
        with pytest.raises(GraphError, match="calls itself"):
            g.load(functions(bodies))


def test_more_nodes_than_can_be_worked_on_are_refused_at_once() -> None:
    model = parse_model("(float[1] x) => (float[1] y) { y = Relu(x) }")
    model.graph.node.extend([onnx.NodeProto(op_type="Relu")] * NODES)
    start = time.monotonic()
    with pytest.raises(BudgetError, match="100,001 nodes"):
        g.load(model)
    assert time.monotonic() - start < 5


def test_sparse_weights_together_stay_within_a_budget() -> None:
    def with_sparse(count: int, size: int) -> onnx.ModelProto:
        model = parse_model("(float[1] x) => (float[1] y) { y = Relu(x) }")
        for i in range(count):
            values = onnx.numpy_helper.from_array(np.ones(1, np.float32), f"w{i}")
            where = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i")
            model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [size]))
        return model

    g.load(with_sparse(3, 1 << 22))
    for model in (with_sparse(1, 1 << 28), with_sparse(30, 1 << 22)):
        with pytest.raises(BudgetError, match="too large to be made dense"):
            g.load(model)


def test_nodes_of_one_name_get_names_of_their_own_in_linear_time() -> None:
    text = "  ".join(f"t{i + 1} = Relu(t{i})" for i in range(3000))
    model = parse_model(f"(float[1] t0) => (float[1] t3000) {{ {text} }}")
    for node in model.graph.node:
        node.name = "same"
    start = time.monotonic()
    graph = g.load(model)
    assert [node.name for node in graph.nodes[:3]] == ["same", "same_1", "same_2"]
    assert len({node.name for node in graph.nodes}) == 3000 and time.monotonic() - start < 10


def test_fields_of_a_message_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "FIELDS", 1000)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x01" * 1001)
    with pytest.raises(GraphError, match="more than 1,000 fields"):
        g.load(tmp_path / "m.onnx")


def test_what_is_no_regular_file_is_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, match in ((tmp_path / "pipe.onnx", "not a regular file"), (Path("/dev/zero"), "not a regular file"),
                        (tmp_path, "is a folder")):  # fmt: skip
        with pytest.raises(GraphError, match=match):
            g.load(path)


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", "../w.bin", "/etc/passwd", "w.bin/../../w.bin"])
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    model = parse_model(TEXT)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "256")):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(256))
    (tmp_path / "m" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NmcompileError, match=r"leaves the model's folder|is missing"):
        nmcompile.compile(tmp_path / "m" / "m.onnx", None, calibration=[{"x": X}], tuning="off")
    with pytest.raises(GraphError, match=r"in another file|load the model from its path"):
        g.load(model)


def test_attributes_that_name_other_files_are_refused() -> None:
    """onnxruntime would read them when the model is run."""
    for kind in ("tensors", "sparse_tensor"):
        model = parse_model("(float[1] x) => (float[1] y) { y = other.Op(x) }")
        attribute = model.graph.node[0].attribute.add(name="a")
        tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        if kind == "tensors":
            attribute.type = onnx.AttributeProto.TENSORS
            attribute.tensors.append(tensor)
        else:
            attribute.type = onnx.AttributeProto.SPARSE_TENSOR
            attribute.sparse_tensor.values.CopyFrom(tensor)
        with pytest.raises(GraphError, match="tensors in other files, which is refused"):
            g.load(model)


def test_an_empty_name_in_the_place_of_an_input_is_refused() -> None:
    model = parse_model(TEXT)
    model.graph.node[0].input[1] = ""
    with pytest.raises(GraphError, match=r"lacks its input 1 \(B\)"):
        g.load(model)
