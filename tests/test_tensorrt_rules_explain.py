"""What explain says of each layer, how products and their weights are found, and what `inspect --target` prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tensorrt_graphs import Net, block, conv, gemm, int8_attention, layer, seeded

from nmcompile import ir as g
from nmcompile.backends.tensorrt.gemms import gemms, merge_groups
from nmcompile.backends.tensorrt.rules import check, explain
from nmcompile.backends.tensorrt.verdicts import LayerVerdict
from nmcompile.cli import cli

MODELS = Path(__file__).parents[1] / "models"


def explained(net: Net) -> list[LayerVerdict]:
    return explain(net.finished(), net.profile)


def only(net: Net) -> LayerVerdict:
    (verdict,) = explained(net)
    return verdict


def replaced(net: Net, name: str, values: np.ndarray) -> Net:
    net.node(f"{name}/weight/q").inputs[0] = net.constant(f"{name}/other", values)
    return net


# ---- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["8.6", "10", "11"])
def test_a_block_as_it_is_emitted_is_sparse_throughout(version: str) -> None:
    verdicts = explained(block(version))
    assert [verdict.name.split("/")[0] for verdict in verdicts] == ["query", "key", "value", "out", "up", "down"]
    assert {(v.verdict, v.why, v.epilogue, v.int8, v.pattern) for v in verdicts} == {
        ("sparse INT8 likely", "", "int8", True, True)
    }
    assert [(v.outputs, v.inputs) for v in verdicts][-2:] == [(512, 256), (256, 512)]


@pytest.mark.parametrize("net", [conv("10"), gemm("10", True), gemm("10", False), int8_attention(block("8.6"))])
def test_other_products_are_found(net: Net) -> None:
    assert {(v.verdict, v.inputs) for v in explained(net)} <= {("sparse INT8 likely", k) for k in (256, 512)}
    assert explained(net)


def test_dense_int8() -> None:
    verdict = only(layer("10", sparse=False))
    assert (verdict.verdict, verdict.pattern, verdict.why) == ("dense INT8", False, "not pruned")
    net = layer("10")
    values = seeded(256, 256, True)
    values[:4, 7] = 0.5
    assert only(replaced(net, "one", values)).why.startswith("not 2:4: 1 of 16384 groups of four inputs")
    assert "254 inputs are no multiple of 4" in only(layer("10", k=254)).why
    values = seeded(256, 256, True)
    assert only(replaced(net, "one", np.where(values == 0, 1e-4, values))).why == "2:4 only after rounding"


def test_eligible_but_likely_dense() -> None:
    said = "eligible, will likely stay dense"
    float_out = only(layer("10", out=False))
    assert (float_out.verdict, float_out.epilogue) == (said, "float")
    assert float_out.why == "the output 'leave:0' takes its result in float"
    odd = only(layer("10", n=264))
    assert (odd.verdict, odd.why) == (said, "264 outputs are no multiple of 32")
    narrow = only(layer("10", n=128))
    assert (narrow.verdict, narrow.why) == (said, "128 outputs are fewer than 256")
    both = only(layer("10", n=72, out=False))
    assert [part.split()[-1] for part in both.why.split("; ")] == ["float", "32"]  # the first two reasons


def test_a_dense_layer_beside_makes_its_group_dense() -> None:
    verdicts = {v.name: v for v in explained(replaced(block("10"), "key", seeded(256, 256, False)))}
    assert verdicts["key/MatMul"].verdict == "dense INT8"
    assert verdicts["query/MatMul"].verdict == "eligible, will likely stay dense"
    assert verdicts["query/MatMul"].why == "it may be merged with 'key/MatMul', which is dense"
    assert verdicts["out/MatMul"].verdict == "sparse INT8 likely"


def test_float() -> None:
    net = layer("10")
    net.skip("x")
    verdict = only(net)
    assert (verdict.verdict, verdict.int8, verdict.why) == ("float", False, "its input is not quantized")
    net.skip("one/weight")
    assert only(net).why == "its input is not quantized; its weight is not quantized"
    net = layer("10", sparse=False)
    net.skip("one/weight")
    assert only(net).why == "not pruned; its weight is not quantized"


def test_an_int8_constant_is_likely_with_a_doubt() -> None:
    net = layer("10")
    quantize = net.node("one/weight/q")
    levels = np.rint(quantize.inputs[0].values.astype(np.float32) / quantize.inputs[1].values.astype(np.float32))
    net.node("one/weight/dq").inputs[0] = net.constant("one/int8", levels, np.int8)
    verdict = only(net)
    assert verdict.verdict == "sparse INT8 likely" and "INT8 constant" in verdict.why and verdict.pattern


# ---- walking ------------------------------------------------------------------------------------------------


def test_a_weight_is_followed_through_transpose_and_reshape() -> None:
    net = Net("10")
    x = net.pair("x", net.cast("enter", net.input("x", ["B", "S", 256]), 10))
    values = seeded(256, 512, True)  # [K, N], stored as [1, N, K] and brought back behind the DQ
    scale = np.abs(values).max(axis=0) / 127 * 1.001
    stored = net.pair("w", net.constant("w", values.T[None]), scale, axis=1)
    flat = net.op("Reshape", "flat", stored, net.constant("shape", [512, 256], np.int64))
    y = net.op("MatMul", "product", x, net.op("Transpose", "turned", flat, perm=[1, 0]))
    net.output(net.cast("leave", net.pair("out", y), 1))
    verdict = only(net)
    assert (verdict.outputs, verdict.inputs, verdict.verdict) == (512, 256, "sparse INT8 likely")
    assert check(net.finished(), net.profile) == []


def test_scales_behind_a_transpose_are_told_by_where_they_end() -> None:
    net = gemm("10", transposed=True)
    for name in ("gemm/weight/q", "gemm/weight/dq"):
        net.node(name).attrs["axis"] = 1  # of [N, K]: along the inputs
    assert "Q11" in {finding.rule for finding in check(net.finished(), net.profile)}


@pytest.mark.parametrize(
    ("op", "kind"), [("Relu", "int8"), ("Sigmoid", "int8"), ("Exp", "float"), ("Softmax", "float")]
)
def test_epilogues(op: str, kind: str) -> None:
    net = layer("10")
    net.node("one/out/q").inputs[0] = net.op(op, "after", net.out("one/bias"))
    assert only(net).epilogue == kind


def test_silu_is_an_epilogue_and_a_gate_is_not() -> None:
    net = layer("10")
    y = net.out("one/bias")
    silu = net.op("Mul", "silu", y, net.op("Sigmoid", "sigmoid", y))
    net.node("one/out/q").inputs[0] = silu
    assert only(net).epilogue == "int8"
    net.node("one/out/q").inputs[0] = net.op("Mul", "gate", silu, net.node("x/q").inputs[0])
    verdict = only(net)
    assert verdict.epilogue == "float" and "'gate' (Mul)" in verdict.why


def test_a_float_reader_beside_the_pair_makes_the_result_float() -> None:
    net = layer("10")
    net.branch(net.op("Cast", "aside", net.out("one/bias"), to=1))
    assert only(net).epilogue == "float"


def test_merge_groups_go_by_the_quantized_tensor() -> None:
    groups = merge_groups(gemms(block("10").finished()))
    assert [[gemm.name for gemm in group] for group in groups] == [["query/MatMul", "key/MatMul", "value/MatMul"]]


# ---- the command --------------------------------------------------------------------------------------------


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *(str(word) for word in words)])


@pytest.fixture
def emitted(tmp_path: Path) -> Path:
    net = block("10")
    net.skip("out/out")
    net.node("x/q").inputs[2] = net.constant("three", 3, np.int8)
    g.save(net.finished(), tmp_path / "emitted.onnx")
    return tmp_path / "emitted.onnx"


def test_inspect_prints_layers_then_rules(emitted: Path) -> None:
    result = invoke(emitted, "--target", "tensorrt")
    assert result.exit_code == 0 and "by the rules of TensorRT 10" in result.stdout
    assert "eligible, will likely stay dense" in result.stdout and "sparse INT8 likely" in result.stdout
    lines = result.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("error Q1 x 1: "))
    assert lines[at + 1].startswith("  x/q: its zero point") and lines[at + 2].startswith("  remedy: give Q and DQ")
    assert lines[at + 3].startswith("warning S5 x 1: ") and lines[-1] == "1 error, 1 warning, 0 notes"


def test_inspect_prints_json(emitted: Path) -> None:
    result = json.loads(invoke(emitted, "--target", "tensorrt", "--trt-version", "11", "--json").stdout)
    assert (result["target"], result["trt_version"], len(result["layers"])) == ("tensorrt", "11", 6)
    assert {item["rule"] for item in result["findings"]} == {"Q1", "S5"}
    assert set(result["findings"][0]) == {"rule", "title", "level", "node", "what", "remedy"}


def test_inspect_of_clean_and_of_unquantized_models(tmp_path: Path) -> None:
    g.save(block("8.6").finished(), tmp_path / "clean.onnx")
    text = invoke(tmp_path / "clean.onnx", "--target", "tensorrt", "--trt-version", "8.6").stdout
    assert "0 errors, 0 warnings" in text and "and 3 more" in text  # notes of Q11
    text = invoke(MODELS / "bert-torchscript.onnx", "--target", "tensorrt").stdout
    assert "no rule is broken" in text and "/pooler/dense/Gemm" in text
    assert "/0/Conv" in invoke(MODELS / "cnn.onnx", "--target", "tensorrt").stdout


def test_inspect_refuses_in_one_line(tmp_path: Path) -> None:
    result = invoke(MODELS / "cnn.onnx", "--target", "tensorrt", "--trt-version", "9")
    assert result.exit_code == 1 and result.stderr == "error: TensorRT 9 has no profile; choose one of 8.6, 10, 11\n"
    (tmp_path / "model.plan").write_bytes(b"PK\x03\x04 what a plan begins with")
    result = invoke(tmp_path / "model.plan", "--target", "tensorrt")
    assert result.exit_code == 1 and "is a plan" in result.stderr and result.stderr.count("\n") == 1
    result = invoke(MODELS / "cnn.onnx", "--trt-version", "10")
    assert result.exit_code == 2 and "--target tensorrt" in result.stderr
