"""Writes linear layers with what they take in: an activation, a residual, the form that is wanted of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nmcompile import sparsity as sp
from nmcompile.backends.cpu.fuse import Chain
from nmcompile.backends.cpu.ops import Form, Linear
from nmcompile.backends.cpu.pack import Packed, pack_as
from nmcompile.backends.cpu.steps import Json, linear
from nmcompile.backends.cpu.tuning import Choice

if TYPE_CHECKING:
    from nmcompile.backends.cpu.emit import Emitter


@dataclass(frozen=True)
class LayerFacts:
    """What a plan and a report say of a linear layer. weight: what of the source file that is; density: of it;
    computed: of the dense products."""

    name: str
    weight: str
    outputs: int
    inputs: int
    density: float
    precision: str
    kernel: str
    computed: float
    pattern: str
    reordered: bool = False
    chosen_by: str = ""
    microseconds: Mapping[str, float] = field(default_factory=dict)

    def stated(self) -> Json:
        """In the plan, whose bytes follow from the choices alone."""
        return {
            "name": self.name, "weight": self.weight, "outputs": self.outputs, "inputs": self.inputs,
            "density": self.density,
            "precision": self.precision, "kernel": self.kernel, "computed": self.computed, "pattern": self.pattern,
            **({"reordered": True} if self.reordered else {}),
        }  # fmt: skip

    def reported(self) -> Json:
        """To the user, who may want to know why."""
        why: Json = {"chosen_by": self.chosen_by, "microseconds": dict(self.microseconds)} if self.chosen_by else {}
        return self.stated() | why


def emit_chain(chain: Chain, to: Emitter) -> None:
    root, last = chain.root, chain.last
    residual = -1 if chain.residual is None else to.floats(chain.residual, root.rows, root.space)
    if isinstance(root, Linear):
        rest, packed = _quantized(chain, root, to, residual)
    else:
        y, _, rest = to.store(last, last.y, linear.LinearFloat)
        bias = to.array(root.bias, "bias")
        weight = to.held(np.ascontiguousarray(root.weight, np.float32), "weight")
        to.step(linear.LinearFloat(x=to.x(root), y=y, weight=weight, bias=bias, activation=chain.activation,
                                  residual=residual))  # fmt: skip
        packed = None
    to.layers.append(_facts(chain, packed, to.choices.get(root.y)))
    to.finish(last, rest)


def _quantized(chain: Chain, root: Linear, to: Emitter, residual: int) -> tuple[list[Form], Packed]:
    """The forms of the result that are still to be added, and the weight as it is stored."""
    last, read = chain.last, root.reads[0].form
    y, form, rest = to.store(last, last.y, linear.Linear)
    bias = to.array(root.bias, "bias")
    packed = pack_as(root.weight, to.choices[root.y].kind)
    refs = {name: to.held(values, name) for name, values in packed.arrays.items()}
    weight = linear.Weight(packed.format, refs["values"], packed.rows, refs.get("columns"), refs.get("starts"))
    step = linear.Linear(
        x=to.x(root), y=y, weight=weight, w_scale=to.held(root.scale, "scale"), bias=bias, x_scale=read.scale,
        x_zero_point=read.zero_point, activation=chain.activation, residual=residual, y_scale=form.scale,
        y_zero_point=form.zero_point,
    )  # fmt: skip
    to.step(step)
    # keys and values that something else reads too are computed once more, in the form only this step writes
    for other in sorted((f for f in rest if f.layout in ("keys", "values")), key=lambda f: (f.layout, f.scale)):
        again = to.buffer(last.y, other, last.rows, last.space)
        to.step(replace(step, y=again, y_scale=other.scale, y_zero_point=other.zero_point))
        rest.remove(other)
    return rest, packed


def _facts(chain: Chain, packed: Packed | None, choice: Choice | None) -> LayerFacts:
    root = chain.root
    found = sp.detect(root.weight)
    outputs, inputs = root.weight.shape
    facts = LayerFacts(
        root.name, root.key, outputs, inputs, round(float(sp.density(root.weight)), 4),
        *(("float32", "dense", 1.0) if packed is None else ("int8", str(packed.kind), round(packed.share, 4))),
        pattern="dense" if found is None else str(found.pattern),
    )  # fmt: skip
    if choice is None:
        return facts
    times = {str(kind): time for kind, time in choice.microseconds.items()}
    return replace(facts, reordered=choice.reordered, chosen_by=choice.by, microseconds=times)
