"""TensorRT's rules for sparsity, for where Q/DQ pairs stand and for types: each finds its own break, and no other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tensorrt_graphs import VERSIONS, Edit, Net, block, gemm, int8_attention, layer, seeded

from nmcompile.backends.tensorrt.findings import Finding
from nmcompile.backends.tensorrt.rules import check

STRONG = ("10", "11")


def found(net: Net, notes: bool = False) -> list[Finding]:
    findings = check(net.finished(), net.profile)
    return [finding for finding in findings if notes or finding.level != "note"]


# ---- sparsity -----------------------------------------------------------------------------------------------


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """The weight [K, N] of a layer, changed; its scales stay."""

    def edit(net: Net) -> None:
        node = net.node(f"{name}/weight/q")
        values = np.array(node.inputs[0].values, np.float32)
        node.inputs[0] = net.constant(f"{name}/changed", change(values))

    return edit


def one_group(values: np.ndarray) -> np.ndarray:
    values[0:4, 0] = 0.1
    return values


def along_the_outputs(values: np.ndarray) -> np.ndarray:
    return values.T * np.float32(0.9)  # within the scales of the outputs


def nearly_zeros(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.float32(1e-4), values)


def dense(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.float32(0.1), values)


def float_result(net: Net) -> None:
    net.skip("out/out")


def sized(k: int, n: int, sparse: bool = True, shape: list[object] | None = None) -> Callable[[str], Net]:
    return lambda version: layer(version, k, n, sparse, shape=shape)


def nothing(net: Net) -> None:
    pass


# ---- placement ----------------------------------------------------------------------------------------------


def second_pair(net: Net) -> None:
    net.node("key/MatMul").inputs[0] = net.pair("again", net.node("x/q").inputs[0])


def pair_before_gelu(net: Net) -> None:
    y = net.pair("early", net.out("up/bias"))
    net.node("gelu/div").inputs[0] = y
    net.node("gelu/mul").inputs[0] = y


def pair_before_relu(net: Net) -> None:
    relu = net.op("Relu", "relu", net.pair("early", net.out("one/bias")))
    net.node("one/out/q").inputs[0] = relu


def pair_before_bias(net: Net) -> None:
    net.node("one/bias").inputs[0] = net.pair("early", net.out("one/MatMul"))


def only_values(net: Net) -> None:
    net.node("context").inputs[1] = net.pair("v8", net.node("context").inputs[1])


def all_but_the_softmax(net: Net) -> None:
    int8_attention(net)
    net.skip("p8")


def all_but_the_result(net: Net) -> None:
    int8_attention(net)
    net.skip("context/flat")


def all_of_it(net: Net) -> None:
    int8_attention(net)


def stranded(net: Net) -> None:
    net.branch(net.pair("late", net.op("Exp", "exp", net.out("x/dq"))))


def quantized_gain(net: Net) -> None:
    norm = net.node("first/norm")
    small = net.pair("gain", net.constant("first/narrow_gain", np.ones(256)))
    norm.inputs[1] = net.cast("gain/wide", small, 1)


def quantized_norm(net: Net) -> None:
    wide = net.node("first/wide") if net.profile.strong else net.node("first/norm")
    wide.inputs[0] = net.pair("residual", net.out("first/residual"))


def quantized_table(net: Net) -> None:
    table = net.pair("table", net.constant("rows", seeded(8, 4, False)))
    net.branch(net.op("Gather", "embed", table, net.input("ids", ["B"], np.int32)))


def quantized_bias(net: Net) -> None:
    net.node("one/bias").inputs[1] = net.pair("bias", net.constant("one/long", np.full(256, 0.1)), 0.01)


def quantized_bias_of_gemm(net: Net) -> None:
    net.node("gemm").inputs[2] = net.pair("bias", net.constant("gemm/long", np.full(256, 0.1)), 0.01)


def double(net: Net) -> None:
    net.branch(net.op("Cast", "narrow", net.constant("wide", [1.0, 2.0], np.float64), to=1))


def double_input(net: Net) -> None:
    net.branch(net.op("Cast", "narrow", net.input("wide", ["B"], np.float64), to=1))


def double_result(net: Net) -> None:
    net.branch(net.op("Cast", "narrow", net.op("Cast", "widen", net.graph.inputs[0], to=11), to=1))


def large_integer(net: Net) -> None:
    ids = net.input("ids", ["B"], np.int64)
    net.branch(net.op("Cast", "small", net.op("Add", "far", ids, net.constant("large", 1 << 40, np.int64)), to=6))


# ---- types --------------------------------------------------------------------------------------------------


def no_cast_before_norm(net: Net) -> None:
    net.node("first/norm").inputs[0] = net.node("first/wide").inputs[0]


def no_cast_after_norm(net: Net) -> None:  # the pair y follows in FP32, and its reader up with it
    net.node("second/residual").inputs[1] = net.out("first/norm")


def int8_operand(net: Net) -> None:
    net.branch(net.op("Relu", "relu", net.out("x/q")))


def declared(net: Net) -> None:
    net.graph.outputs[0].dtype = np.dtype(np.float16)


def wide_power(net: Net) -> None:
    net.branch(net.op("Pow", "square", net.out("x/dq"), net.constant("two", 2.0, np.float32)))


def table_scale(net: Net) -> None:  # DQ gives the type of its scale, whatever the tensors around it are
    node = net.node("one/weight/dq")
    node.inputs[1] = net.constant("wide", node.inputs[1].values, np.float32)


BREAKS: list[tuple[str, tuple[str, ...], Callable[[str], Net], Edit]] = [
    ("S1", VERSIONS, block, weight("out", one_group)),
    ("S1", VERSIONS, layer, weight("one", along_the_outputs)),
    ("S1", VERSIONS, lambda version: layer(version, 254, 256), nothing),
    ("S2", VERSIONS, sized(256, 264), nothing),
    ("S2", VERSIONS, sized(272, 256), nothing),
    ("S3", VERSIONS, layer, weight("one", nearly_zeros)),
    ("S4", VERSIONS, block, weight("key", dense)),
    ("S5", VERSIONS, block, float_result),
    ("S5", VERSIONS, lambda version: layer(version, out=False), nothing),
    ("S6", VERSIONS, sized(256, 128), nothing),
    ("S6", VERSIONS, sized(64, 256), nothing),
    ("S7", VERSIONS, sized(256, 8, sparse=False), nothing),
    ("S7", VERSIONS, sized(256, 1, sparse=False), nothing),
    ("S7", VERSIONS, sized(256, 256, shape=[1, 1]), nothing),
    ("P1", VERSIONS, block, second_pair),
    ("P2", VERSIONS, block, pair_before_gelu),
    ("P2", VERSIONS, layer, pair_before_relu),
    ("P2", VERSIONS, layer, pair_before_bias),
    ("P3", VERSIONS, block, only_values),
    ("P3", VERSIONS, block, all_but_the_softmax),
    ("P3", VERSIONS, block, all_but_the_result),  # a note of S5 besides: the layer behind it is float
    ("P3", VERSIONS, lambda version: block(version, heads=2), all_of_it),
    ("P3", VERSIONS, lambda version: block(version, length=640), all_of_it),
    ("P4", VERSIONS, layer, stranded),
    ("P5", VERSIONS, block, quantized_gain),
    ("P5", VERSIONS, block, quantized_norm),
    ("P5", VERSIONS, layer, quantized_table),
    ("P5", VERSIONS, layer, quantized_bias),
    ("P5", VERSIONS, lambda version: gemm(version, False), quantized_bias_of_gemm),
    ("P6", VERSIONS, layer, double),
    ("P6", VERSIONS, layer, double_input),
    ("P6", VERSIONS, layer, double_result),
    ("P6", ("8.6",), layer, large_integer),
    ("T1", STRONG, block, no_cast_before_norm),
    ("T1", STRONG, block, no_cast_after_norm),
    ("T1", STRONG, layer, int8_operand),
    ("T1", STRONG, layer, declared),
    ("T1", STRONG, layer, wide_power),
    ("T1", STRONG, layer, table_scale),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "version", "build", "edit"),
    [(rule, version, build, edit) for rule, versions, build, edit in BREAKS for version in versions],
)
def test_a_broken_rule_is_found_alone(rule: str, version: str, build: Callable[[str], Net], edit: Edit) -> None:
    net = build(version)
    edit(net)
    findings = found(net)
    assert {finding.rule for finding in findings} == {rule}, [str(finding) for finding in findings]
    assert all(finding.node and finding.what and finding.remedy for finding in findings)
    assert {finding.level for finding in findings} == {"error" if rule == "T1" else "warning"}


# ---- near misses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [weight("one", dense), float_result])
def test_a_dense_layer_may_give_float_and_need_not_be_2_4(edit: Edit) -> None:
    net = layer("10", out=edit is not float_result)
    weight("one", dense)(net)
    assert found(net, notes=True) == []


def test_int8_attention_of_short_known_length_is_clean() -> None:
    assert found(int8_attention(block("10", length=512)), notes=True) == []


def test_heads_that_fp16_attention_does_not_fuse_are_noted() -> None:
    (finding,) = found(block("10", heads=64), notes=True)
    assert (finding.rule, finding.level, finding.node) == ("P3", "note", "softmax")


def test_integers_of_8_6_are_noted_and_the_end_of_a_slice_may_be_far() -> None:
    net = layer("8.6")
    ids = net.input("ids", ["B", 8], np.int64)
    ends = [net.constant(name, [value], np.int64) for name, value in (("0", 0), ("far", (1 << 63) - 1), ("axis", 1))]
    net.branch(net.op("Cast", "small", net.op("Slice", "slice", ids, *ends), to=6))
    findings = [finding for finding in found(net, notes=True) if finding.rule == "P6"]
    assert [(finding.level, finding.node) for finding in findings] == [("note", "tensor ids")]


def test_the_pair_of_a_2_4_layer_may_stand_before_a_norm() -> None:
    net = block("10")
    net.node("first/wide").inputs[0] = net.out("out/out/dq")
    assert found(net) == []
    weight("out", dense)(net)
    assert {finding.rule for finding in found(net)} == {"P5"}


def test_types_are_followed_into_subgraphs() -> None:
    from onnx_text import parse

    graph = parse("""(bool c, float16[4] x, float[4] y) => (float16[4] z) {
        z = If(c) <then_branch = then () => (float16[4] a) { a = Add(x, y) },
                   else_branch = other () => (float16[4] b) { b = Identity(x) }>
    }""", opset=19)  # fmt: skip
    findings = check(graph, block("10").profile)
    assert [(finding.rule, "mixes types" in finding.what) for finding in findings] == [("T1", True)]
    assert check(graph, block("8.6").profile)[0].rule == "Q12"
