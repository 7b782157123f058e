"""What a rule is, what it looks at and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from nmcompile.backends.tensorrt.gemms import Gemm
from nmcompile.backends.tensorrt.profiles import PROFILES, Profile

Level = Literal["error", "warning", "note"]  # import or build fails; it runs, but slower or other than meant; to know


@dataclass(frozen=True)
class Subject:
    """A graph under test: its nodes (those of subgraphs too) and its products with constant weights, found once."""

    graph: gs.Graph
    profile: Profile
    nodes: tuple[gs.Node, ...]
    gemms: tuple[Gemm, ...]

    def of(self, *ops: str) -> Iterator[gs.Node]:
        """ONNX's own nodes with one of these operators."""
        return (node for node in self.nodes if node.op in ops and node.domain in (None, "", "ai.onnx"))


@dataclass(frozen=True)
class Hit:
    """One place where a rule is broken; level and remedy are the rule's where they are left out."""

    node: str
    what: str
    remedy: str = ""
    level: Level | None = None


@dataclass(frozen=True)
class Rule:
    """A named check. `source` is where TensorRT's side says so, `versions` are the profiles it applies to."""

    id: str
    title: str
    level: Level
    source: str
    remedy: str
    check: Callable[[Subject], Iterator[Hit]]
    versions: tuple[str, ...] = tuple(PROFILES)


@dataclass(frozen=True)
class Finding:
    """A hit with what its rule adds."""

    rule: str
    title: str
    level: Level
    node: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level} {self.rule}, node '{self.node}': {self.what}; {self.remedy}"
