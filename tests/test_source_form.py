"""Weights of a canonical graph go back into the initializers of the file that it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse, parse_model

import nmcompile
from nmcompile import ir as g
from nmcompile.errors import GraphError
from nmcompile.input_roles import inputs
from nmcompile.made_up import made_up
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes
from nmcompile.source_form import in_source_form

MODELS = sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))


def canonical(graph: gs.Graph) -> gs.Graph:
    return Pipeline(canonical_passes()).run(graph)[0]


def changed(graph: gs.Graph, seed: int = 0) -> gs.Graph:
    """With other weights, biases and normalisations, half of the weights zero."""
    made, rng = g.copy(graph), np.random.default_rng(seed)
    for layer in g.linear_layers(made):
        weight = layer.weight + rng.normal(0, 0.1, layer.weight.shape).astype(np.float32)
        g.set_weight(made, layer, weight * (rng.random(weight.shape) < 0.5))
    for node in made.nodes:
        for place, tensor in enumerate(node.inputs[1:3], 1):
            if node.op == "LayerNormalization" and isinstance(tensor, gs.Constant):
                values = np.asarray(tensor.values) + rng.normal(0, 0.1, tensor.shape).astype(np.float32)
                node.inputs[place] = g.changed(gs.Constant(g.fresh(made, "fitted"), values), tensor)
    return made


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_takes_its_weights_back(path: Path) -> None:
    source = g.admit(path)
    wanted = changed(canonical(source))
    if not g.linear_layers(wanted):
        return
    found = in_source_form(source, wanted, canonical)
    assert [(node.op, node.name) for node in found.nodes] == [(node.op, node.name) for node in source.nodes]
    assert found.opset == source.opset and {t.name for t in found.inputs} == {t.name for t in source.inputs}
    feeds = made_up(inputs(source), 2, 8)
    given, expected = g.run(found, feeds), g.run(wanted, feeds)
    before = g.run(source, feeds)
    near = 2e-3 if path.stem.endswith("fp16") else 2e-4  # a file in half computes in half
    for name, values in expected.items():
        np.testing.assert_allclose(given[name], values, atol=near * max(1.0, float(np.abs(values).max())))
    assert any(not np.allclose(before[name], given[name], atol=1e-3) for name in given)


def test_merged_turned_and_scaled_weights() -> None:
    source = g.load(parse_model("""(float[B,S,8] x) => (float[B,S,8] y) <float[24,8] w, float[24] b, float[8,8] o> {
        t = Transpose <perm = [1, 0]> (w)  m = MatMul(x, t)  a = Add(m, b)
        q, k, v = Split <axis = -1, num_outputs = 3> (a)  s = Mul(q, k)  u = Add(s, v)  y = MatMul(u, o) }"""))
    wanted = changed(canonical(source))
    found = in_source_form(source, wanted, canonical)
    held = {t.name: np.asarray(t.values) for t in found.tensors().values() if isinstance(t, gs.Constant)}
    layers = g.linear_layers(wanted)
    np.testing.assert_array_equal(held["w"], np.concatenate([layer.weight for layer in layers[:3]]))
    np.testing.assert_array_equal(held["o"], layers[3].weight.T)


def test_narrow_weights_are_rounded_to_their_type_and_zeros_stay() -> None:
    model = parse_model("""(float[B,8] x) => (float[B,4] y) <float16[8,4] w> {
        v = Cast <to = 1> (w)  y = MatMul(x, v) }""")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((8, 4), np.float16), "w"))
    source = g.load(model)
    wanted = changed(canonical(source))
    found = in_source_form(source, wanted, canonical)
    (held,) = [np.asarray(t.values) for t in found.tensors().values() if isinstance(t, gs.Constant)]
    weight = g.linear_layers(wanted)[0].weight.T
    np.testing.assert_array_equal(held, weight.astype(np.float16))
    assert held.dtype == np.float16 and ((held == 0) == (weight == 0)).all()


@pytest.mark.parametrize(("text", "message"), [
    ("""(float[N,4] x) => (float[N,4] y) <float[4,4] w> {
        z = MatMul(x, w)  r = Relu(z)  u = Exp(w)  y = MatMul(r, u) }""",
     "computed from w, which cannot take it back"),
    ("""(float[N,4] x, int64[N] i) => (float[N,4] y, float[N,4] z) <float[4,4] w> {
        t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, t)  z = Gather(w, i) }""",
     "something else reads w as well"),
])  # fmt: skip
def test_what_cannot_be_put_back_is_said(text: str, message: str) -> None:
    source = parse(text)
    wanted = canonical(source)
    first = g.linear_layers(wanted)[0]
    last = g.linear_layers(wanted)[-1]
    for layer in {first.name: first, last.name: last}.values():
        g.set_weight(wanted, layer, layer.weight * 0.5)
    with pytest.raises(GraphError, match=message):
        in_source_form(source, wanted, canonical)


def test_features_in_another_order_stay_so() -> None:
    source = g.admit(next(path for path in MODELS if path.stem == "bert-dynamo"))
    wanted = canonical(source)
    first, second = next((a, b) for a in g.linear_layers(wanted) for b in g.linear_layers(wanted)
                         if a.shape[0] == 2 * a.shape[1] == b.shape[1])  # fmt: skip
    order = np.arange(first.shape[0])[::-1]
    g.reorder(wanted, first, order, outputs=True)
    g.reorder(wanted, second, order, outputs=False)
    feeds = made_up(inputs(source), 2, 8)
    for name, values in g.run(source, feeds).items():
        np.testing.assert_allclose(g.run(wanted, feeds)[name], values, atol=1e-4)
    with pytest.raises(GraphError, match="features stand in another order"):
        in_source_form(source, wanted, canonical)


def test_training_writes_the_model_that_came(tmp_path: Path) -> None:
    path, out = next(path for path in MODELS if path.stem == "bert-dynamo"), tmp_path / "sparse.onnx"
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(5, 60, int(rng.integers(4, 20))).tolist()} for _ in range(64)]
    found = nmcompile.train(path, out, data=rows, solver="magnitude", sparsity=0.5, steps=2, budget="60s", tokens=128)
    before, after = onnx.load(path), onnx.load(out)
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]
    assert after.opset_import[0].version == before.opset_import[0].version
    names = {tensor.name for tensor in before.graph.initializer}
    assert names <= {tensor.name for tensor in after.graph.initializer}
    assert not any("canonical form" in note for note in found.notes)
