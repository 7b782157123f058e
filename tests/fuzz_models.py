"""Mutated models: each loads and passes the canonical passes, or is refused by an error of ours."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from nmcompile import ir as g
from nmcompile.errors import NmcompileError
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes

MODELS = Path(__file__).parents[1] / "models"
NAMES = ("bert-ort-transformers", "cnn", "control-flow", "lstm", "bert-dynamo-attention", "vit-dynamo",
         "distilbert-dynamo", "bert-torchscript-opset11", "gpt2-dynamo")  # fmt: skip
SIZES = (0, 1, 2, 3, -1, 7, 64, 65, 1 << 20, 1 << 33, (1 << 63) - 1, -(1 << 63))  # where readers go wrong


def fuzz_model(seed: int) -> str:
    """A committed model with some messages changed, or some bytes of its file, as `seed` says; what came of it."""
    rng = np.random.default_rng(seed)
    model = onnx.ModelProto.FromString(_content(NAMES[int(rng.integers(len(NAMES)))]))
    if rng.random() < 0.25:
        return _check(_damaged(model.SerializeToString(), rng))
    for _ in range(int(rng.integers(1, 4))):
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](model, rng)
    return _check(model.SerializeToString())


def _check(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(content)
        try:
            graph = g.load(path)
            Pipeline(canonical_passes()).run(graph)
            g.save(graph, path)
        except NmcompileError as error:
            assert "\n" not in str(error), str(error)
            return type(error).__name__
        return "right"


@functools.cache
def _content(name: str) -> bytes:
    return (MODELS / f"{name}.onnx").read_bytes()


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, most of them where the nodes stand; or cut short, or a piece of it twice."""
    data = bytearray(content)
    kind = int(rng.integers(4))
    at = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data[:at] + data[max(0, at - int(rng.integers(1, 200))) : at] + data[at:])
    for _ in range(int(rng.integers(1, 20))):
        data[int(rng.integers(len(data) if kind == 2 else min(len(data), 6000)))] = int(rng.integers(256))
    return bytes(data)


# ---- mutations of messages -----------------------------------------------------------------------------------


def _node(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.NodeProto:
    nodes = model.graph.node
    found: onnx.NodeProto = nodes[int(rng.integers(len(nodes)))] if nodes else nodes.add()
    return found


def _name(model: onnx.ModelProto, rng: np.random.Generator) -> str:
    names = [name for node in model.graph.node for name in [*node.input, *node.output]]
    return str(names[int(rng.integers(len(names)))]) if names else "x"


def _size(rng: np.random.Generator) -> int:
    return SIZES[int(rng.integers(len(SIZES)))]


def _drop_input(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _node(model, rng)
    if node.input:
        del node.input[int(rng.integers(len(node.input)))]


def _blank_input(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = ""


def _other_input(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _name(model, rng)


def _more_inputs(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    _node(model, rng).input.append(_name(model, rng))


def _other_output(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _node(model, rng)
    if node.output:
        node.output[int(rng.integers(len(node.output)))] = ("", "nowhere", _name(model, rng))[int(rng.integers(3))]


def _other_operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _node(model, rng)
    if rng.random() < 0.3:
        node.domain = ("com.microsoft", "", "ai.onnx", "other")[int(rng.integers(4))]
    else:
        node.op_type = _node(model, rng).op_type


def _drop_node(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if model.graph.node:
        del model.graph.node[int(rng.integers(len(model.graph.node)))]


def _twice(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    model.graph.node.append(onnx.NodeProto.FromString(_node(model, rng).SerializeToString()))


def _shuffle(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes[int(i)] for i in rng.permutation(len(nodes)))


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = nodes[int(rng.integers(len(nodes)))]
    attribute = node.attribute[int(rng.integers(len(node.attribute)))]
    kind = int(rng.integers(5))
    if kind == 0:
        node.attribute.remove(attribute)
    elif kind == 1:
        attribute.i = _size(rng)
        attribute.ints.append(_size(rng))
    elif kind == 2:
        attribute.f = (float("nan"), float("inf"), -1.0, 0.0, 1e38)[int(rng.integers(5))]
    elif kind == 3:
        attribute.type = int(rng.integers(0, 14))
    else:
        attribute.s = b"\xff\xfe"


def _initializer(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if not model.graph.initializer:
        return
    tensor = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    kind = int(rng.integers(6))
    if kind == 0 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _size(rng)
    elif kind == 1:
        tensor.data_type = int(rng.integers(0, 26))
    elif kind == 2:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
    elif kind == 3:
        tensor.dims.extend([1] * int(rng.integers(1, 70)))
    elif kind == 4:
        try:
            array = onnx.numpy_helper.to_array(tensor).copy()
        except (TypeError, ValueError):  # damaged by an earlier mutation
            return
        if array.size and array.dtype.kind in "iuf":
            array.reshape(-1)[int(rng.integers(array.size))] = _size(rng) & 0x7F if array.dtype.kind != "f" else np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    else:
        values = np.array([_size(rng) for _ in range(int(rng.integers(0, 5)))], np.int64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _shape(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    info = infos[int(rng.integers(len(infos)))]
    kind = info.type.tensor_type
    choice = int(rng.integers(5))
    if choice == 0:
        kind.ClearField("shape")
    elif choice == 1:
        kind.elem_type = int(rng.integers(0, 26))
    elif choice == 2 and kind.shape.dim:
        kind.shape.dim[int(rng.integers(len(kind.shape.dim)))].dim_value = _size(rng)
    elif choice == 3:
        kind.shape.dim.add().dim_param = "batch"
    else:
        info.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _version(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if rng.random() < 0.3:
        del model.opset_import[:]
    elif model.opset_import:
        model.opset_import[0].version = int(rng.integers(-1, 30))


def _edges(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    choice = int(rng.integers(4))
    if choice == 0 and model.graph.output:
        model.graph.output[0].name = _name(model, rng)
    elif choice == 1 and model.graph.input:
        del model.graph.input[int(rng.integers(len(model.graph.input)))]
    elif choice == 2:
        model.graph.output.add().name = _name(model, rng)
    elif model.graph.input:
        model.graph.input.append(model.graph.input[0])


MUTATIONS: tuple[Callable[[onnx.ModelProto, np.random.Generator], None], ...] = (
    _drop_input, _blank_input, _other_input, _more_inputs, _other_output, _other_operator, _drop_node, _twice,
    _shuffle, _attribute, _attribute, _attribute, _initializer, _initializer, _shape, _version, _edges,
)  # fmt: skip
