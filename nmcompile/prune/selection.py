"""Which layers are pruned, to which goal, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.canonical import role
from nmcompile.errors import PassError
from nmcompile.prune.plan import Goal, PrunePlan

LEFT_OUT = ("excluded by name", "not included by name", "dense by its rule")


@dataclass(frozen=True)
class Selection:
    """The layers to prune, those left alone with the reason, and the goal of each of the former."""

    layers: tuple[g.Linear, ...]
    kept: Mapping[str, str]
    goals: Mapping[str, Goal] = field(default_factory=dict)


def select(graph: gs.Graph, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """Layers named by a glob of `include` (default: all but heads and poolers) and by none of `exclude`."""
    layers, kept = [], {}
    for layer in g.linear_layers(graph):
        default = role(graph, layer)
        if any(fnmatchcase(layer.name, glob) for glob in exclude):
            kept[layer.name] = "excluded by name"
        elif include and not any(fnmatchcase(layer.name, glob) for glob in include):
            kept[layer.name] = "not included by name"
        elif layer.quantized:
            kept[layer.name] = "already quantized"
        elif not include and default:
            kept[layer.name] = f"{default}s are kept dense by default"
        else:
            layers.append(layer)
    if include and not layers and "excluded by name" not in kept.values():
        raise PassError(f"include={'|'.join(include)} matches no linear layer; the graph has {_some(graph)}")
    return Selection(tuple(layers), kept)


def selected(graph: gs.Graph, plan: PrunePlan) -> Selection:
    """The layers that a plan prunes, and their goals. PassError for a rule or a name that no layer has."""
    found = select(graph, plan.include, plan.exclude)
    every = g.linear_layers(graph)
    for rule in plan.rules:
        if not any(fnmatchcase(layer.name, rule.glob) for layer in every):
            raise PassError(f"layers={rule.glob}:... matches no linear layer; the graph has {_some(graph)}")
    kept, goals = dict(found.kept), {}
    for layer in found.layers:
        goal = plan.goal_of(layer.name)
        if goal is not None and (goal.sparsity or not plan.rules):
            goals[layer.name] = goal
        else:
            kept[layer.name] = "dense by its rule"
    wanted = [layer for layer in found.layers if layer.name in goals]
    left = [layer for layer in every if kept.get(layer.name) in LEFT_OUT]
    kept |= unfit(wanted, goals, plan.multiple, left)
    return Selection(tuple(layer for layer in wanted if layer.name not in kept), kept,
                     {name: goal for name, goal in goals.items() if name not in kept})  # fmt: skip


def unfit(
    layers: Sequence[g.Linear], goals: Mapping[str, Goal], multiple: int = 1, left: Sequence[g.Linear] = ()
) -> dict[str, str]:
    """Layers of sizes that do not fit the n:m they are to get, with the reason; where sizes must be multiples, those
    that run as one product with one of them, or with a layer that is `left` out, too."""
    kept: dict[str, str] = {}
    grouped = [layer for layer in layers if isinstance(goals[layer.name].pattern, sp.NM)]
    for layer in grouped:
        (outputs, inputs), pattern = layer.weight.shape, goals[layer.name].pattern
        assert isinstance(pattern, sp.NM)
        if inputs % pattern.m:
            kept[layer.name] = f"K={inputs} is not a multiple of {pattern.m}"
        elif inputs % multiple or outputs % multiple:
            kept[layer.name] = f"{outputs}x{inputs} are not multiples of {multiple}"
    if multiple == 1:
        return kept
    first = {layer.x.name: layer.name for layer in reversed(grouped) if layer.name in kept}
    first |= {layer.x.name: layer.name for layer in left}
    for layer in grouped:
        if layer.x.name in first:
            kept.setdefault(layer.name, f"it runs as one product with {first[layer.x.name]}, which stays dense")
    return kept


def each_weight_once(layers: Sequence[g.Linear]) -> list[g.Linear]:
    """A weight shared by several layers is pruned once, by its first user's inputs."""
    found: dict[str, g.Linear] = {}
    for layer in layers:
        found.setdefault(layer.node.inputs[1].name, layer)
    return list(found.values())


def _some(graph: gs.Graph) -> str:
    names = ", ".join(layer.name for layer in g.linear_layers(graph)[:4])
    return f"{names or 'none'}, ..."
