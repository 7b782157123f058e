"""SimplifyMasks: write every mask of attention as one condition that hides by the lowest float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.builder import Builder
from nmcompile.canonical import Attention, attentions
from nmcompile.contract import Context, Pass, Report
from nmcompile.guards import Guard
from nmcompile.mask_form import build_mask


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Let attention's masks take their input as 0 and 1, and rows without a key as none that matter.

    (1 - mask) * lowest                     ->  Where(mask != 0, 0, lowest)
    Where(IsNaN(p), 0, p), p = Softmax(.)   ->  p

    TensorRT fuses attention in this form. For other inputs the result differs from the model's: the report's detail has
    the assumptions, which sessions check.
    """

    preserves: ClassVar[bool] = False

    def run(self, graph: gs.Graph, context: Context) -> Report:
        found = [item for item in attentions(graph) if item.guarded or item.mask.key != item.mask.plain.key]
        if not found:
            return Report()
        biases: dict[tuple[object, ...], gs.Tensor | None] = {}
        guards: set[Guard] = set()
        for item in found:
            guards |= _assumed(item)
            plain = item.mask.plain
            like = item.q if plain.padding is None else plain.padding
            length = like.shape[1] if like.shape is not None and len(like.shape) > 1 else None
            key = (*plain.key, length or like.name)  # a triangle is as long as its tokens
            if key not in biases:
                biases[key] = build_mask(Builder(graph, "mask"), plain, like)
            if item.biased is not None:
                item.biased.inputs[1] = biases[key]
            choice = next((node for node in item.nodes if node.op == "Where"), None)
            if item.guarded and choice is not None:
                g.rewire(graph, choice.outputs[0], choice.inputs[2])
        g.cleanup(graph)
        return Report(changed=len(found), detail={"assumes": [guard.to_json() for guard in sorted(guards)]})


def _assumed(item: Attention) -> set[Guard]:
    padding = item.mask.padding
    if padding is None:
        return set()
    return {Guard(padding.name, rule) for rule in (*item.mask.assumes, "some-token")}
