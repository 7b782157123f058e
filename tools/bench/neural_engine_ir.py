"""The model format of Intel's Neural Engine, written without its compiler: conf.yaml (operators) and model.bin.

The engine takes INT8 in two layouts, and the compiler of its package (`transformers.runtime.compile`) writes both so:

dense    activations [tokens, values]; InnerProduct(x u8, weight s8 [inputs, outputs], bias, ranges)
sparse   activations [values, tokens]; InnerProduct(weight s8 [outputs, inputs], x u8, bias, ranges), which its SpMM
         kernels take when at least 70 % of the weight's blocks of 4 outputs x 1 input are zero

A range is a pair of tensors (least, most); u8 values are asymmetric, s8 values symmetric. The compiler's way of writing
it needs an old onnx package, minutes of pure Python per model, and loses the range of attention's values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .encoder import HEAD, INPUTS, OUTPUT, Shape
from .forms import Ranges, u8_parameters

Array = NDArray[Any]
Range = tuple[str, str]
KINDS = {"float32": "fp32", "int8": "s8"}


def write_ir(folder: Path, model: onnx.ModelProto, shape: Shape, ranges: Ranges, *, sparse: bool) -> None:
    """Write conf.yaml and model.bin of an encoder() into the folder."""
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    writer = _Writer(weights, shape, ranges, sparse)
    writer.encoder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(b"".join(writer.bytes))
    (folder / "conf.yaml").write_text(json.dumps(writer.config()))  # JSON is YAML


class _Writer:
    def __init__(self, weights: dict[str, Array], shape: Shape, ranges: Ranges, sparse: bool) -> None:
        self.weights, self.shape, self.ranges, self.sparse = weights, shape, ranges, sparse
        self.bytes: list[bytes] = []
        self.end = 0
        self.tensors: dict[str, Any] = {name: {"dtype": "s32", "shape": [-1, -1]} for name in INPUTS}
        self.operators: dict[str, Any] = {}

    def config(self) -> dict[str, Any]:
        operators = {"input_data": {"type": "Input", "output": self.tensors}, **self.operators}
        operators["output_data"] = {"type": "Output", "input": {OUTPUT: {}}}
        return {"model": {"name": "model", "operator": operators}}

    def constant(self, name: str, value: Array) -> str:
        if name not in self.tensors:
            data = np.ascontiguousarray(value).tobytes()
            self.tensors[name] = {"dtype": KINDS[str(value.dtype)], "shape": list(value.shape),
                                  "location": [self.end, len(data)]}  # fmt: skip
            self.bytes.append(data)
            self.end += len(data)
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def op(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        names: dict[str, dict[str, str]] = {name: {} for name in inputs}
        if len(names) < len(inputs):
            raise ValueError(f"{output}: the engine tells inputs apart by name, but one stands twice")
        self.operators[f"{output}.op"] = {"type": kind, "input": names, "output": {output: {}}, "attr": attributes}
        return output

    def span(self, name: str, least: Array | float, most: Array | float) -> list[str]:
        ends = [np.atleast_1d(np.asarray(value, np.float32)) for value in (least, most)]
        return [self.constant(f"{name}.{end}", value) for end, value in zip(("min", "max"), ends, strict=True)]

    def u8(self, name: str) -> list[str]:
        scale, zero = u8_parameters(self.ranges[name])
        return self.span(name, -float(zero) * scale, (255 - float(zero)) * scale)

    def s8(self, name: str) -> list[str]:
        most = max(abs(end) for end in self.ranges[name])
        return self.span(name, -most, most)

    def encoder(self) -> None:
        x = self.embeddings()
        heads = self.shape.hidden // HEAD
        mask = self.op("PaddingSequence", ["attention_mask"], "mask", dst_shape=f"-1,{heads},0,-1", dims=1)
        if self.sparse:
            x = self.op("Reorder", [x], f"{x}.t", src_perm="0,1", dst_perm="1,0")
        key = "embeddings.LayerNorm"  # under which calibration knows the value in x
        for index in range(self.shape.layers):
            name = f"encoder.layer.{index}"
            x = self.layer(x, key, mask, name)
            key = f"{name}.output.LayerNorm"
        if self.sparse:
            self.op("Reorder", [x], OUTPUT, src_perm="0,1", dst_perm="1,0")
        else:
            self.operators[f"{OUTPUT}.op"] = self.operators.pop(f"{x}.op") | {"output": {OUTPUT: {}}}

    def embeddings(self) -> str:
        hidden = self.shape.hidden
        table = "embeddings.{}_embeddings.weight"
        taken = self.op("Reshape", [self.weight(table.format("position")), "input_ids"], "positions",
                        dst_shape=f"1,-1,{hidden}", dims=1)  # fmt: skip
        total = self.op("Reshape", [taken], "positions.flat", dst_shape="1,-1")
        added = {"axis": 0, "batch_dims": 0, "append_op": "binary_add", "reshape": f"-1,-1,{hidden}",
                 "reshape_dims": "0,1", "mul": "1,2"}  # fmt: skip
        for part, ids in (("token_type", "token_type_ids"), ("word", "input_ids")):
            flat = self.op("Reshape", [ids], f"{ids}.flat", dst_shape=-1)
            inputs = [flat, self.weight(table.format(part)), total, "token_type_ids"]
            total = self.op("Gather", inputs, f"embeddings.{part}", **added)
        return self.norm(total, "embeddings.LayerNorm")

    def norm(self, x: str, name: str, **attributes: object) -> str:
        return self.op("LayerNorm", [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")], name,
                       epsilon=1e-12, **attributes)  # fmt: skip

    def layer(self, x: str, key: str, mask: str, name: str) -> str:
        part = f"{name}.attention.self"
        hidden, heads = self.shape.hidden, self.shape.hidden // HEAD
        split = f"{heads},{HEAD},-1,-1" if self.sparse else f"-1,-1,{heads},{HEAD}"
        u8 = self.op("Quantize", [x, *self.u8(key)], f"{key}.u8", output_dtype="u8")
        query, key_, value = (
            self.linear(u8, key, f"{part}.{each}", self.s8(f"{part}.{each}.heads"), like="input_ids",
                        output_dtype="s8", reshape=split, reshape_dims="0")
            for each in ("query", "key", "value")
        )  # fmt: skip
        scores = self.op(
            "Matmul", [query, key_, mask, *self.s8(f"{part}.query.heads"), *self.s8(f"{part}.key.heads")],
            f"{part}.scores", src0_perm="2,0,3,1" if self.sparse else "0,2,1,3",
            src1_perm="2,0,1,3" if self.sparse else "0,2,3,1", output_scale=HEAD**-0.5, format_any=False,
            append_op="binary_add",
        )  # fmt: skip
        shares = self.op("Softmax", [scores, *self.u8(f"{part}.shares")], f"{part}.shares.u8", output_dtype="u8")
        mixed = self.op(
            "Matmul", [shares, value, *self.u8(f"{part}.shares"), *self.s8(f"{part}.value.heads"),
                       *self.u8(f"{part}.joined")],
            f"{part}.joined", src1_perm="2,0,3,1" if self.sparse else "0,2,1,3",
            dst_perm="1,3,0,2" if self.sparse else "0,2,1,3", output_dtype="u8",
            reshape=f"{hidden},-1" if self.sparse else f"-1,{hidden}",
        )  # fmt: skip
        turned = {"transpose_mode": "1, 0"} if self.sparse else {}
        total = self.linear(mixed, f"{part}.joined", f"{name}.attention.output.dense", [], post=x, append_op="sum")
        x = self.norm(total, f"{name}.attention.output.LayerNorm", **turned)
        u8 = self.op("Quantize", [x, *self.u8(x)], f"{x}.u8", output_dtype="u8")
        gelu = f"{name}.intermediate.gelu"
        inner = self.linear(u8, x, f"{name}.intermediate.dense", self.u8(gelu), append_op="gelu_tanh",
                            output_dtype="u8")  # fmt: skip
        total = self.linear(inner, gelu, f"{name}.output.dense", [], post=x, append_op="sum")
        return self.norm(total, f"{name}.output.LayerNorm", **turned)

    def linear(
        self, x: str, key: str, name: str, result: list[str], *, post: str = "", like: str = "", **attributes: object
    ) -> str:
        """`key`: the calibrated name of x; `result`: range of an INT8 result; `post` is added; `like` gives sizes."""
        weight = self.weights[f"{name}.weight"]  # [inputs, outputs]
        step = np.maximum(np.abs(weight).max(0) / 127, 1e-12)
        rounded = np.rint(weight / step).astype(np.int8)
        scale, zero = u8_parameters(self.ranges[key])
        bias = self.weights[f"{name}.bias"] - scale * float(zero) * step * rounded.sum(0, dtype=np.int64)
        stored = self.constant(f"{name}.weight", rounded.T if self.sparse else rounded)
        of_weight = self.span(f"{name}.weight", -127 * step, 127 * step)
        after = [self.constant(f"{name}.bias", bias.astype(np.float32)), *([post] if post else [])]
        if self.sparse:
            inputs = [stored, x, *after, *of_weight, *self.u8(key)]
        else:
            inputs = [x, stored, *after, *self.u8(key), *of_weight]
            attributes["src1_perm"] = "1,0"
        return self.op("InnerProduct", [*inputs, *result, *([like] if like else [])], name, **attributes)
