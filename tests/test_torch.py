"""nmcompile.torch: graphs as modules, against onnxruntime, finite differences and the arithmetic of Q/DQ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx_text import parse, parse_model

import nmcompile
from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile import quantize as q8
from nmcompile.calibrate import open_data
from nmcompile.errors import NmcompileError, UnsupportedError
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes
from nmcompile.torch import Module
from nmcompile.torch.fake_quant import dequantize, quantize
from nmcompile.torch.operators import OPERATORS

MODELS = Path(__file__).parent.parent / "models"
REFUSED = {"cnn": "MaxPool", "lstm": "LSTM"}
HALF = {"bert-fp16": 4e-3}  # onnxruntime computes in half precision there, the module in single
Tensor = torch.Tensor


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_every_committed_model_computes_what_onnxruntime_does(path: Path) -> None:
    source = g.admit(path)
    feeds = next(iter(open_data(None, input_roles.inputs(source), limit=3)))
    if path.stem in REFUSED:
        with pytest.raises(UnsupportedError, match=f"a {REFUSED[path.stem]}, which has no gradient"):
            nmcompile.torch_module(path)
        return
    wanted, found = g.run(source, feeds), nmcompile.torch_module(path)(feeds)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name].detach().numpy(), values, atol=HALF.get(path.stem, 1e-5), rtol=1e-4)


@pytest.mark.parametrize("name", ["bert-dynamo", "gpt2-dynamo", "t5-torchscript"])
def test_other_lengths_and_padding_on_either_side(name: str) -> None:
    source, module = g.admit(MODELS / f"{name}.onnx"), nmcompile.torch_module(MODELS / f"{name}.onnx")
    infos = input_roles.inputs(source)
    for length, hidden in ((1, slice(0, 0)), (40, slice(30, 40)), (23, slice(0, 9))):
        free = [(at, dim) for info in infos for at, dim in enumerate(info.shape) if isinstance(dim, str)]
        sizes = {dim: length if at else 3 for at, dim in free}
        feeds = g.random_feeds(infos, seed=length, dims=sizes)
        for info in infos:
            if "mask" in info.name:
                feeds[info.name][:] = 1
                feeds[info.name][1, hidden] = 0
        for output, values in g.run(source, feeds).items():
            np.testing.assert_allclose(module(feeds)[output].detach().numpy(), values, atol=2e-5, rtol=1e-4)


def test_one_parameter_per_initializer_by_its_name() -> None:
    module = nmcompile.torch_module(MODELS / "gpt2-dynamo.onnx")
    source = g.load(MODELS / "gpt2-dynamo.onnx")
    held = {t.name for node in source.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    plain = [name for name in module.initializers if name in held]
    assert len(list(module.parameters())) == len(module.initializers) and len(plain) > 15
    shared = Module(parse("(float[N,4] x) => (float[N,4] y) <float[4,4] w> { h = MatMul(x, w)  y = MatMul(h, w) }"))
    assert list(shared.initializers) == ["w"]


def test_a_table_and_the_head_that_is_the_table_transposed_are_one_parameter() -> None:
    graph, _ = Pipeline(canonical_passes()).run(parse("""(float[B,S,4] x, int64[B,S] ids) => (float[B,S,6] y)
        <float[6,4] w> { e = Gather(w, ids)  h = Add(x, e)  t = Transpose <perm = [1, 0]> (w)  y = MatMul(h, t) }"""))
    module = Module(graph)
    (weight,), ((head, table),) = module.initializers.values(), module.tied.items()
    feeds = {"x": np.ones((1, 3, 4), np.float32), "ids": np.array([[1, 5, 2]])}
    module(feeds)["y"].square().sum().backward()
    assert weight.grad is not None and bool((weight.grad[0] != 0).all()), "row 0 is read by the head alone"
    with torch.no_grad():
        weight.mul_(2)
    now = {t.name: t.values for t in module.graph().tensors().values() if isinstance(t, gs.Constant)}
    np.testing.assert_array_equal(now[head], now[table].T)
    np.testing.assert_allclose(module(feeds)["y"].detach(), g.run(module.graph(), feeds)["y"], rtol=1e-5)
    other = Module(graph, apart=[head])
    assert not other.tied and set(other.initializers) == {head, table}


def test_weights_go_back_into_the_graph() -> None:
    module = nmcompile.torch_module(MODELS / "bert-dynamo.onnx")
    feeds = next(iter(open_data(None, input_roles.inputs(module.graph()), limit=2)))
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.01)
    for name, values in g.run(module.graph(), feeds).items():
        np.testing.assert_allclose(module(feeds)[name].detach().numpy(), values, atol=1e-5, rtol=1e-4)


def test_a_weight_is_read_through_what_is_effective() -> None:
    module = Module(parse("(float[N,4] x) => (float[N,8] y) <float[4,8] w> { y = MatMul(x, w) }"))
    module.effective["w"] = lambda weight: weight * 0
    assert not module({"x": np.ones((2, 4), np.float32)})["y"].any()


# ---- gradients ---------------------------------------------------------------------------------------------------

UNARY = ("Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Sin", "Cos", "Relu", "Tanh", "Sigmoid", "Gelu",
         "LeakyRelu", "Elu", "Softplus", "HardSigmoid", "HardSwish", "Swish", "Mish", "Softmax", "LogSoftmax",
         "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp", "ReduceL2", "ReduceL1",
         "ReduceSumSquare", "GlobalAveragePool", "Transpose", "Flatten", "LpNormalization", "Identity")  # fmt: skip
BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum")


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


CASES: dict[str, Callable[..., Any]] = {
    "MatMul": lambda x: OPERATORS["MatMul"](x, x.transpose(-1, -2)),
    "Gemm": lambda x: OPERATORS["Gemm"](x[0], x[1], x[0, :, :1], alpha=0.5, beta=2.0, transB=1),
    "Conv": lambda x: OPERATORS["Conv"](x, x[:, :, :2].transpose(0, 1).reshape(2, 3, 2), None, pads=[1, 0]),
    "LayerNormalization": lambda x: OPERATORS["LayerNormalization"](x, x[0, 0], x[1, 0], epsilon=1e-3),
    "RMSNormalization": lambda x: OPERATORS["RMSNormalization"](x, x[0, 0], epsilon=1e-3),
    "Pow": lambda x: OPERATORS["Pow"](x, torch.tensor(3.0, dtype=x.dtype)),
    "Clip": lambda x: OPERATORS["Clip"](x, torch.tensor(0.6), torch.tensor(1.2)),
    "Where": lambda x: OPERATORS["Where"](x > 1, x, x * 3),
    "CumSum": lambda x: OPERATORS["CumSum"](x, torch.tensor(1), reverse=1, exclusive=1),
    "Cast": lambda x: OPERATORS["Cast"](x, to=11),
    "Mod": lambda x: OPERATORS["Mod"](x, torch.tensor(0.7, dtype=x.dtype), fmod=1),
    "Reshape": lambda x: OPERATORS["Reshape"](x, ints(0, -1)),
    "Squeeze": lambda x: OPERATORS["Squeeze"](x[:1], ints(0)),
    "Unsqueeze": lambda x: OPERATORS["Unsqueeze"](x, ints(0, -1)),
    "Gather": lambda x: OPERATORS["Gather"](x, ints(1, -1), axis=1),
    "GatherElements": lambda x: OPERATORS["GatherElements"](x, torch.zeros(2, 1, 4, dtype=torch.int64), axis=1),
    "GatherND": lambda x: OPERATORS["GatherND"](x, torch.tensor([[0, 1], [1, -1]])),
    "ScatterND": lambda x: OPERATORS["ScatterND"](x, torch.tensor([[0]]), x[1:] * 2),
    "Slice": lambda x: OPERATORS["Slice"](x, ints(2), ints(-100), ints(1), ints(-1)),
    "Split": lambda x: sum(part.sum() * (i + 1) for i, part in enumerate(OPERATORS["Split"](x, ints(1, 3), axis=2))),
    "Concat": lambda x: OPERATORS["Concat"](x, x * 2, axis=1),
    "Expand": lambda x: OPERATORS["Expand"](x[:, :1], ints(2, 3, 4)),
    "Tile": lambda x: OPERATORS["Tile"](x, ints(1, 2, 1)),
    "Trilu": lambda x: OPERATORS["Trilu"](x, torch.tensor(1), upper=0),
    "Pad": lambda x: OPERATORS["Pad"](x, ints(1, 0, 2, 0), None, ints(1, 2)),
}
PLAIN = {"QuantizeLinear", "DequantizeLinear", "Sign", "Floor", "Ceil", "Round", "Equal", "Greater", "GreaterOrEqual",
         "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf", "ArgMax", "ArgMin", "Shape", "Size",
         "Range", "ConstantOfShape"}  # fmt: skip


@pytest.mark.parametrize("op", sorted({*UNARY, *BINARY, *CASES}))
def test_gradients_are_those_of_finite_differences(op: str) -> None:
    x = torch.from_numpy(np.random.default_rng(1).uniform(0.3, 1.7, (2, 3, 4))).requires_grad_()
    function = CASES.get(op) or (lambda x: OPERATORS[op](x, x.flip(0) * 1.1) if op in BINARY else OPERATORS[op](x))
    assert torch.autograd.gradcheck(function, (x,))


def test_every_operator_has_a_gradient_check_or_none() -> None:
    assert set(OPERATORS) == {*UNARY, *BINARY, *CASES, *PLAIN}


# ---- fake quantization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_fake_quantization_is_that_of_onnxruntime_bit_for_bit(kind: q8.QuantType) -> None:
    params = q8.activation_params(-1.3, 2.9, kind)

    model = parse_model(f"""(float[N] x) => (float[N] y) <float scale, {kind} zero> {{
        q = QuantizeLinear(x, scale, zero)  y = DequantizeLinear(q, scale, zero) }}""")  # fmt: skip
    graph = g.load(model)
    for node in graph.nodes:
        node.inputs[1] = gs.Constant("scale", np.array(params.scale, np.float32))
        node.inputs[2] = gs.Constant("zero", np.array(params.zero_point, kind))
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(params.scale)
    x = np.concatenate([ties, np.random.default_rng(0).normal(0, 2, 100000).astype(np.float32), [-1e30, 1e30, 0.0]])
    x = x.astype(np.float32)
    scale, offset = torch.tensor(params.scale), torch.tensor(np.array(params.zero_point, kind))
    found = dequantize(quantize(torch.from_numpy(x), scale, offset), scale, offset).numpy()
    np.testing.assert_array_equal(found, g.run(graph, {"x": x})["y"])


def test_fake_quantized_weights_are_those_that_are_rounded() -> None:
    weight = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)  # [K, N]
    scales = q8.weight_scales(weight.T)
    zero = torch.zeros(32, dtype=torch.int8)
    levels = quantize(torch.from_numpy(weight), torch.from_numpy(scales), zero, axis=1)
    np.testing.assert_array_equal(levels.numpy(), q8.round_weight(weight.T, scales, 127).T)


def test_the_gradient_passes_rounding_and_stops_where_it_saturates() -> None:
    x = torch.tensor([0.4, 100.0, -100.0], requires_grad=True)
    scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.int8)
    dequantize(quantize(x, scale, zero), scale, zero).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 0.0]))


def test_a_quantized_graph_is_computed_as_onnxruntime_computes_it(tmp_path: Path) -> None:
    path = tmp_path / "qdq.onnx"
    nmcompile.compile(MODELS / "bert-dynamo.onnx", tmp_path / "m.plan", emit_onnx=path, measure=False)
    graph = g.load(path)
    feeds = next(iter(open_data(None, input_roles.inputs(graph), limit=4)))
    wanted, found = g.run(graph, feeds), Module(graph)(feeds)
    for name, values in wanted.items():
        error = found[name].detach().numpy() - values
        assert np.square(error).sum() < 1e-4 * np.square(values).sum(), name


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("nmcompile.torch")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(NmcompileError, match=r"pip install 'nmcompile\[train\]'"):
        nmcompile.torch_module(MODELS / "bert-dynamo.onnx")
