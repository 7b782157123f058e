"""The steps of the engine, each declared once; `STEPS` is what a plan may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmcompile.backends.cpu.steps.attention import Attention, AttentionFloat
from nmcompile.backends.cpu.steps.declare import Buffer, Held, Json, Ref, Step, maybe
from nmcompile.backends.cpu.steps.linear import Linear, LinearFloat, ProjectPatches, Weight
from nmcompile.backends.cpu.steps.rows import Affine, Binary, LayerNorm, Quantize, Unary
from nmcompile.backends.cpu.steps.tokens import (
    AddPositions,
    Embed,
    Enter,
    First,
    Leave,
    Patches,
    Prepend,
    Source,
)
from nmcompile.errors import PlanError

__all__ = [
    "STEPS", "AddPositions", "Affine", "Attention", "AttentionFloat", "Binary", "Buffer", "Embed", "Enter", "First",
    "Held", "Json", "LayerNorm", "Leave", "Linear", "LinearFloat", "Patches", "Prepend", "ProjectPatches", "Quantize",
    "Ref", "Source", "Step", "Unary", "Weight", "maybe", "read",
]  # fmt: skip

STEPS: Mapping[str, type[Step]] = {
    step.name: step
    for step in (
        Embed, Enter, Leave, First, LayerNorm, Quantize, Linear, LinearFloat, Attention, AttentionFloat, Unary, Binary,
        Affine, AddPositions, Patches, Prepend,
    )
}  # fmt: skip


def read(content: Any, known: Mapping[str, type[Step]] = STEPS) -> Step:
    """A step of plan.json. PlanError for one that there is not, TypeError for one whose fields do not fit it."""
    name = content["step"]
    step = known.get(name) if isinstance(name, str) else None
    if step is None:
        raise PlanError(f"the plan has an unknown step {str(name)[:60]!r}; it is damaged or from a newer nmcompile")
    return step.from_json(content)
