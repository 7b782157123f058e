"""Every rule that TensorRT sets a graph, in one tuple, and how a graph is checked against them.

Nothing here imports or runs TensorRT: the rules are read off its headers, its ONNX parser, its documentation and the
answers of its maintainers, each named in the rule's `source`.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from nmcompile.backends.tensorrt import (
    rules_placement,
    rules_quantization,
    rules_sparsity,
    rules_support,
    rules_typing,
    walk,
)
from nmcompile.backends.tensorrt.findings import Finding, Rule, Subject
from nmcompile.backends.tensorrt.gemms import gemms
from nmcompile.backends.tensorrt.profiles import Profile
from nmcompile.backends.tensorrt.verdicts import LayerVerdict, judge

__all__ = ["RULES", "Finding", "LayerVerdict", "Rule", "check", "errors", "explain"]

RULES: tuple[Rule, ...] = (
    *rules_quantization.RULES,
    *rules_support.RULES,
    *rules_sparsity.RULES,
    *rules_placement.RULES,
    *rules_typing.RULES,
)


def check(graph: gs.Graph, profile: Profile) -> list[Finding]:
    """Everything in the graph that the rules of the profile object to, rule by rule, nodes in their order.

    `graph` comes from graph.load, with shapes and types inferred; it stays as it is.
    """
    subject = _subject(graph, profile)
    return [
        Finding(rule.id, rule.title, hit.level or rule.level, hit.node, hit.what, hit.remedy or rule.remedy)
        for rule in RULES
        if profile.name in rule.versions
        for hit in rule.check(subject)
    ]


def explain(graph: gs.Graph, profile: Profile) -> list[LayerVerdict]:
    """What will become of each product with a constant weight, in the order of the nodes."""
    return judge(_subject(graph, profile).gemms)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that make the import or the build fail."""
    return [finding for finding in findings if finding.level == "error"]


def _subject(graph: gs.Graph, profile: Profile) -> Subject:
    return Subject(graph, profile, tuple(walk.nodes(graph)), gemms(graph))
