"""The front of a ViT: patches of an image, each a token, behind a class token."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.cpu.ops import PatchEmbed
from nmcompile.backends.cpu.streams import Space, Stream


def match_patches(node: gs.Node, inputs: set[str]) -> PatchEmbed | str:
    """Conv over patches -> Reshape -> Transpose -> Concat(class token, .): the front of a ViT."""
    x, weight = node.inputs[0], g.constant(node.inputs[1])
    bias = g.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    shape, kernel = x.shape, list(node.attrs.get("kernel_shape", []))
    if x.name not in inputs or weight is None or shape is None or len(shape) != 4 or x.dtype != np.float32:
        return "convolutions run on onnxruntime"
    plain = (
        node.attrs.get("group", 1) == 1
        and not any(node.attrs.get("pads", []))
        and kernel == node.attrs.get("strides")
    )
    if (
        not plain
        or any(not isinstance(d, int) for d in shape[1:])
        or any(d != 1 for d in node.attrs.get("dilations", [1]))
    ):
        return "convolutions run on onnxruntime"
    nodes, tensor = [node], node.outputs[0]
    for op in ("Reshape", "Transpose", "Concat"):
        users = g.consumers(tensor)
        if len(users) != 1 or users[0].op != op:
            return "no class token is put before its patches"
        nodes.append(users[0])
        tensor = users[0].outputs[0]
    expand = g.producer(nodes[3].inputs[0])
    row = g.constant(expand.inputs[0]) if expand is not None and expand.op == "Expand" else None
    width = weight.shape[0]
    count = (shape[2] // kernel[0]) * (shape[3] // kernel[1])
    if (
        row is None
        or row.size != width
        or nodes[3].attrs.get("axis") != 1
        or nodes[2].attrs.get("perm") != [0, 2, 1]
    ):
        return "no class token is put before its patches"
    if len(nodes[3].inputs) != 2:
        return "more than a class token is put before its patches"
    if shape[2] % kernel[0] or shape[3] % kernel[1] or shape[0] is None:
        return "its image is not a whole number of patches"
    assert expand is not None
    return PatchEmbed(
        reads=(), y=tensor.name, rows=width, space=Space(Stream(shape[0], count + 1)), nodes=(*nodes, expand),
        name=node.name, image=x.name, channels=shape[1], patch=(kernel[0], kernel[1]),
        weight=weight.reshape(width, -1), bias=None if bias is None else bias.astype(np.float32),
        row=row.reshape(-1).astype(np.float32),
    )  # fmt: skip
