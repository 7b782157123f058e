"""InsertQdq: what is quantized, with which scales, and what stays float."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_text import apply, parse
from pruning_cases import DOWN, HEAD, MODEL, POOLER, SHARED, UP, calibrated, same

from nmcompile import ir as g
from nmcompile.errors import PassError
from nmcompile.passes import InsertQdq

ENCODER = """(float[B,S,8] x, int64[B,S] mask) => (float[B,S,8] y{outputs})
    <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo, float[8] bq, float[8] gamma, float[8] beta> {{
    by_head = Constant <value_ints = [0, 0, 2, 4]> ()  flat = Constant <value_ints = [0, 0, 8]> ()
    half = Constant <value_float = 0.5> ()  middle = Constant <value_ints = [1, 2]> ()
    zero = Constant <value_float = 0.0> ()  low = Constant <value_float = -3.4028235e38> ()
    m = MatMul(x, wq)  q = Add(m, bq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    qr = Reshape(q, by_head)  qh = Transpose <perm = [0, 2, 1, 3]> (qr)
    kr = Reshape({k}, by_head)  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
    vr = Reshape(v, by_head)  vh = Transpose <perm = [0, 2, 1, 3]> (vr)
    qk = MatMul(qh, kt)  s = Mul(qk, half)
    is = Cast <to = 9> (mask)  keep = Unsqueeze(is, middle)  bias = Where(keep, zero, low)  h = Add(s, bias)
    p = Softmax <axis = -1> (h)  c = MatMul(p, vh)  t = Transpose <perm = [0, 2, 1, 3]> (c)  f = Reshape(t, flat)
    o = MatMul(f, wo)  r = Add(o, x)  y = LayerNormalization <axis = -1> (r, gamma, beta) }}"""


def encoder(outputs: str = "", k: str = "k") -> gs.Graph:
    return parse(ENCODER.format(outputs=outputs, k=k))


def quantized(pass_: InsertQdq, graph: gs.Graph, atol: float = 0.1) -> gs.Graph:
    """The graph after the pass: valid, close to the float graph, left alone by a second run."""
    after, report = calibrated(pass_, graph)
    assert report.changed > 0
    onnx.checker.check_model(g.to_model(after), full_check=True)
    feeds = g.random_feeds(g.inputs(graph), 5, {"B": 4, "S": 6})
    for name, values in g.run(graph, feeds).items():
        found = g.run(after, feeds)[name]
        assert np.abs(found - values).max() < atol * np.abs(values).max()
    again, second = calibrated(pass_, after)
    assert second.changed == 0 and same(again, after)
    return after


def activations(graph: gs.Graph) -> dict[str, list[str]]:
    """Tensor -> types it is quantized to."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "QuantizeLinear":
            found.setdefault(node.inputs[0].name, []).append(str(node.inputs[2].values.dtype))
    return found


def test_before_and_after(golden: Callable[[str], str]) -> None:
    graph = encoder()
    assert g.to_text(graph) == golden("insert_qdq/before")
    text = g.to_text(quantized(InsertQdq(), graph))
    measured = re.compile(
        r"(int8/(?:scale|zero_point) \w+\[\]) \{[^}]*\}"
    )  # by onnxruntime: rounded as the CPU likes
    assert measured.sub(r"\1", text) == golden("insert_qdq/after")


def test_q_k_and_v_share_one_quantizer() -> None:
    after = quantized(InsertQdq(), encoder())
    assert activations(after) == {
        "x": ["uint8"], "f": ["uint8"], "qh": ["uint8"], "kt": ["int8"], "vh": ["int8"]}  # fmt: skip
    layers = g.linear_layers(after)
    assert len({id(layer.x) for layer in layers[:3]}) == 1 and all(layer.quantized for layer in layers)
    reads_float = next(node for node in after.nodes if node.op == "Add" and node.outputs[0].name == "r")
    assert [t.name for t in reads_float.inputs][1] == "x"  # the residual is not rounded


def test_a_projection_that_is_query_and_key_is_quantized_in_both_ways() -> None:
    after = quantized(InsertQdq(), encoder(k="q"))
    assert activations(after) == {
        "x": ["uint8"],
        "f": ["uint8"],
        "qh": ["uint8"],
        "kt": ["int8"],
        "vh": ["int8"],
    }


def test_pairs_stand_right_before_the_products() -> None:
    after = quantized(InsertQdq(), encoder())
    tensors = after.tensors()
    for name in ("qk", "c"):
        (product,) = tensors[name].inputs
        makers = [g.producer(t) for t in product.inputs]
        assert [node.op for node in makers if node is not None] == [
            "Softmax" if name == "c" else "DequantizeLinear", "DequantizeLinear"]  # fmt: skip


def test_scales_come_from_calibration() -> None:
    graph = encoder()
    after, report = calibrated(InsertQdq(), graph)
    infos = g.inputs(graph)
    runs = [
        g.run(graph, g.random_feeds(infos, seed, {"B": 4, "S": 6}), ["x", "k", "mask"]) for seed in (5, 6)
    ]
    real = {name: np.concatenate([run[name][run["mask"] != 0] for run in runs]) for name in ("x", "k")}
    for node in after.nodes:
        name = {"x": "x", "kt": "k"}.get(node.inputs[0].name)
        if node.op != "QuantizeLinear" or name is None:
            continue
        values, scale, zero = real[name], *(t.values.item() for t in node.inputs[1:])
        if name == "x":
            assert scale == pytest.approx((values.max() - values.min()) / 255, rel=1e-5)
            assert zero == round(-values.min() / scale)
        else:
            assert (scale, zero) == (pytest.approx(np.abs(values).max() / 127, rel=1e-5), 0)
    assert {"x", "kt"} <= set(activations(after))
    assert report.detail["layers"] == 4 and len(report.detail["activations"]) == 5  # type: ignore[arg-type]


def test_weights_have_a_scale_per_output() -> None:
    graph = encoder()
    after, _ = calibrated(InsertQdq(), graph)
    for old, new in zip(g.linear_layers(graph), g.linear_layers(after), strict=True):
        node = g.producer(new.node.inputs[1])
        assert node is not None and (node.op, node.attrs) == ("DequantizeLinear", {"axis": 1})
        stored, scale, zero = (t.values for t in node.inputs)
        assert (stored.dtype, scale.shape, zero.tolist()) == (np.int8, (8,), [0] * 8)
        assert np.abs(stored.astype(int)).max() == 127
        np.testing.assert_allclose(scale, np.abs(old.weight).max(1) / 127, rtol=1e-6)
        np.testing.assert_allclose(new.weight, old.weight, atol=float(scale.max()) * 0.501)


def test_int8_has_no_zero_points() -> None:
    after = quantized(InsertQdq(activations="int8"), encoder())
    assert set(map(tuple, activations(after).values())) == {("int8",)}
    points = [
        node.inputs[2].values for node in after.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert points and not any(point.any() for point in points)
    assert all(point.dtype == np.int8 for point in points)


@pytest.mark.parametrize("clip", ["min-max", "percentile", "entropy", "mse"])
def test_ways_to_clip(clip: str) -> None:
    quantized(InsertQdq(clip=clip), encoder(), atol=0.3)


def test_attention_can_stay_float() -> None:
    assert set(activations(quantized(InsertQdq(attention="float"), encoder()))) == {"x", "f"}


def test_heads_and_poolers_stay_float() -> None:
    graph = parse(MODEL)
    after, report = calibrated(InsertQdq(), graph)
    assert [layer.name for layer in g.linear_layers(after) if layer.quantized] == [UP, DOWN]
    assert report.notes == (f"{POOLER}: kept as it is, poolers stay float by default",
                            f"{HEAD}: kept as it is, heads stay float by default")  # fmt: skip
    assert all(layer.quantized for layer in g.linear_layers(quantized(InsertQdq(heads=True), graph)))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [((UP,), (), [UP]), ((), (UP,), [DOWN]), (("*",), (DOWN,), [UP, POOLER, HEAD]), ((HEAD,), (), [HEAD])],
)
def test_layers_are_chosen_by_name(
    include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
) -> None:
    after, report = calibrated(InsertQdq(include=include, exclude=exclude), parse(MODEL))
    assert [layer.name for layer in g.linear_layers(after) if layer.quantized] == expected
    assert len(report.notes) == 4 - len(expected)
    assert {"excluded by name", "not included by name", "poolers stay float by default",
            "heads stay float by default"} >= {note.split(": kept as it is, ")[1] for note in report.notes}  # fmt: skip


def test_quantized_layers_keep_their_scales() -> None:
    graph = parse("""(float[B,S,8] x) => (float[B,S,4] y) <int8[8,8] w, float[8,4] v> {
        scale = Constant <value_float = 0.125> ()  d = DequantizeLinear(w, scale)  m = MatMul(x, d)
        r = Relu(m)  n = MatMul(r, v)  y = Relu(n) }""")
    after, report = calibrated(InsertQdq(), graph)
    assert report.notes == ("MatMul_1: kept as it is, already quantized, its scales are kept",)
    assert list(activations(after)) == ["r"]
    kept = next(node for node in after.nodes if node.name == "DequantizeLinear_0")
    assert kept.inputs[0].name == "w" and kept.inputs[1].values == np.float32(0.125)


def test_a_shared_weight_is_quantized_once() -> None:
    after = quantized(InsertQdq(), parse(SHARED))
    assert len({id(layer.node.inputs[1]) for layer in g.linear_layers(after)}) == 1
    assert sum(node.op == "DequantizeLinear" for node in after.nodes) == 3  # x, its product and the weight


def test_zeros_of_a_pruned_weight_stay_zeros() -> None:
    graph = encoder()
    keep = np.arange(64).reshape(8, 8) % 4 == 0
    for layer in g.linear_layers(graph):
        g.set_weight(graph, layer, layer.weight * keep)
    after, _ = calibrated(InsertQdq(), graph)
    assert all(not layer.weight[~keep].any() for layer in g.linear_layers(after))


def test_graph_outputs_stay_float() -> None:
    graph = encoder(", float[B,S,8] q, float[B,S,8] f, float[B,2,4,S] kt")
    after = quantized(InsertQdq(), graph)
    assert [t.name for t in after.outputs] == ["y", "q", "f", "kt"]
    assert all(g.producer(t).op != "DequantizeLinear" for t in after.outputs)  # type: ignore[union-attr]
    assert set(activations(after)) == {"x", "f", "qh", "kt", "vh"}


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (
            InsertQdq(activations="uint4"),
            "activations=uint4 is not known; choose uint8 (CPU) or int8 (TensorRT)",
        ),
        (InsertQdq(), "needs calibration data"),
    ],
)
def test_errors_name_the_option(pass_: InsertQdq, message: str) -> None:
    with pytest.raises(PassError) as error:
        apply(pass_, encoder())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_clip_is_an_error() -> None:
    with pytest.raises(PassError, match="clip=median is not known; choose one of min-max, percentile"):
        calibrated(InsertQdq(clip="median"), encoder())


