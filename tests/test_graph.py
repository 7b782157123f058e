"""graph: loading, saving, copying and editing, quirk by quirk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import assert_same_outputs, parse, parse_model, seeded

from nmcompile import ir as g
from nmcompile.errors import GraphError
from nmcompile.ir import linear

MODELS = sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))
TWO_LAYERS = """(float[N,4] x) => (float[N,3] y) <float[4,8] w1, float[8] b1, float[8,3] w2> {
    h = MatMul(x, w1)  a = Add(h, b1)  r = Relu(a)  y = MatMul(r, w2) }"""
CAPTURE = """(float[N,4] x, bool flag) => (float[N,4] y) <float[4,4] w> {
    h = MatMul(x, w)
    t = Relu(h)
    y = If(flag) <
        then_branch = yes () => (float[N,4] z) { z = MatMul(t, w) },
        else_branch = no () => (float[N,4] z) { u = Neg(t) z = Add(u, x) }
    > }"""


def tensor(graph: gs.Graph, name: str) -> gs.Tensor:
    return graph.tensors()[name]


# ---- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_reference_models_survive_copying_and_saving(path: Path, tmp_path: Path) -> None:
    graph = g.load(path)
    text = g.to_text(graph)
    assert g.to_text(g.copy(graph)) == text
    assert g.to_text(g.load(g.to_model(graph))) == text
    for external in (False, True):
        g.save(graph, tmp_path / "saved.onnx", external=external)
        assert g.to_text(g.load(tmp_path / "saved.onnx")) == text
    g.save(g.load(tmp_path / "saved.onnx"), tmp_path / "saved.onnx", external=False)  # over its own source
    assert_same_outputs(graph, g.load(tmp_path / "saved.onnx"), atol=0)


def test_text_of_a_graph(golden: Callable[[str], str]) -> None:
    assert g.to_text(parse(TWO_LAYERS)) == golden("graph/two_layers")
    assert g.to_text(parse(CAPTURE)) == golden("graph/capture")


def test_a_callers_model_is_left_alone() -> None:
    model = parse_model(CAPTURE)
    before = model.SerializeToString(deterministic=True)
    graph = g.load(model)
    for layer in g.linear_layers(graph):
        g.set_weight(graph, layer, layer.weight * 0)
    g.infer_shapes(graph)
    g.to_model(graph)
    assert model.SerializeToString(deterministic=True) == before


def test_loaded_weights_cannot_be_written_into() -> None:
    weight = g.linear_layers(parse(TWO_LAYERS))[0].weight
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
                                   np.int8, np.uint16, np.bool_, ml_dtypes.int4, ml_dtypes.uint4])  # fmt: skip
@pytest.mark.parametrize("external", [False, True])
def test_every_element_type_survives(dtype: type, external: bool, tmp_path: Path) -> None:
    values: np.ndarray = (np.arange(3000).reshape(30, 100) % 7).astype(dtype)
    y = gs.Variable("y", np.dtype(dtype), [30, 100])
    graph = gs.Graph([gs.Node("Identity", "copy", inputs=[gs.Constant("w", values)], outputs=[y])], [], [y], opset=23)
    g.save(graph, tmp_path / "m.onnx", external=external)
    found = g.constant(g.load(tmp_path / "m.onnx").outputs[0])
    assert found is not None and found.dtype == np.dtype(dtype)
    assert (found == values).all()


def test_strings_sparse_initializers_and_constant_nodes() -> None:
    model = parse_model("""(float[2,3] x) => (float[2,3] y, float[2] z, int64 i, string[2] s) {
        f = Constant <value_floats = [1.5, 2.5]> ()  z = Identity(f)  i = Constant <value_int = 7> ()
        s = Constant <value_strings = ["a", "b"]> ()  y = Add(x, w) }""")
    values = onnx.numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.array([1, 5], np.int64), "at")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [2, 3]))
    graph = g.load(model)
    assert [node.op for node in graph.nodes] == ["Identity", "Add"]
    found = g.run(graph, {"x": np.zeros((2, 3), np.float32)})
    assert found["y"].tolist() == [[0, 2, 0], [0, 0, 3]]
    assert found["z"].tolist() == [1.5, 2.5] and found["i"] == 7
    assert [item.decode() if isinstance(item, bytes) else item for item in found["s"]] == ["a", "b"]


def test_model_functions_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        agraph (float[N,64] x) => (float[N,64] y) { h = own.twice(x)  y = own.twice(h) }
        <domain: "own", opset_import: ["" : 20]> twice (a) => (b) { t = Add(a, a)  b = Relu(t) }""")
    model.graph.node.append(onnx.helper.make_node("MatMul", ["y", "w"], ["z"]))
    model.graph.output[0].name = "z"
    model.graph.initializer.append(onnx.numpy_helper.from_array(seeded("w", [64, 64]), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    for source in (model, tmp_path / "m.onnx"):
        graph = g.load(source)
        assert [node.op for node in graph.nodes] == ["Add", "Relu", "Add", "Relu", "MatMul"]
        x = np.ones((1, 64), np.float32)
        np.testing.assert_allclose(g.run(graph, {"x": x})["z"], 4 * x @ seeded("w", [64, 64]), atol=1e-4)


def test_metadata_versions_and_rare_attributes_survive() -> None:
    model = parse_model("""(float[N,4] x) => (seq(float[N,2]) y, float[N,4] z) <int64 k> {
        y = SplitToSequence <axis = 1> (x, k)  z = com.microsoft.FusedGelu <alpha = 1.0, none: ints = []> (x)
        }""")
    onnx.helper.set_model_props(model, {"author": "me"})
    model.producer_name, model.domain, model.model_version, model.doc_string = "tool", "d", 3, "text"
    again = g.to_model(g.load(g.to_model(g.load(model))))
    assert {item.key: item.value for item in again.metadata_props} == {"author": "me"}
    assert (again.producer_name, again.domain, again.model_version, again.doc_string) == ("tool", "d", 3, "text")
    assert {item.domain: item.version for item in again.opset_import} == {"": 20, "com.microsoft": 1}
    assert again.graph.output[0].type.WhichOneof("value") == "sequence_type"
    assert again.graph.node[1].attribute[1].type == onnx.AttributeProto.INTS


def test_integers_given_for_float_attributes_are_written_as_floats() -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y) { y = LeakyRelu <alpha = 0.5> (x) }")
    graph.nodes[0].attrs["alpha"] = 1
    assert g.run(graph, {"x": -np.ones((1, 4), np.float32)})["y"][0, 0] == -1


def test_old_models_that_list_initializers_as_inputs() -> None:
    model = parse_model(TWO_LAYERS, opset=11)
    model.ir_version = 3
    model.graph.input.extend(onnx.helper.make_tensor_value_info(i.name, 1, i.dims) for i in model.graph.initializer)
    graph = g.load(model)
    assert [info.name for info in g.inputs(graph)] == ["x"]
    assert len(g.linear_layers(graph)) == 2
    g.run(graph, g.random_feeds(g.inputs(graph)))


def test_nodes_get_names_of_their_own_and_shapes() -> None:
    model = parse_model(TWO_LAYERS)
    model.graph.node[0].name = model.graph.node[1].name = "same"
    graph = g.load(model)
    assert len({node.name for node in graph.nodes}) == 4
    assert [(t.dtype, t.shape) for t in (tensor(graph, "h"), tensor(graph, "r"))] == [(np.float32, ["N", 8])] * 2
    assert str(g.inputs(graph)[0]) == "x: float32[N, 4]"


def test_unsorted_models_are_sorted() -> None:
    model = parse_model(TWO_LAYERS)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [node.op for node in g.load(model).nodes] == ["MatMul", "Add", "Relu", "MatMul"]


def test_a_chain_deeper_than_pythons_stack() -> None:
    x = gs.Variable("x", np.dtype(np.float32), [1])
    nodes, last = [], x
    for index in range(3000):
        y = gs.Variable(f"t{index}", np.dtype(np.float32), [1])
        nodes.append(gs.Node("Relu", f"n{index}", inputs=[last], outputs=[y]))
        last = y
    graph = gs.Graph(nodes[::-1], [x], [last], opset=20)
    g.cleanup(graph)
    g.verify(g.copy(graph), "test")
    assert graph.nodes[0].name == "n0" and len(g.extract(graph, ["t10"]).nodes) == 11


# ---- subgraphs ----------------------------------------------------------------------------------------------


def test_captured_tensors_survive(tmp_path: Path) -> None:
    graph = g.load(parse_model(CAPTURE))
    copied = g.copy(graph)
    graph.nodes[:] = graph.nodes[::-1]
    g.cleanup(graph)
    g.verify(graph, "test")
    g.save(copied, tmp_path / "m.onnx")
    for other in (copied, g.load(tmp_path / "m.onnx"), g.extract(graph, ["y"])):
        for flag in (True, False):
            feeds = {"x": seeded("x", [2, 4]), "flag": np.array(flag)}
            np.testing.assert_array_equal(g.run(graph, feeds)["y"], g.run(other, feeds)["y"])


def test_a_weight_shared_with_a_subgraph_is_one_initializer_and_stays_shared() -> None:
    graph = g.copy(parse(CAPTURE))
    model = g.to_model(graph)
    assert [item.name for item in model.graph.initializer] == ["w"]
    assert not any(a.g.initializer for node in model.graph.node for a in node.attribute)
    layer = g.linear_layers(graph)[0]
    g.set_weight(graph, layer, np.zeros_like(layer.weight))
    assert not g.run(graph, {"x": np.ones((1, 4), np.float32), "flag": np.array(True)})["y"].any()


def test_rewire_reaches_subgraphs() -> None:
    graph = parse(CAPTURE)
    g.rewire(graph, tensor(graph, "t"), tensor(graph, "h"))
    g.cleanup(graph)
    g.verify(graph, "test")
    assert [node.op for node in graph.nodes] == ["MatMul", "If"]


def test_large_weights_of_one_name_in_two_branches_stay_apart(tmp_path: Path) -> None:
    branch = "{name} = {name} () => (float[N,20] z) {{ z = {op}(x, w) }}"
    text = "(float[N,20] x, bool c) => (float[N,20] y) { y = If(c) <THEN, ELSE> }".replace(
        "THEN", branch.format(name="then_branch", op="Add")).replace(
        "ELSE", branch.format(name="else_branch", op="Mul"))  # fmt: skip
    model = parse_model(text)
    for attribute, value in zip(model.graph.node[0].attribute, (2.0, 3.0), strict=True):
        weight = onnx.numpy_helper.from_array(np.full((20, 20), value, np.float32), "w")
        attribute.g.initializer.append(weight)
    expected = g.run(g.load(model), {"x": np.ones((20, 20), np.float32), "c": np.array(True)})["y"]
    g.save(g.copy(g.load(model)), tmp_path / "m.onnx")
    graph = g.load(tmp_path / "m.onnx")
    assert (g.run(graph, {"x": np.ones((20, 20), np.float32), "c": np.array(True)})["y"] == expected).all()
    assert {values.flat[0] for sub in graph.subgraphs() for node in sub.nodes
            for values in [node.inputs[1].values]} == {2.0, 3.0}  # fmt: skip


def test_large_weights_of_a_branch_are_kept_apart_from_the_message() -> None:
    graph = parse("""(float[N,20] x, bool c) => (float[N,20] y) <float[20,20] w> { y = If(c) <
        then_branch = a () => (float[N,20] z) { z = MatMul(x, w) },
        else_branch = b () => (float[N,20] z) { z = Neg(x) }> }""")
    model, weights = g.weightless(graph)
    assert list(weights) == ["w"] and len(model.SerializeToString()) < 1000


# ---- editing ------------------------------------------------------------------------------------------------


def test_rewire_keeps_the_name_of_an_output() -> None:
    graph = parse(TWO_LAYERS)
    bias = gs.Constant("b2", np.ones(3, np.float32))
    new = gs.Variable("with_bias", np.dtype(np.float32), ["N", 3])
    graph.nodes.append(gs.Node("Add", "add", inputs=[graph.outputs[0], bias], outputs=[new]))
    before = g.run(graph, {"x": np.ones((1, 4), np.float32)})["y"]
    g.rewire(graph, graph.outputs[0], new)
    g.cleanup(graph)
    g.verify(graph, "test")
    np.testing.assert_allclose(g.run(graph, {"x": np.ones((1, 4), np.float32)})["y"], before + 1)


@pytest.mark.parametrize("source", ["x", "w1", "h"])
def test_rewire_of_an_output_to_what_cannot_take_its_name(source: str) -> None:
    graph = parse("(float[4,4] x) => (float[4,4] y, float[4,4] h) <float[4,4] w1> { h = MatMul(x, w1) y = Relu(h) }")
    g.rewire(graph, graph.outputs[0], tensor(graph, source))
    g.cleanup(graph)
    g.verify(graph, "test")
    assert [info.name for info in g.outputs(graph)] == ["y", "h"]
    g.run(graph, {"x": np.ones((4, 4), np.float32)})


def test_producers_consumers_and_constants() -> None:
    graph = parse("(float[N,4] x) => (float[N,4] y) <float[4] c> { d = Identity(c)  t = Mul(x, x)  y = Add(t, d) }")
    x, d = graph.inputs[0], tensor(graph, "d")
    assert [node.op for node in g.consumers(x)] == ["Mul"]
    assert g.producer(x) is None and g.constant(x) is None
    found = g.constant(d)
    assert found is not None and (found == seeded("c", [4])).all()
    assert g.is_output(graph, graph.outputs[0]) and not g.is_output(graph, d)
    assert g.fresh(graph, "t") == "t_1" and g.fresh(graph, "new") == "new"


def test_extract_takes_the_cone_and_may_be_cut() -> None:
    graph = parse(TWO_LAYERS)
    assert [node.op for node in g.extract(graph, ["a"]).nodes] == ["MatMul", "Add"]
    part = g.extract(graph, ["y"], ["a", "x"])
    assert [node.op for node in part.nodes] == ["Relu", "MatMul"]
    assert [info.name for info in g.inputs(part)] == ["a"]
    with pytest.raises(GraphError, match="no tensor 'nothing'"):
        g.extract(graph, ["nothing"])
    with pytest.raises(GraphError, match="input 'x' is needed"):
        g.extract(graph, ["y"], ["w2"])


def test_extract_cut_beside_another_output_of_the_same_node() -> None:
    graph = parse("(float[N,4] x) => (float[N,2] y) { a, b = Split <axis = 1, num_outputs = 2> (x)  y = Add(a, b) }")
    part = g.extract(graph, ["y"], ["x", "a"])
    feeds = {"x": np.ones((1, 4), np.float32), "a": np.full((1, 2), 5, np.float32)}
    assert g.run(part, feeds)["y"].tolist() == [[6, 6]]


# ---- linear layers ------------------------------------------------------------------------------------------


def test_linear_layers() -> None:
    first, second = g.linear_layers(parse(TWO_LAYERS))
    assert first.weight.shape == (8, 4) and first.bias is not None and first.y.name == "a"
    np.testing.assert_array_equal(first.weight, seeded("w1", [4, 8]).T)
    assert second.bias is None and second.y.name == "y" and not second.quantized


@pytest.mark.parametrize("text", [
    "(float[N,4] x) => (float[N,4] y, float[N,4] h) <float[4,4] w, float[4] b> { h = MatMul(x, w) y = Add(h, b) }",
    "(float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4] b> { h = MatMul(x, w) a = Add(h, b) y = Mul(a, h) }",
    "(float[N,4] x) => (float[N,4] y) <float[4,4] w, float[1] b> { h = MatMul(x, w) y = Add(h, b) }",
    "(float[N,4] x) => (float[N,4] y) <float[4,4] w> { h = MatMul(x, w) y = Add(h, h) }",
])  # fmt: skip
def test_an_add_that_is_no_bias(text: str) -> None:
    assert [layer.bias for layer in g.linear_layers(parse(text))] == [None]


def test_quantized_layers_are_dequantized() -> None:
    graph = parse("""(float[N,4] x) => (float[N,2] y) <int8[4,2] q, float[2] s, int8[2] z> {
        w = DequantizeLinear <axis = 1> (q, s, z)  y = MatMul(x, w) }""")
    layer = g.linear_layers(graph)[0]
    expected = (seeded("q", [4, 2], 3).astype(np.float32) - seeded("z", [2], 3)) * seeded("s", [2])
    np.testing.assert_allclose(layer.weight, expected.T)
    assert layer.quantized
    with pytest.raises(GraphError, match="is quantized"):
        g.set_weight(graph, layer, layer.weight)


def test_setting_a_shared_weight_changes_all_its_users_but_no_other_graph() -> None:
    source = parse("""(float[N,4] x) => (float[N,4] y) <float16[4,4] w> {
        h = Cast <to = 10> (x)  a = MatMul(h, w)  b = MatMul(a, w)  y = Cast <to = 1> (b) }""")
    graph = g.copy(source)
    first, _ = g.linear_layers(graph)
    g.set_weight(graph, first, np.eye(4, dtype=np.float32))
    x = np.ones((1, 4), np.float32)
    assert (g.run(graph, {"x": x})["y"] == x).all()
    assert (g.linear_layers(source)[0].weight == seeded("w", [4, 4], 10).T).all()
    with pytest.raises(GraphError, match="outputs x inputs"):
        g.set_weight(graph, first, np.ones((2, 4), np.float32))


# ---- shapes -------------------------------------------------------------------------------------------------


def test_shapes_are_renewed_after_an_edit_and_kept_where_inference_knows_less() -> None:
    graph = parse(TWO_LAYERS)
    tensor(graph, "h").shape = ["stale", 99]
    g.infer_shapes(graph)
    assert tensor(graph, "h").shape == ["N", 8]
    custom = parse("(float[N,4] x) => (float[N,4] y) <float[N,4] h> { h = com.microsoft.New(x)  y = Relu(h) }")
    assert tensor(custom, "h").shape == ["N", 4] and tensor(custom, "y").shape == ["N", 4]


def test_weights_are_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of layers costs no dequantizing; what a layer was found with, it keeps."""
    graph = parse("""(float[N,4] x) => (float[N,4] y) <int8[4,4] w, float s, float[4,4] v> {
        d = DequantizeLinear(w, s)  a = MatMul(x, d)  y = MatMul(a, v) }""")
    read: list[tuple[int, ...]] = []
    spread = linear._spread

    def counted(values: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
        read.append(shape)
        return spread(values, shape, axis, block)

    monkeypatch.setattr(linear, "_spread", counted)
    first, second = g.linear_layers(graph)
    assert first.shape == (4, 4) and not read
    assert first.weight is first.weight and read == [(4, 4)]
    g.set_weight(graph, second, np.zeros((4, 4), np.float32))
    assert second.weight.any()
    again = g.linear_layers(graph)[1]
    assert not again.weight.any()
