"""A canonical constant knows its initializer in the source file, and how it was cut, turned and scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, parse, parse_model

from nmcompile import ir as g
from nmcompile.calibrate import Calibration, open_data
from nmcompile.errors import GraphError
from nmcompile.ir.provenance import Permute
from nmcompile.passes import FoldConstants, InsertQdq, MagnitudePrune, PermuteFeatures, StoreWeights
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes

MODELS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))}
SMALL = 64  # elements up to which a constant may be one that an exporter computed: a scale, a mask's number

Arrays = dict[str, np.ndarray]


def initializers(model: onnx.ModelProto) -> Arrays:
    """By onnx's own reading of the file; what Constant operators give, too."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def canonical(model: onnx.ModelProto | Path) -> gs.Graph:
    return Pipeline(canonical_passes()).run(g.load(model))[0]


def constants(graph: gs.Graph) -> list[gs.Constant]:
    return [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]


def traced(tensor: gs.Tensor, file: Arrays) -> g.Source:
    """The tensor's source, which gives its values bit for bit."""
    known, values = g.source(tensor), g.constant(tensor)
    assert known is not None and values is not None and not known.computed and not known.changed, tensor.name
    found = known.of(file)
    assert found.dtype == values.dtype and found.shape == values.shape and found.tobytes() == values.tobytes()
    return known


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_every_model_is_traced_to_its_file(name: str) -> None:
    model = onnx.load(MODELS[name])
    graph, file = canonical(MODELS[name]), initializers(model)
    checked = 0
    for tensor in constants(graph):
        known = g.source(tensor)
        if tensor.values.size > SMALL and tensor.values.dtype.kind == "f":
            assert traced(tensor, file)
            checked += 1
        elif known is not None and not known.computed:
            assert traced(tensor, file)
    assert checked >= (0 if name == "control-flow" else 4)
    layers = g.linear_layers(graph)
    for layer in layers:
        traced(g.weight_of(layer), file)
        bias = g.bias_of(layer)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            traced(bias, file)
    keys = g.layer_keys(graph)
    assert list(keys) == [layer.name for layer in layers] and len(set(keys.values())) == len(layers)
    assert not any("@" in key for key in keys.values())


def check(text: str, opset: int = 20) -> tuple[gs.Graph, list[g.Source]]:
    """(the canonical graph, the source of each layer's weight), all traced."""
    model = parse_model(text, opset)
    graph, file = canonical(model), initializers(model)
    for layer in g.linear_layers(graph):
        bias = g.bias_of(layer)
        assert bias is None or traced(bias, file)
    return graph, [traced(g.weight_of(layer), file) for layer in g.linear_layers(graph)]


def test_gemm() -> None:
    graph, (turned, scaled) = check("""(float[N,4] x) => (float[N,3] y)
        <float[8,4] w, float[8] b, float[8,3] v, float[1] c> {
        h = Gemm <transB = 1> (x, w, b)  r = Relu(h)  y = Gemm <alpha = 0.5, beta = 2.0> (r, v, c) }""")
    assert turned == g.Source(("w",), (g.Transpose((1, 0)),))
    assert scaled == g.Source(("v",), (g.Scale(0.5),))
    bias = g.bias_of(g.linear_layers(graph)[1])
    assert bias is not None and g.source(bias) == g.Source(("c",), (g.Scale(2.0), g.Broadcast((3,))))
    assert g.layer_keys(graph) == {"Gemm_0": "w", "Gemm_2": "v"}


MERGED = """(float[B,S,8] x) => (float[B,S,8] y) <float[24,8] w, float[24] b> {
    t = Transpose <perm = [1, 0]> (w)  m = MatMul(x, t)  a = Add(m, b)
    q, k, v = Split <axis = -1, num_outputs = 3> (a)  s = Mul(q, k)  y = Add(s, v) }"""


