"""Policies of masks: which weights are zero while training goes on. All are frozen for the last of the steps.

base      what a policy is asked in each step
optimizer_state  moments and rates of a weight
fixed     the masks that are given
gradual   sparsity grows; by magnitude, movement or snip-momentum; layers alone or ranked together
admm      dense weights are pulled to a copy that has the pattern
lasso     groups are pulled to zero, then masks by percentile
srste     masks of the weights as they are, gradients straight through

Adding one: its file, and a row of POLICIES with its options, whose defaults tell their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nmcompile.errors import PassError
from nmcompile.training.policies.admm import Admm, AdmmOptions
from nmcompile.training.policies.base import Layer, Policy
from nmcompile.training.policies.fixed import Fixed, FixedOptions
from nmcompile.training.policies.gradual import Gradual, GradualOptions
from nmcompile.training.policies.lasso import Lasso, LassoOptions
from nmcompile.training.policies.srste import SrSte, SrSteOptions

__all__ = ["POLICIES", "Layer", "Policy", "make"]

POLICIES: Mapping[str, tuple[type[Policy[Any]], type[Any]]] = {
    "fixed": (Fixed, FixedOptions),
    "gradual": (Gradual, GradualOptions),
    "admm": (Admm, AdmmOptions),
    "lasso": (Lasso, LassoOptions),
    "srste": (SrSte, SrSteOptions),
}


def make(name: str, layers: Mapping[str, Layer], steps: int, options: Mapping[str, object]) -> Policy[Any]:
    """The policy of that name. PassError where it or one of its options is not known, or a value does not fit."""
    if name not in POLICIES:
        raise PassError(f"masks={name} is not known; choose one of {', '.join(POLICIES)}")
    policy, kind = POLICIES[name]
    defaults = {field.name: field.default for field in fields(kind)}
    values: dict[str, object] = {}
    for key, value in options.items():
        if key not in defaults:
            known = f"its options are {', '.join(defaults)}" if defaults else "it has no options"
            raise PassError(f"masks={name} does not know {key}; {known}")
        values[key] = _value(f"masks={name}, {key}", value, defaults[key])
    return policy(layers, steps, kind(**values))


def _value(where: str, value: object, default: object) -> object:
    """The value if it is of the default's type, whole numbers also for others."""
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        wanted = {str: "text", int: "a whole number"}.get(kind, "a number")
        raise PassError(f"{where}={value} is not {wanted}; {default} is usual")
    return value
