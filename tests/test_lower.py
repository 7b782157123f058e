"""Partition and lowering: what is fused, what falls out, how weights are packed."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from compiled import compiled
from onnx_text import parse

from nmcompile import ir as g
from nmcompile.backends.cpu.lower import lower
from nmcompile.backends.cpu.pack import halved, pack, pack_blocks, pack_dense
from nmcompile.backends.cpu.partition import partition
from nmcompile.plan import read_plan

FFN = """(float[batch,tokens,8] x, int64[batch,tokens] ids) => (float[batch,tokens,8] y)
    <float[8,16] w1, float[16] b1, float[16,8] w2, float[8] b2, float[8] gamma, float[8] beta> {
    h = MatMul(x, w1)  hb = Add(h, b1)  a = Gelu(hb)  o = MatMul(a, w2)  ob = Add(o, b2)  r = Add(ob, x)
    y = LayerNormalization <axis = -1> (r, gamma, beta) }"""


def steps(graph: gs.Graph) -> list[list[str]]:
    segments = lower(graph).header["segments"]
    assert isinstance(segments, list)
    return [[step["step"] for step in s["steps"]] if s["kind"] == "native" else s["operators"] for s in segments]


def test_activation_and_residual_go_into_the_linear_step() -> None:
    graph = parse(FFN)
    assert steps(graph) == [["enter", "linear_float", "linear_float", "layer_norm", "leave"]]
    header = lower(graph).header["segments"][0]  # type: ignore[index]
    first, second = (step for step in header["steps"] if step["step"] == "linear_float")
    assert (first["activation"], first["residual"]) == ("gelu", -1)
    assert (second["activation"], second["residual"]) == ("none", 0)


def test_a_value_that_is_an_output_too_is_not_fused_away() -> None:
    outputs = "=> (float[batch,tokens,8] y, float[batch,tokens,16] hb)"
    graph = parse(FFN.replace("=> (float[batch,tokens,8] y)", outputs))
    assert steps(graph) == [["enter", "linear_float", "unary", "linear_float", "layer_norm", "leave", "leave"]]


def test_one_layer_alone_does_not_pay() -> None:
    graph = parse("(float[batch,tokens,8] x) => (float[batch,tokens,4] y) <float[8,4] w> { y = MatMul(x, w) }")
    found = partition(graph)
    assert [segment.native for segment in found.segments] == [False]
    assert "too little around it runs natively" in found.reasons[0]


def test_segments_alternate_and_never_wait_for_each_other() -> None:
    middle = "s = Sin(hb)  a = Gelu(s)"
    graph = parse(FFN.replace("a = Gelu(hb)", middle)
                  .replace("o = MatMul(a, w2)", "o2 = MatMul(a, w2)  o = MatMul(o2, w3)")
                  .replace("float[8] gamma", "float[8,8] w3, float[8] gamma")
                  .replace("h = MatMul(x, w1)", "x2 = MatMul(x, w0)  h = MatMul(x2, w1)")
                  .replace("<float[8,16] w1", "<float[8,8] w0, float[8,16] w1"))  # fmt: skip
    found = partition(graph)
    assert [segment.native for segment in found.segments] == [True, False, True]
    ready = {"x", "ids"}
    for segment in found.segments:
        assert set(segment.inputs) <= ready, segment
        ready |= set(segment.outputs)
    assert any(node.op == "Sin" for node in found.segments[1].nodes)


def test_what_only_fed_matched_nodes_is_gone() -> None:
    made = compiled("roberta-torchscript")
    kinds = [segment["kind"] for segment in read_plan(made.plan).header["segments"]]
    assert kinds == ["native"]  # CumSum, Equal and Not of the positions are part of the embedding


def test_an_inner_value_that_is_an_output_is_made_by_onnxruntime() -> None:
    graph = g.load(compiled("bert-torchscript").qdq)
    shares = next(node for node in graph.nodes if node.op == "Softmax").outputs[0]
    graph.outputs.append(shares)
    header = lower(graph).header["segments"]
    assert isinstance(header, list)
    made = {name: segment["kind"] for segment in header for name in segment["outputs"]}
    assert made[shares.name] == "onnxruntime" and made["last_hidden_state"] == "native"


def test_smoothing_goes_into_the_normalisation() -> None:
    header = read_plan(compiled("bert-torchscript").plan).header["segments"][0]
    norms = [step for step in header["steps"] if step["step"] == "layer_norm"]
    assert sum(step.get("q_mul") is not None for step in norms) == 4
    assert not any(step["step"] in ("affine", "quantize") for step in header["steps"])


def test_keys_that_are_outputs_too_are_written_in_both_forms() -> None:
    graph = g.load(compiled("bert-torchscript").qdq)
    attention = next(node for node in graph.nodes if node.op == "Softmax")
    product = g.producer(g.producer(g.producer(attention.inputs[0]).inputs[0]).inputs[0])  # type: ignore[union-attr]
    keys = g.producer(g.producer(product.inputs[1]).inputs[0]).inputs[0]  # type: ignore[union-attr]
    source = g.producer(g.producer(keys).inputs[0]).inputs[0]  # type: ignore[union-attr]  # behind Q and DQ
    graph.outputs.append(source)
    found = steps(graph)
    assert len(found) == 1 and found[0].count("linear") == 13 and found[0].count("leave") == 3


# ---- packing -------------------------------------------------------------------------------------------------


def unpacked(arrays: dict[str, np.ndarray], rows: int, shape: tuple[int, int]) -> np.ndarray:
    n, k = shape
    weight = np.zeros((-(-n // rows) * rows, -(-k // 4) * 4), np.int8)
    for group in range(len(arrays["starts"]) - 1):
        for block in range(arrays["starts"][group], arrays["starts"][group + 1]):
            column = 4 * int(arrays["columns"][block])
            weight[group * rows : (group + 1) * rows, column : column + 4] = arrays["values"][block]
    return weight[:n, :k]


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (33, 20)])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_blocks_hold_every_weight(shape: tuple[int, int], rows: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.integers(-127, 128, shape) * (rng.random(shape) < 0.2)).astype(np.int8)
    arrays = pack_blocks(weight, rows)
    np.testing.assert_array_equal(unpacked(arrays, rows, shape), weight)
    assert arrays["values"].any(axis=(1, 2)).all()  # no empty block is stored


def test_dense_tiles_are_outputs_by_inputs() -> None:
    weight = np.arange(8 * 8, dtype=np.int8).reshape(8, 8)
    tiles = pack_dense(weight)
    assert tiles.shape == (2, 2, 4, 4)
    np.testing.assert_array_equal(tiles[1, 0], weight[4:, :4])


@pytest.mark.parametrize(("rows", "share"), [(2, 0.2), (4, 0.2), (16, 0.1)])
def test_the_format_follows_the_blocks_that_are_there(rows: int, share: float) -> None:
    rng = np.random.default_rng(0)
    keep = np.kron(rng.random((64 // rows, 16)) < share, np.ones((rows, 4)))
    packed = pack((rng.integers(1, 127, (64, 64)) * keep).astype(np.int8))
    assert packed.format == "blocks"
    assert packed.rows == rows or rows > packed.rows >= 4  # from 4 rows on, cutting a block in two costs nothing
    assert packed.share == pytest.approx(keep.mean())


def test_a_full_weight_is_dense() -> None:
    assert pack(np.ones((64, 64), np.int8)).format == "dense"


def test_tables_are_halved_where_that_loses_nothing() -> None:
    table = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    assert halved(table).dtype == np.float16
    np.testing.assert_allclose(halved(table), table, rtol=1e-3, atol=1e-6)
    for scale in (1e6, 1e-7):  # beyond float16, and where it has too few digits left
        assert halved(table * np.float32(scale)).dtype == np.float32
