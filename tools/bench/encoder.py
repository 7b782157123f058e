"""BERT-shaped encoders with random weights, written as PyTorch exports them: one float model for all peers.

Speed does not depend on the weights' values but on their zeros, and an agreement of outputs can be checked with any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nmcompile import sparsity as sp

OPSET = 13  # what the oldest of the peers still reads whole
VOCABULARY, POSITIONS = 30522, 512
SHARP = 2.2  # of queries and keys: attention that attends, so that it matters
HEAD = 64  # values per attention head
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # int64 [batch, tokens], in the order that peers are fed
OUTPUT = "last_hidden_state"  # float32 [batch, tokens, hidden]


@dataclass(frozen=True)
class Shape:
    """Of an encoder: feed-forward layers have 4 x hidden values."""

    layers: int
    hidden: int


MODELS = {
    "bert-base": Shape(12, 768),
    "distilbert": Shape(6, 768),
    "bert-mini": Shape(4, 256),
}


def encoder(shape: Shape, share: float = 0.0, pattern: str = "1x1", *, seed: int = 0) -> onnx.ModelProto:
    """The float model. `share` of the blocks of `pattern` (outputs x inputs) of each linear layer are zero.

    The blocks of least magnitude go, so a larger share keeps a part of what a smaller one keeps. Embeddings are dense.
    """
    return _Writer(shape, share, pattern, seed).model()


class _Writer:
    def __init__(self, shape: Shape, share: float, pattern: str, seed: int) -> None:
        self.shape, self.share, self.pattern = shape, share, sp.parse_pattern(pattern)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        hidden = self.shape.hidden
        x = self.norm(self.embeddings(), "embeddings.LayerNorm")
        mask = self.mask()
        for index in range(self.shape.layers):
            x = self.layer(x, mask, f"encoder.layer.{index}")
        self.nodes[-1].output[0] = OUTPUT
        dims = ["batch", "tokens"]
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name in INPUTS]
        outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [*dims, hidden])]
        graph = helper.make_graph(self.nodes, "encoder", inputs, outputs, list(self.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=7)

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(value, dtype, order="C"), name)
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def random(self, *shape: int) -> NDArray[np.float32]:
        return (self.rng.standard_normal(shape) * 0.04).astype(np.float32)

    def embeddings(self) -> str:
        hidden = self.shape.hidden
        words = self.constant("embeddings.word_embeddings.weight", self.random(VOCABULARY, hidden))
        kinds = self.constant("embeddings.token_type_embeddings.weight", self.random(2, hidden))
        positions = self.constant("embeddings.position_embeddings.weight", self.random(POSITIONS, hidden))
        word = self.op("Gather", [words, "input_ids"], "embeddings.words")
        kind = self.op("Gather", [kinds, "token_type_ids"], "embeddings.kinds")
        total = self.op("Add", [word, kind], "embeddings.sum")
        sizes = self.op("Shape", ["input_ids"], "sizes")
        length = self.op("Gather", [sizes, self.constant("one", 1, np.int64)], "length")
        length = self.op("Unsqueeze", [length, self.constant("axes_0", [0], np.int64)], "length_1d")
        order = self.constant("position_ids", np.arange(POSITIONS)[None], np.int64)
        starts, axes = self.constant("zero_1d", [0], np.int64), self.constant("axes_1", [1], np.int64)
        taken = self.op("Slice", [order, starts, length, axes], "position_ids_taken")
        position = self.op("Gather", [positions, taken], "embeddings.positions")
        return self.op("Add", [total, position], "embeddings.total")

    def mask(self) -> str:
        rows = self.op("Unsqueeze", ["attention_mask", self.constant("axes_1", [1], np.int64)], "mask.heads")
        rows = self.op("Unsqueeze", [rows, self.constant("axes_2", [2], np.int64)], "mask.rows")
        ones = self.op("Cast", [rows], "mask.float", to=TensorProto.FLOAT)
        hidden = self.op("Sub", [self.constant("one_float", 1.0), ones], "mask.inverted")
        return self.op("Mul", [hidden, self.constant("lowest", -10000.0)], "mask.added")  # [batch, 1, 1, tokens]

    def layer(self, x: str, mask: str, name: str) -> str:
        self_ = f"{name}.attention.self"
        query = self.heads(self.linear(x, f"{self_}.query", gain=SHARP), [0, 2, 1, 3])
        key = self.heads(self.linear(x, f"{self_}.key", gain=SHARP), [0, 2, 3, 1])
        value = self.heads(self.linear(x, f"{self_}.value"), [0, 2, 1, 3])
        scores = self.op("MatMul", [query, key], f"{self_}.scores")
        scores = self.op("Div", [scores, self.constant("root_of_head", HEAD**0.5)], f"{self_}.scaled")
        shares = self.op("Softmax", [self.op("Add", [scores, mask], f"{self_}.masked")], f"{self_}.shares", axis=-1)
        mixed = self.op("MatMul", [shares, value], f"{self_}.mixed")
        mixed = self.op("Transpose", [mixed], f"{self_}.tokens", perm=[0, 2, 1, 3])
        join = self.constant("join", [0, 0, self.shape.hidden], np.int64)
        mixed = self.op("Reshape", [mixed, join], f"{self_}.joined")
        mixed = self.linear(mixed, f"{name}.attention.output.dense")
        x = self.norm(self.op("Add", [mixed, x], f"{name}.attention.residual"), f"{name}.attention.output.LayerNorm")
        inner = self.gelu(self.linear(x, f"{name}.intermediate.dense", 4 * self.shape.hidden), f"{name}.intermediate")
        inner = self.linear(inner, f"{name}.output.dense", inputs=4 * self.shape.hidden)
        return self.norm(self.op("Add", [inner, x], f"{name}.residual"), f"{name}.output.LayerNorm")

    def linear(
        self, x: str, name: str, outputs: int | None = None, *, inputs: int | None = None, gain: float = 1.0
    ) -> str:
        weight = self.random(outputs or self.shape.hidden, inputs or self.shape.hidden)
        if self.share:
            weight *= sp.keep_mask(sp.magnitude(weight), self.pattern, self.share)
        # Inputs of unit variance give outputs of a known variance, whatever the share. With weaker layers the residual
        # path would carry the model, and a comparison of outputs would not notice a layer that is wrong.
        weight *= gain / np.sqrt(np.square(weight).mean() * weight.shape[1])
        bias = self.constant(f"{name}.bias", 5 * self.random(len(weight)))
        product = self.op("MatMul", [x, self.constant(f"{name}.weight", weight.T)], f"{name}.MatMul")
        return self.op("Add", [product, bias], name)

    def heads(self, x: str, order: list[int]) -> str:
        split = self.constant("split", [0, 0, self.shape.hidden // HEAD, HEAD], np.int64)
        return self.op("Transpose", [self.op("Reshape", [x, split], f"{x}.split")], f"{x}.heads", perm=order)

    def norm(self, x: str, name: str) -> str:
        hidden = self.shape.hidden
        centred = self.op("Sub", [x, self.op("ReduceMean", [x], f"{name}.mean", axes=[-1])], f"{name}.centred")
        square = self.op("Pow", [centred, self.constant("two", 2.0)], f"{name}.square")
        variance = self.op("ReduceMean", [square], f"{name}.variance", axes=[-1])
        variance = self.op("Add", [variance, self.constant("epsilon", 1e-12)], f"{name}.variance_epsilon")
        unit = self.op("Div", [centred, self.op("Sqrt", [variance], f"{name}.deviation")], f"{name}.unit")
        scaled = self.op("Mul", [unit, self.constant(f"{name}.weight", np.ones(hidden))], f"{name}.scaled")
        return self.op("Add", [scaled, self.constant(f"{name}.bias", np.zeros(hidden))], name)

    def gelu(self, x: str, name: str) -> str:
        inner = self.op("Div", [x, self.constant("root_of_2", 2**0.5)], f"{name}.rooted")
        erf = self.op("Add", [self.op("Erf", [inner], f"{name}.erf"), self.constant("one_float", 1.0)], f"{name}.erf_1")
        twice = self.op("Mul", [x, erf], f"{name}.twice")
        return self.op("Mul", [twice, self.constant("half", 0.5)], f"{name}.gelu")