def test_ranges_by_the_error_of_the_outputs() -> None:
    """Never worse than any of the methods it chooses from, on the tokens it was shown."""
    graph = parse(MODEL)
    infos = g.inputs(graph)
    feeds = [g.random_feeds(infos, seed, {"B": 4, "S": 6}) for seed in (5, 6)]

    def lost(pass_: InsertQdq) -> float:
        after, _ = calibrated(pass_, graph)
        return sum(float(np.sum((g.run(after, feed, ["h"])["h"] - g.run(graph, feed, ["h"])["h"]) ** 2))
                   for feed in feeds)  # fmt: skip

    best = lost(InsertQdq(clip="output"))
    assert best <= 1.001 * min(lost(InsertQdq(clip=clip)) for clip in ("mse", "min-max"))


def test_biases_take_on_the_mean_of_rounding() -> None:
    graph = parse(MODEL)
    means = []
    for bias in (False, True):
        after, _ = calibrated(InsertQdq(bias=bias), graph)
        errors = []
        for seed in (5, 6):
            feed = g.random_feeds(g.inputs(graph), seed, {"B": 4, "S": 6})
            errors.append((g.run(after, feed, ["a"])["a"] - g.run(graph, feed, ["a"])["a"]).reshape(-1, 16))
        means.append(np.abs(np.concatenate(errors).mean(axis=0)).max())
    assert means[1] < 1e-5 < means[0]


def test_the_softmax_too_where_asked() -> None:
    after = quantized(InsertQdq(activations="int8", softmax=True), encoder())
    assert activations(after)["p"] == ["int8"]
    pair = next(node for node in after.nodes if node.op == "QuantizeLinear" and node.inputs[0].name == "p")
    assert float(pair.inputs[1].values) == pytest.approx(1 / 127)
    assert "p" not in activations(quantized(InsertQdq(activations="int8"), encoder()))