def test_merged_projections() -> None:
    graph, sources = check(MERGED)
    assert [known.operations for known in sources] == [
        (g.Transpose((1, 0)), g.Slice(1, start, start + 8)) for start in (0, 8, 16)
    ]
    assert list(g.layer_keys(graph).values()) == ["w[0: 0-8]", "w[0: 8-16]", "w[0: 16-24]"]
    biases = [g.bias_of(layer) for layer in g.linear_layers(graph)]
    assert [g.source(bias).key for bias in biases if bias is not None] == ["b[0: 0-8]", "b[0: 8-16]", "b[0: 16-24]"]  # type: ignore[union-attr]


def test_a_shared_weight() -> None:
    graph, sources = check("""(float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4,4] w> {
        y = Gemm <transB = 1> (x, w)  r = Relu(y)  z = Gemm <transB = 1> (r, w) }""")
    assert sources[0] == sources[1] == g.Source(("w",), (g.Transpose((1, 0)),))
    first, second = g.linear_layers(graph)
    assert g.weight_of(first) is g.weight_of(second)
    assert g.layer_keys(graph) == {first.name: f"w@{first.name}", second.name: f"w@{second.name}"}


@pytest.mark.parametrize(("nodes", "operations"), [
    ("f = Transpose <perm = [1, 0]> (w)  t = Transpose <perm = [1, 0]> (f)", ()),
    ("t = Slice(w, zero, eight, one, two)", (g.Take(1, (0, 2, 4, 6)),)),
    ("t = Slice(w, minus, least, one, back)", (Permute(1, (7, 6, 5, 4, 3, 2, 1, 0)),)),
    ("t = Slice(w, two, eight, one)", (g.Slice(1, 2, 8),)),
    ("t = Gather <axis = 1> (w, order)", (g.Take(1, (7, 1, 1)),)),
    ("s = Gather <axis = 0> (w, two)  t = Squeeze(s, zero)", (g.Slice(0, 2, 3), g.Reshape((8,)))),
    ("t, u = Split <axis = 1> (w, parts)", (g.Slice(1, 0, 3),)),
    ("u, t = Split <axis = 1> (w, parts)", (g.Slice(1, 3, 8),)),
    ("t = Reshape(w, to)", (g.Reshape((8, 4)),)),
    ("f = Flatten <axis = 0> (w)  t = Unsqueeze(f, zero)", (g.Reshape((1, 32)), g.Reshape((1, 1, 32)))),
    ("s = Slice(w, zero, one, zero)  t = Expand(s, wide)", (g.Slice(0, 0, 1), g.Broadcast((4, 8)))),
])  # fmt: skip
def test_what_folding_does_to_a_constant(nodes: str, operations: tuple[g.Operation, ...]) -> None:
    model = parse_model(f"""(float[1] x) => (y) <float[4,8] w, int64[1] zero, int64[1] one, int64[1] two,
        int64[1] eight, int64[1] minus, int64[1] least, int64[1] back, int64[3] order, int64[2] parts, int64[2] to,
        int64[2] wide> {{ {nodes}  y = Add(t, x) }}""")
    given = {"zero": [0], "one": [1], "two": [2], "eight": [8], "minus": [-1], "least": [-100], "back": [-1],
             "order": [-1, 1, 1], "parts": [3, 5], "to": [-1, 4], "wide": [4, 8]}  # fmt: skip
    for tensor in model.graph.initializer:
        if tensor.name in given:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(given[tensor.name]), tensor.name))
    graph, _ = apply(FoldConstants(), g.load(model))
    (node,) = graph.nodes
    assert traced(node.inputs[0], initializers(model)).operations == operations


def test_arithmetic_is_said_to_be_computed() -> None:
    graph, _ = apply(FoldConstants(), parse("""(float[1] x) => (float[4,8] y) <float[4,8] w, float[8] v> {
        s = Mul(w, v)  t = Transpose <perm = [1, 0]> (s)  u = Transpose <perm = [1, 0]> (t)  y = Add(u, x) }"""))
    (node,) = graph.nodes
    known = g.source(node.inputs[0])
    assert known == g.Source(("w", "v"), computed=True) and g.source(graph.inputs[0]) is None
    with pytest.raises(GraphError, match="computed from w, v cannot be traced"):
        known.of({})


