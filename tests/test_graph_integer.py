"""8-bit products in onnxruntime: exact on every CPU, whoever reads a weight and however a model writes the product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile.ir import integer as graph_integer
from nmcompile.ort_options import EXACT, session_options
from nmcompile.plan import read_plan
from nmcompile.saturation import saturates

pytestmark = pytest.mark.emulated

X = np.full((3, 64), 255, np.uint8)
W = np.full((64, 32), 127, np.int8)
SUM = 64 * 255 * 127

INTEGER = """(uint8[M,64] x) => (int32[M,32] y) <int8[64,32] w, uint8 zx, int8 zw> {
    y = MatMulInteger(x, w, zx, zw) }"""
BARE = "(uint8[M,64] x) => (int32[M,32] y) <int8[64,32] w> { y = MatMulInteger(x, w) }"
LINEAR = """(uint8[M,64] x) => (float[M,32] y) <int8[64,32] w, uint8 zx, int8 zw> {
    one = Constant <value_float = 1.0> ()  wide = Constant <value_float = 65536.0> ()
    r = QLinearMatMul(x, one, zx, w, one, zw, wide, zx)  y = DequantizeLinear(r, wide, zx) }"""
FLOAT = """(float[M,64] x) => (float[M,32] y) <int8[64,32] w, float s, int8 zw> {
    y = com.microsoft.DynamicQuantizeMatMul(x, w, s, zw) }"""
# one weight, one zero point, two products, as where layers share their weights
SHARED = """(float[M,64] x) => (float[M,32] y, float[M,32] z) <int8[64,32] w, uint8 zx, int8[32] zw> {
    sx = Constant <value_float = 1.0> ()  sw = Constant <value_floats = [SCALES]> ()
    q = QuantizeLinear(x, sx, zx)  d = DequantizeLinear(q, sx, zx)  dw = DequantizeLinear <axis = 1> (w, sw, zw)
    y = MatMul(d, dw)
    r = Neg(x)  n = Neg(r)  p = QuantizeLinear(n, sx, zx)  e = DequantizeLinear(p, sx, zx)  z = MatMul(e, dw) }"""
SHARED = SHARED.replace("SCALES", ", ".join(["1.0"] * 32))
# keys that two products read
KEYS = """(float[M,64] x, float[64,32] k) => (float[M,32] y, float[M,32] z) <uint8 zx, int8 zk> {
    s = Constant <value_float = 1.0> ()
    q = QuantizeLinear(x, s, zx)  d = DequantizeLinear(q, s, zx)
    kq = QuantizeLinear(k, s, zk)  kd = DequantizeLinear(kq, s, zk)  y = MatMul(d, kd)
    r = Neg(x)  n = Neg(r)  p = QuantizeLinear(n, s, zx)  e = DequantizeLinear(p, s, zx)  z = MatMul(e, kd) }"""


def graph(text: str) -> gs.Graph:
    """With the largest weights, zero points 0 and scales 1."""
    made = parse(text, opset=21)
    for tensor in made.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name in ("w", "zw", "zx", "zk", "s"):
            fill = {"w": 127, "s": 1}.get(tensor.name, 0)
            tensor.values = np.full(tensor.values.shape, fill, tensor.values.dtype)
    return made


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("text", [INTEGER, BARE, LINEAR, FLOAT], ids=["zero-points", "bare", "QLinear", "dynamic"])
def test_integer_products_are_exact(text: str, optimise: bool) -> None:
    """Without optimizations onnxruntime's own remedy does not run."""
    made = graph(text)
    x = X.astype(np.float32) if text is FLOAT else X
    found = g.run(made, {"x": x}, optimise=optimise)["y"]
    if text is LINEAR:
        assert (found == 32 * 65536).all()  # 31.6 steps
    else:
        np.testing.assert_allclose(found, SUM, rtol=1e-6)


@pytest.mark.parametrize("text", [INTEGER, BARE, LINEAR, FLOAT], ids=["zero-points", "bare", "QLinear", "dynamic"])
def test_unoptimised_runs_read_unsigned_weights(text: str) -> None:
    made = graph(text)
    graph_integer.unsigned_weights(made)
    node = next(node for node in made.nodes if "MatMul" in node.op)
    places = graph_integer.PLACES[node.domain or "", node.op]
    assert (node.inputs[places.weight].values == 255).all() and node.inputs[places.weight].dtype == np.uint8
    assert node.inputs[places.zero].values == 128 and node.inputs[places.zero].values.shape == ()
    onnx.checker.check_model(g.to_model(made))


@pytest.mark.parametrize("change", ["small", "signed", "computed"])
def test_what_cannot_saturate_is_left_alone(change: str) -> None:
    made = graph(INTEGER)
    tensors = made.tensors()
    if change == "small":
        tensors["w"].values = np.full((64, 32), -64, np.int8)
    elif change == "signed":  # s8 x s8 is exact, and QLinearMatMul knows no s8 x u8
        tensors["zx"].values = np.zeros((), np.int8)
        tensors["x"].dtype = np.dtype(np.int8)
    else:
        made.nodes[0].inputs[3] = gs.Variable("zw", np.int8, [])
        made.inputs.append(made.nodes[0].inputs[3])
    before = g.to_text(made)
    graph_integer.unsigned_weights(made)
    assert g.to_text(made) == before


