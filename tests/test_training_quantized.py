"""Training with eight bits in the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from test_training import BERT, QUICK, rows

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.input_roles import inputs
from nmcompile.torch import Module
from nmcompile.training import Recipe
from nmcompile.training.distil import Trainer
from nmcompile.training.pair import Pair
from nmcompile.training.quantized import behind_pairs


def alone(node: onnx.NodeProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """One node in onnxruntime."""
    infos = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
             for name, value in feeds.items()]  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(feeds["zero"].dtype)
    made = helper.make_graph([node], "one", infos, [helper.make_tensor_value_info("y", kind, None)])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def pair_of(path: Path) -> tuple[Pair, Data]:
    graph = nmcompile.torch_module(path).graph()
    data = open_data(rows(64), inputs(graph), limit=64)
    return Pair.of(graph, graph, [layer.name for layer in g.linear_layers(graph)], data, half=False), data


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_student_rounds_as_onnxruntime_does_to_the_bit(target: str) -> None:
    pair, data = pair_of(BERT)
    behind = behind_pairs(pair, Calibration(data), Recipe(target=target).scheme)
    graph = behind.pair.student.graph()
    rounders = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    made = [node.outputs[0].name for node in rounders]
    read = [node.inputs[0].name for node in rounders if isinstance(node.inputs[0], gs.Variable)]
    values = Module(graph, [*made, *read])(next(iter(data)))
    weights = behind.pair.student.initializers
    zeros = {node.inputs[2].values.dtype.name for node in rounders}
    assert len(made) > len(read) >= 8 and ("uint8" in zeros) == (target == "cpu")
    for node in rounders:
        x = values[node.inputs[0].name] if node.inputs[0].name in values else weights[node.inputs[0].name]
        scale, zero = (tensor.values for tensor in node.inputs[1:])
        one = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], **node.attrs)
        wanted = alone(one, {"x": x.detach().numpy(), "scale": scale, "zero": zero})
        levels = values[node.outputs[0].name].detach().numpy()
        np.testing.assert_array_equal(levels, wanted.astype(np.float32), err_msg=node.name)


def test_weights_come_back_without_the_factors_of_smoothing() -> None:
    pair, data = pair_of(BERT)
    before = {name: pair.student.initializers[name].detach().clone() for name in pair.trained}
    behind = behind_pairs(pair, Calibration(data), Recipe().scheme)
    moved = [place for place in behind.stored.values() if place.factors is not None]
    assert len(moved) >= 8 and all(np.ptp(place.factors) > 0 for place in moved if place.factors is not None)
    behind.take_back()
    for name, values in before.items():
        torch.testing.assert_close(pair.student.initializers[name].detach(), values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("qat", "masks"), [(0.5, "fixed"), (1.0, "admm")])
def test_a_tail_with_eight_bits_keeps_zeros_and_is_better_with_eight_bits(qat: float, masks: str) -> None:
    data = open_data(rows(), inputs(g.admit(BERT)), limit=1000)
    found = nmcompile.train(BERT, data=data, qat=qat, masks=masks, **QUICK)
    stages = [entry["stage"] for entry in found.history]
    assert ("distil" in stages) == (qat < 1) and "quantized" in stages
    losses = [entry["loss"] for entry in found.history if entry["stage"] == "quantized"]
    assert min(losses) < losses[0]
    assert found.loss_trained < found.loss_pruned and abs(found.zeros - 0.7) < 0.02
    for layer in g.linear_layers(found.graph):
        if layer.name in found.sparsity:
            assert (layer.weight == 0).mean() >= found.sparsity[layer.name] - 1e-9


def test_an_interrupted_tail_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(rows(), inputs(g.admit(BERT)), limit=1000)
    asked: dict[str, Any] = {**QUICK, "qat": 0.5, "steps": 30}
    whole = nmcompile.train(BERT, data=data, resume=tmp_path / "a", **asked)
    step = Trainer._step

    def stopped(self: Trainer, feeds: Any) -> None:
        if self.how.stage == "quantized" and self.progress.step == 8:
            raise KeyboardInterrupt
        step(self, feeds)

    monkeypatch.setattr(Trainer, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        nmcompile.train(BERT, data=data, resume=tmp_path / "b", **asked)
    ran: list[str] = []

    def counted(self: Trainer, feeds: Any) -> None:
        ran.append(self.how.stage)
        step(self, feeds)

    monkeypatch.setattr(Trainer, "_step", counted)
    resumed = nmcompile.train(BERT, data=data, resume=tmp_path / "b", **asked)
    assert set(ran) == {"quantized"} and len(ran) < 15
    for a, b in zip(g.linear_layers(whole.graph), g.linear_layers(resumed.graph), strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