def test_half_precision_is_widened() -> None:
    _, (known,) = check("(float16[N,4] x) => (float16[N,3] y) <float16[4,3] w> { y = MatMul(x, w) }")
    assert known.operations == (g.Cast("float32"),)


# ---- what passes do to it after ------------------------------------------------------------------------------

FEED_FORWARD = """(float[N,8] x) => (float[N,8] y) <float[8,16] w, float[16] b, float[16,8] v, float[8] c> {
    m = MatMul(x, w)  a = Add(m, b)  r = Relu(a)  n = MatMul(r, v)  y = Add(n, c) }"""


def test_copies_and_extracts_keep_it() -> None:
    graph = canonical(parse_model(MERGED))
    layer = g.linear_layers(graph)[1]
    for other in (g.copy(graph), g.extract(graph, [layer.y.name]), g.load(graph)):
        found = next(item for item in g.linear_layers(other) if item.name == layer.name)
        assert g.source(g.weight_of(found)) == g.source(g.weight_of(layer)) is not None
        assert g.source(g.bias_of(found)) == g.source(g.bias_of(layer)) is not None


def test_a_weight_that_is_set_stays_in_its_place() -> None:
    graph = canonical(parse_model(MERGED))
    keys = g.layer_keys(graph)
    layer = g.linear_layers(graph)[1]
    before = g.source(g.weight_of(layer))
    g.set_weight(graph, layer, layer.weight * 0)
    g.set_bias(graph, layer, np.ones(8, np.float32))
    after, bias = g.source(g.weight_of(layer)), g.bias_of(layer)
    assert before is not None and after is not None and bias is not None
    assert after.changed and after.operations == before.operations and after.initializers == ("w",)
    assert g.source(bias) == g.Source(("b",), (g.Slice(0, 8, 16),), changed=True)
    assert g.layer_keys(graph) == keys


def test_features_in_another_order() -> None:
    model = parse_model(FEED_FORWARD)
    graph, file = canonical(model), initializers(model)
    keys = g.layer_keys(graph)
    data = open_data([{"x": np.random.default_rng(3).standard_normal((64, 8)).astype(np.float32)}], g.inputs(graph))
    permuted, (report,) = Pipeline([PermuteFeatures()], calibration=Calibration(data)).run(graph)
    assert report.changed == 1
    first, second = g.linear_layers(permuted)
    made, read = traced(g.weight_of(first), file), traced(g.weight_of(second), file)
    (outputs,), (inputs,) = made.operations, read.operations
    assert isinstance(outputs, Permute) and isinstance(inputs, Permute)
    assert (outputs.axis, inputs.axis) == (1, 0) and outputs.order == inputs.order
    assert sorted(outputs.order) == list(range(16))
    bias = g.bias_of(first)
    assert bias is not None and traced(bias, file).operations == (Permute(0, outputs.order),)
    assert g.permuted(g.Source(("w",)), outputs.order, 1) == made
    assert g.layer_keys(permuted) == keys == {first.name: "w", second.name: "v"}


def test_one_key_from_the_file_to_the_quantized_graph() -> None:
    graph = canonical(parse_model(MERGED))
    keys = g.layer_keys(graph)
    feeds = [{"x": np.random.default_rng(3).standard_normal((4, 8, 8)).astype(np.float32)}]
    calibration = Calibration(open_data(feeds, g.inputs(graph)))
    quantized, _ = Pipeline([MagnitudePrune(sparsity=0.5), InsertQdq()], calibration=calibration).run(graph)
    assert all(layer.quantized for layer in g.linear_layers(quantized))
    assert g.layer_keys(quantized) == keys
    stored, _ = Pipeline([StoreWeights()]).run(quantized)
    floats = [t for t in constants(stored) if t.values.shape == (8, 8)]
    assert [g.source(t).key for t in floats] == list(keys.values())  # type: ignore[union-attr]