@pytest.mark.parametrize("optimise", [False, True])
def test_a_weight_that_two_products_share_runs_and_is_exact(optimise: bool) -> None:
    found = g.run(graph(SHARED), {"x": X.astype(np.float32)}, optimise=optimise)
    for values in found.values():
        np.testing.assert_allclose(values, SUM, rtol=1e-6)


def test_shared_weights_get_a_reader_each_and_stay_one_array() -> None:
    made = graph(SHARED)
    graph_integer.unshared(made)
    nodes = [node for node in made.nodes if node.op == "DequantizeLinear" and node.inputs[0].name.startswith("w")]
    assert len(nodes) == 2 and len({node.outputs[0].name for node in nodes}) == 2
    assert len({node.inputs[0].name for node in nodes}) == len({node.inputs[2].name for node in nodes}) == 2
    assert np.shares_memory(nodes[0].inputs[0].values, nodes[1].inputs[0].values)
    g.verify(made, "unshared")
    again = g.to_text(made)
    graph_integer.unshared(made)
    assert g.to_text(made) == again


@pytest.mark.parametrize("optimise", [False, True])
def test_keys_that_two_products_read_are_exact(optimise: bool) -> None:
    found = g.run(graph(KEYS), {"x": X.astype(np.float32), "k": W.astype(np.float32)}, optimise=optimise)
    for values in found.values():
        np.testing.assert_allclose(values, SUM, rtol=1e-6)


def test_only_keys_of_several_readers_change_their_type() -> None:
    for text, kind in ((KEYS, "uint8"), (KEYS.replace("z = MatMul(e, kd)", "z = MatMul(e, k)"), "int8")):
        made = graph(text)
        graph_integer.unsigned_operands(made)
        nodes = {node.op: node for node in made.nodes if node.inputs[0].name in ("k", "kq")}
        assert {str(node.inputs[2].values.dtype) for node in nodes.values()} == {kind}
        assert {int(node.inputs[2].values) for node in nodes.values()} == {128 if kind == "uint8" else 0}


def test_a_plan_holds_a_shared_weight_once_and_opens_everywhere(tmp_path: Path) -> None:
    made = graph(SHARED)
    result = nmcompile.compile(made, tmp_path / "m.plan", measure=False)
    assert [segment["kind"] for segment in result.segments] == ["onnxruntime"]
    plan = read_plan(tmp_path / "m.plan")
    stored = plan.header["segments"][0]["weights"]
    assert len(stored) == 2 and len(plan.arrays) == 1  # two names, one array
    x = X.astype(np.float32)
    for values in nmcompile.load(tmp_path / "m.plan").run({"x": x}).values():
        np.testing.assert_allclose(values, SUM, rtol=1e-6)


# ---- whether this CPU saturates --------------------------------------------------------------------------------


def test_a_saturating_cpu_is_told_by_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a session that adds pairs in 16 bits, as those of CPUs without VNNI do."""

    class Saturating:
        def __init__(self, model: bytes, options: object, providers: object) -> None:
            self.weight = onnx.numpy_helper.to_array(onnx.load_from_string(model).graph.initializer[0]).astype(int)

        def run(self, _: object, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            products = feeds["x"].astype(int)[:, :, None] * self.weight
            pairs = products[:, ::2] + products[:, 1::2]
            return [np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1)]

    monkeypatch.setattr(ort, "InferenceSession", Saturating)
    assert saturates.__wrapped__()


def test_nmcompiles_own_sessions_never_saturate() -> None:
    assert session_options().get_session_config_entry(EXACT[0]) == "1"
    assert not saturates(exact=True)


def sessions_of(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entry in the options of each session that is opened meanwhile."""
    found: list[str] = []
    real = ort.InferenceSession

    def watch(model: object, options: ort.SessionOptions, **more: object) -> object:
        found.append(options.get_session_config_entry(EXACT[0]))
        return real(model, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", watch)
    make()
    return found


def test_every_session_carries_the_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nmcompile.bench import OrtRunner

    source = Path(__file__).parent.parent / "models" / "cnn.onnx"
    plan = tmp_path / "m.plan"

    def everything() -> None:
        nmcompile.compile(source, plan, preset="fast")
        session = nmcompile.load(plan)
        session.run(g.random_feeds(session.inputs))
        OrtRunner(str(source), 1)

    found = sessions_of(everything, monkeypatch)
    assert len(found) > 3 and set(found) == {"1"}


@pytest.mark.parametrize("optimise", [False, True])
def test_weights_of_a_scale_per_channel_without_a_zero_point(optimise: bool) -> None:
    """onnxruntime made up one zero point for all channels, and refused its own graph."""
    graph = parse("""(float[B,S,8] x) => (float[B,S,4] y) <float[8,4] w, float[4] s> {
        d = DequantizeLinear <axis = 1> (w, s)  y = MatMul(x, d) }""")
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-127, 128, (8, 4)).astype(np.int8), np.full(4, 0.01, np.float32)
    graph.nodes[0].inputs = [gs.Constant("w8", weight), gs.Constant("s4", scale)]
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    found = g.run(graph, {"x": x}, optimise=optimise)["y"]
    np.testing.assert_allclose(found, x @ (weight * scale), atol=0.05)  # onnxruntime rounds x where it optimises
