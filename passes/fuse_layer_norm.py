"""FuseLayerNorm: LayerNormalization and RMSNormalization from their decomposed forms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.contract import SHAPES, Context, Pass, Report


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Recognise normalisation over the last axis.

    d = x - ReduceMean(x);  d / Sqrt(ReduceMean(d^2) + eps) * gamma + beta  ->  LayerNormalization(x, gamma, beta)
    x / Sqrt(ReduceMean(x^2) + eps) * gamma                                 ->  RMSNormalization(x, gamma)
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (SHAPES,)

    def run(self, graph: gs.Graph, context: Context) -> Report:
        notes: list[str] = []
        own = {id(node) for node in graph.nodes}
        already = sum(_tidy(node) for node in graph.nodes)
        total = fused = 0
        for root in [node for node in graph.nodes if node.op == "Sqrt"]:
            match = _match(graph, own, root)
            if isinstance(match, str):
                if match:
                    notes.append(f"{root.name}: normalisation not matched, {match}")
                    total += 1
                continue
            total += 1
            op, needed = ("RMSNormalization", 23) if match.rms else ("LayerNormalization", 17)
            if graph.opset < needed:
                notes.append(f"{root.name}: {op} needs opset {needed}, the graph has {graph.opset}")
                continue
            _replace(graph, root.name, match)
            fused += 1
        if fused:
            g.cleanup(graph)
            context.infer(graph)
        return Report(changed=fused, detail={"matched": f"{fused + already}/{total + already}"}, notes=tuple(notes))


@dataclass(frozen=True)
class _Match:
    x: gs.Tensor
    y: gs.Tensor
    gamma: gs.Tensor | None  # constants of one value, or one per feature
    beta: gs.Tensor | None
    eps: float
    rms: bool


def _tidy(node: gs.Node) -> bool:
    if node.op not in ("LayerNormalization", "RMSNormalization"):
        return False
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    if rank is not None and node.attrs.get("axis", -1) == rank - 1:
        node.attrs["axis"] = -1
    return True


def _match(graph: gs.Graph, own: Collection[int], root: gs.Node) -> _Match | str:
    """The normalisation around its Sqrt node; "" when it is no normalisation at all, else why it is none of ours."""
    plus = g.producer(root.inputs[0])
    if plus is None or plus.op != "Add":
        return ""
    variance, eps = _with_constant(plus)
    mean = g.producer(variance) if variance is not None else None
    if mean is None or mean.op != "ReduceMean" or eps is None or eps.size != 1:
        return ""
    if not _over_last_axis(mean):
        return "the mean is not over the last axis"
    square = g.producer(mean.inputs[0])
    centred = _squared(square) if square is not None else None
    if centred is None:
        return "what is averaged is not a square"
    scaled = _divide(root, centred, own)
    if scaled is None:
        return "no division by the standard deviation follows"
    sub = g.producer(centred)
    x, rms = centred, True
    if sub is not None and sub.op == "Sub" and _is_mean(sub.inputs[1], sub.inputs[0]):
        x, rms = sub.inputs[0], False
    width = x.shape[-1] if x.shape else None
    if not isinstance(width, (int, np.integer)):
        return "the width is not known"
    sizes = (int(width), len(x.shape))
    gamma, y = _next(graph, own, scaled, "Mul", *sizes)
    beta, y = (None, y) if rms else _next(graph, own, y, "Add", *sizes)
    return _Match(x, y, gamma, beta, float(eps.item()), rms)


def _with_constant(node: gs.Node) -> tuple[gs.Tensor | None, np.ndarray | None]:
    for index in (0, 1):
        value = g.constant(node.inputs[index])
        if value is not None:
            return node.inputs[1 - index], value
    return None, None


def _over_last_axis(node: gs.Node) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        value = g.constant(node.inputs[1])
        axes = None if value is None else [int(v) for v in value.reshape(-1)]
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    return list(axes or []) in ([-1], [rank - 1 if rank else -1]) and bool(node.attrs.get("keepdims", 1))


def _is_mean(mean: gs.Tensor, x: gs.Tensor) -> bool:
    node = g.producer(mean)
    return node is not None and node.op == "ReduceMean" and node.inputs[0] is x and _over_last_axis(node)


def _squared(node: gs.Node) -> gs.Tensor | None:
    if node.op == "Mul" and node.inputs[0].name == node.inputs[1].name:
        return node.inputs[0]
    power = g.constant(node.inputs[1]) if node.op == "Pow" else None
    if power is not None and power.size == 1 and float(power.item()) == 2.0:
        x: gs.Tensor = node.inputs[0]
        # Exporters may compute x - mean(x) once for the square and once for the quotient.
        return x
    return None


def _divide(root: gs.Node, centred: gs.Tensor, own: Collection[int]) -> gs.Tensor | None:
    """centred / sqrt(...) or centred * (1 / sqrt(...)), also with an equal Sub computed a second time."""
    deviation = root.outputs[0]
    for user in g.consumers(deviation):
        if id(user) not in own:
            continue  # inside an If, Loop or Scan body
        if user.op == "Div" and user.inputs[1] is deviation and _alike(user.inputs[0], centred):
            return user.outputs[0]
        inverse = None
        if user.op == "Reciprocal":
            inverse = user.outputs[0]
        elif user.op == "Div" and user.inputs[1] is deviation:
            one = g.constant(user.inputs[0])
            inverse = user.outputs[0] if one is not None and one.size == 1 and float(one.item()) == 1.0 else None
        for product in g.consumers(inverse) if inverse is not None else []:
            other = product.inputs[0] if product.inputs[1] is inverse else product.inputs[1]
            if product.op == "Mul" and id(product) in own and _alike(other, centred):
                return product.outputs[0]
    return None


def _alike(a: gs.Tensor, b: gs.Tensor) -> bool:
    if a.name == b.name:
        return True
    left, right = g.producer(a), g.producer(b)
    if left is None or right is None or left.op != "Sub" or right.op != "Sub":
        return False
    x = left.inputs[0]
    if x is not right.inputs[0]:
        return False
    return left.inputs[1] is right.inputs[1] or all(_is_mean(node.inputs[1], x) for node in (left, right))


def _next(
    graph: gs.Graph, own: Collection[int], tensor: gs.Tensor, op: str, width: int, rank: int
) -> tuple[gs.Tensor | None, gs.Tensor]:
    """The per-feature constant that the only consumer multiplies or adds, and that consumer's output."""
    users = g.consumers(tensor)
    if len(users) != 1 or users[0].op != op or id(users[0]) not in own or g.is_output(graph, tensor):
        return None, tensor
    other, value = _with_constant(users[0])
    if value is None or not value.size or value.ndim > rank:
        return None, tensor
    if value.size > 1 and not value.size == value.shape[-1] == width:
        return None, tensor
    return next(x for x in users[0].inputs if x is not other), users[0].outputs[0]


def _replace(graph: gs.Graph, stem: str, match: _Match) -> None:
    b = Builder(graph, stem.rsplit("/", 1)[0] or stem)
    width = int(match.x.shape[-1])
    gamma = b.constant(np.ones(width, match.x.dtype or np.float32), "gamma") if match.gamma is None else _spread(
        b, match.gamma, "gamma", width)  # fmt: skip
    tensors = [match.x, gamma]
    if not match.rms and match.beta is None:
        tensors.append(b.constant(np.zeros(width, gamma.dtype), "beta"))
    elif match.beta is not None:
        tensors.append(_spread(b, match.beta, "beta", width, g.Cast(gamma.dtype.name)))
    op = "RMSNormalization" if match.rms else "LayerNormalization"
    y = b(op, *tensors, dtype=match.y.dtype, shape=match.y.shape, axis=-1, epsilon=match.eps)
    g.rewire(graph, match.y, y)


def _spread(b: Builder, tensor: gs.Tensor, stem: str, width: int, *more: g.Operation) -> gs.Constant:
    """A constant as one value per feature."""
    value = g.constant(tensor)
    assert value is not None
    return b.derived(tensor, stem, g.Reshape((value.size,)), g.Broadcast((width,)), *more)
