"""The steps of the engine, each declared once, by families as in native/engine/; `STEPS` is what a plan may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmcompile.backends.cpu.steps import attention, linear, rows, tokens
from nmcompile.backends.cpu.steps.declare import Buffer, Held, Json, Layout, Ref, Step, layouts
from nmcompile.errors import PlanError

__all__ = ["STEPS", "Buffer", "Held", "Json", "Layout", "Ref", "Step", "layouts", "read"]

STEPS: dict[str, type[Step]] = {
    step.name: step for step in (*tokens.STEPS, *rows.STEPS, *linear.STEPS, *attention.STEPS)
}


def read(content: Mapping[str, Any]) -> Step:
    """A step of plan.json. PlanError for one that there is not, TypeError for one whose fields do not fit it."""
    name = content["step"]
    step = STEPS.get(name) if isinstance(name, str) else None
    if step is None:
        raise PlanError(f"the plan has an unknown step {str(name)[:60]!r}; it is damaged or from a newer nmcompile")
    return step.from_json(content)
