"""TensorRT's rules for Q, DQ and operators: graphs as they are emitted are clean, and each rule finds its own break."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import pytest
from tensorrt_graphs import VERSIONS, Edit, Net, block, conv, gemm, int8_attention, layer

from nmcompile.backends.tensorrt.findings import Finding
from nmcompile.backends.tensorrt.operators import IMPORTED, INTEGER
from nmcompile.backends.tensorrt.profiles import PROFILES, profile
from nmcompile.backends.tensorrt.rules import RULES, check, errors
from nmcompile.errors import UnsupportedError


def broken(net: Net, level: str = "error warning") -> set[str]:
    """Ids of the rules that the graph breaks."""
    return {finding.rule for finding in found(net) if finding.level in level}


def found(net: Net) -> list[Finding]:
    return check(net.finished(), net.profile)


# ---- what is emitted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("build", [
    block, layer, conv, lambda version: int8_attention(block(version)), lambda version: gemm(version, True),
    lambda version: gemm(version, False),
])  # fmt: skip
def test_what_is_emitted_is_clean(build: Callable[[str], Net], version: str) -> None:
    findings = found(build(version))
    assert [str(finding) for finding in findings if finding.level != "note"] == []
    assert {finding.rule for finding in findings} <= ({"Q11"} if version == "8.6" else set())


def test_an_int8_constant_is_clean_from_10_on_and_noted() -> None:
    net = layer("10")
    int8_weight(net)
    assert errors(found(net)) == [] and broken(net, "note") == {"Q10"}


def test_every_rule_says_where_it_is_from_and_what_helps() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert {rule.id for rule in RULES} == {
        *(f"Q{number}" for number in range(1, 13)), *(f"S{number}" for number in range(1, 8)),
        *(f"P{number}" for number in range(1, 7)), "T1", "U1", "U2",
    }  # fmt: skip
    assert all(rule.title and rule.source and rule.remedy and set(rule.versions) <= set(PROFILES) for rule in RULES)


def test_an_unknown_version_names_the_choices() -> None:
    with pytest.raises(UnsupportedError, match=r"9\.0 has no profile; choose one of 8\.6, 10, 11"):
        profile("9.0")


# ---- breaking one rule ----------------------------------------------------------------------------------------


def asymmetric(net: Net) -> None:
    net.node("x/q").inputs[2] = net.constant("three", 3, np.int8)


def unsigned(net: Net) -> None:
    net.node("x/q").inputs[2] = net.constant("zero", 0, np.uint8)


def computed_zero_point(net: Net) -> None:
    net.node("x/q").inputs[2] = net.op("Neg", "neg", net.node("x/q").inputs[2])


def unsigned_constant(net: Net) -> None:
    table = net.constant("bytes", np.zeros((4, 4)), np.uint8)
    scale, zero = net.constant("bytes/scale", 1.0), net.constant("bytes/zero", 0, np.uint8)
    net.branch(net.op("DequantizeLinear", "bytes/dq", table, scale, zero))


def no_zero_point(net: Net) -> None:
    net.node("x/q").inputs.pop()


def two_zero_points(net: Net) -> None:
    net.node("x/q").inputs[2] = net.constant("zeros", [0, 0], np.int8)


def scaled(values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Edit:
    def edit(net: Net) -> None:
        net.node("x/q").inputs[1] = net.constant("other", values, dtype)

    return edit


def computed_scale(net: Net) -> None:
    net.node("x/q").inputs[1] = net.op("Abs", "abs", net.node("x/q").inputs[1])


def scales_of_an_activation(net: Net) -> None:
    node = net.node("x/q")
    node.attrs["axis"] = 2
    node.inputs[1], node.inputs[2] = (net.constant("many", np.full(256, 0.05)),
                                      net.constant("zeros", np.zeros(256), np.int8))  # fmt: skip


def too_few_scales(net: Net) -> None:
    few, zeros = net.constant("few", np.full(128, 0.05)), net.constant("zeros", np.zeros(128), np.int8)
    for name in ("one/weight/q", "one/weight/dq"):
        net.node(name).inputs[1], net.node(name).inputs[2] = few, zeros


def small_scales(net: Net) -> None:
    node = net.node("one/weight/q")
    node.inputs[1] = net.constant("half", node.inputs[1].values / 2)


def scalar(net: Net) -> None:
    total = net.op("ReduceMax", "total", net.node("x/q").inputs[0], keepdims=0)
    net.branch(net.pair("total", total))


def dynamic_quantization(net: Net) -> None:
    net.branch(net.op("DynamicQuantizeLinear", "dynamic", net.graph.inputs[0]))
    net.node("dynamic").outputs += [gs.Variable("dynamic/scale"), gs.Variable("dynamic/zero")]


def old_opset(net: Net) -> None:
    net.graph.opset = 17


def computed_bias(net: Net) -> None:
    net.node("conv").inputs[2] = net.op("Neg", "neg", net.node("conv").inputs[2])


def quantized_bias(net: Net) -> None:
    whole = net.constant("conv/b32", np.ones(256), np.int32)
    scale, zero = net.constant("conv/b/scale", np.ones(256)), net.constant("conv/b/zero", np.zeros(256), np.int32)
    net.node("conv").inputs[2] = net.op("DequantizeLinear", "conv/b/dq", whole, scale, zero, axis=0)


def bias_of_two_dimensions(net: Net) -> None:
    net.node("conv").inputs[2] = net.constant("conv/b2", np.ones((256, 1)))


def int8_weight(net: Net) -> None:
    quantize = net.node("one/weight/q")
    levels = np.rint(quantize.inputs[0].values.astype(np.float32) / quantize.inputs[1].values.astype(np.float32))
    net.node("one/weight/dq").inputs[0] = net.constant("one/int8", levels, np.int8)


def half_weight(net: Net) -> None:
    quantize = net.node("one/weight/q")
    quantize.inputs[0] = net.constant("one/half", quantize.inputs[0].values, np.float16)


def scales_along_the_inputs(net: Net) -> None:
    same = net.constant("same", np.full(256, 1.001 / 127))  # so large that Q5 stays silent
    for name in ("one/weight/q", "one/weight/dq"):
        net.node(name).inputs[1] = same
        net.node(name).attrs["axis"] = 0


def opset(number: int) -> Edit:
    def edit(net: Net) -> None:
        net.graph.opset = number

    return edit


def two_families(net: Net) -> None:
    for name in ("one/out/q", "one/out/dq"):
        net.node(name).inputs[2] = net.constant("fp8", 0, "float8_e4m3fn")


def operator(op: str, domain: str | None = None) -> Edit:
    def edit(net: Net) -> None:
        net.branch(net.op(op, "strange", net.graph.inputs[0], domain=domain))

    return edit


def second_output(net: Net) -> None:
    norm = net.node("first/norm")
    norm.outputs.append(gs.Variable("mean", np.dtype(np.float32)))
    net.branch(norm.outputs[1])


def element(dtype: npt.DTypeLike) -> Edit:
    def edit(net: Net) -> None:
        net.branch(net.op("Identity", "copy", net.input("strange", ["B"], dtype)))

    return edit


BREAKS: list[tuple[str, tuple[str, ...], Callable[[str], Net], Edit]] = [
    ("Q1", VERSIONS, layer, asymmetric),
    ("Q1", VERSIONS, layer, unsigned),
    ("Q1", VERSIONS, layer, computed_zero_point),
    ("Q1", ("10",), layer, unsigned_constant),  # in 8.6 Q10 refuses integer constants as well
    ("Q2", ("8.6",), layer, no_zero_point),
    ("Q2", VERSIONS, layer, two_zero_points),
    ("Q3", VERSIONS, layer, computed_scale),
    ("Q3", VERSIONS, layer, scaled(0.0)),
    ("Q3", VERSIONS, layer, scaled(np.inf)),
    ("Q3", VERSIONS, layer, scaled([[0.05]])),
    ("Q3", ("8.6",), layer, scaled(0.05, np.float16)),
    ("Q4", VERSIONS, layer, scales_of_an_activation),
    ("Q4", VERSIONS, layer, too_few_scales),
    ("Q5", VERSIONS, layer, small_scales),
    ("Q6", VERSIONS, layer, scalar),
    ("Q7", VERSIONS, layer, dynamic_quantization),
    ("Q8", ("10", "11"), layer, scaled(0.05, np.float32)),
    ("Q8", ("10", "11"), layer, old_opset),
    ("Q9", VERSIONS, conv, computed_bias),
    ("Q9", VERSIONS, conv, quantized_bias),
    ("Q9", VERSIONS, conv, bias_of_two_dimensions),
    ("Q10", ("8.6",), layer, int8_weight),
    ("Q10", ("8.6",), layer, half_weight),
    ("Q11", VERSIONS, layer, scales_along_the_inputs),
    ("Q12", ("8.6",), layer, opset(18)),
    ("Q12", ("10", "11"), layer, opset(21)),
    ("Q12", ("10", "11"), layer, two_families),
    ("U1", VERSIONS, layer, operator("BiasGelu", "com.microsoft")),
    ("U1", ("8.6",), layer, operator("Gelu")),
    ("U1", ("10", "11"), layer, operator("RMSNormalization")),
    ("U1", VERSIONS, block, second_output),
    ("U2", VERSIONS, layer, element(np.int16)),
    ("U2", VERSIONS, layer, element(object)),
    ("U2", ("8.6",), layer, element("bfloat16")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "version", "build", "edit"),
    [(rule, version, build, edit) for rule, versions, build, edit in BREAKS for version in versions],
)
def test_a_broken_rule_is_found_alone(rule: str, version: str, build: Callable[[str], Net], edit: Edit) -> None:
    net = build(version)
    edit(net)
    findings = [finding for finding in found(net) if finding.level != "note"]
    assert {finding.rule for finding in findings} == {rule}
    assert all(finding.node and finding.what and finding.remedy for finding in findings)
    expected = next(item for item in RULES if item.id == rule)
    assert {finding.level for finding in findings} == {expected.level}
    assert errors(findings) == (findings if expected.level == "error" else [])


def test_from_10_on_a_missing_zero_point_is_a_warning() -> None:
    net = layer("10")
    no_zero_point(net)
    (finding,) = found(net)
    assert (finding.rule, finding.level, finding.node) == ("Q1", "warning", "x/q")


def test_a_scale_that_fp16_rounds_is_a_warning() -> None:
    net = layer("10")
    scaled(2e-5)(net)
    (finding,) = found(net)
    assert (finding.rule, finding.level, finding.node) == ("Q3", "warning", "x/q")
    assert "2e-05" in finding.what and "FP32" in finding.remedy


def test_zero_points_may_come_through_a_cast_and_scales_through_identity() -> None:
    net = layer("10")
    node = net.node("x/q")
    node.inputs[2] = net.op("Cast", "as_int8", net.constant("zero", 0, np.int32), to=3)
    node.inputs[1] = net.op("Identity", "same", node.inputs[1])
    assert found(net) == []


def test_a_finding_names_node_and_remedy() -> None:
    net = layer("8.6")
    asymmetric(net)
    (finding,) = errors(found(net))
    text = "error Q1, node 'x/q': its zero point 'three' is not all zeros; give Q and DQ the constant INT8 zero point 0"
    assert str(finding) == text


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_of_operators(version: str) -> None:
    known = IMPORTED[version]
    assert not known & INTEGER and {"LayerNormalization", "NonMaxSuppression", "GroupNormalization"} <= known
    assert not known & {"RMSNormalization", "Attention", "SequenceAt", "StringNormalizer", "Optional"}
    assert ("Gelu" in known) == (version != "8.6")
