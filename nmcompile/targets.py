"""What each target makes of a quantized graph: its passes, and a product that runs, is written and tells of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.cpu.lower import Lowered, lower
from nmcompile.backends.cpu.session import Session
from nmcompile.backends.cpu.tuning import Tuner, by_cost_model
from nmcompile.backends.tensorrt import rules
from nmcompile.backends.tensorrt.profiles import Profile
from nmcompile.errors import UnsupportedError
from nmcompile.plan_memory import PlanInMemory
from nmcompile.qdq.scheme import CPU, TENSORRT, Scheme
from nmcompile.recipes import SPARSE_MULTIPLE, Preset, legalizing_passes
from nmcompile.stages import PassRun, Quantized, Runner

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
SATURATES = ("the emitted ONNX multiplies u8 by s8, which saturates in onnxruntime on CPUs without VNNI; set its "
             "session entry session.x64quantprecision to 1 there, or compile with --reduce-range")  # fmt: skip


class Product(ABC):
    """What a target has made of a quantized graph.

    graph: the Q/DQ graph as the target takes it. layers: what became of each linear layer. segments: of a plan. notes:
    remarks; findings: every rule of the target's that the graph breaks. ran: of all passes that led here.
    """

    quantized: Quantized
    graph: gs.Graph
    ran: tuple[PassRun, ...]
    layers: Sequence[Mapping[str, Any]] = ()
    segments: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    findings: Sequence[rules.Finding] = ()

    @abstractmethod
    def run(self, feeds: Arrays) -> Arrays:
        """What the target computes, as near to the target as this machine gets."""

    @property
    def header(self) -> dict[str, Any]:
        """Where a plan comes from."""
        canonical = self.quantized.pruned.canonical
        return {"nmcompile": nmcompile.__version__, "target": self.target, "source": canonical.fingerprint,
                "passes": [name for name, _, _ in self.ran],
                **({"roles": canonical.roles} if canonical.roles else {})}  # fmt: skip

    @property
    def told(self) -> list[str]:
        """Each remark once, of the passes and of the target: some passes run twice."""
        return list(dict.fromkeys([*(note for _, report, _ in self.ran for note in report.notes), *self.notes]))

    @property
    def emitted(self) -> list[str]:
        """What to know of the graph where it is written as ONNX."""
        return []

    target: ClassVar[str]


class Target(ABC):
    """What differs between targets: a frozen value."""

    name: ClassVar[str]
    multiple: ClassVar[int] = 1  # of which sizes must be for n:m zeros
    attention: ClassVar[str]  # int8 or float, unless the user says

    @abstractmethod
    def scheme(self, preset: Preset, attention: str | None = None) -> Scheme:
        """What is rounded and how; attention None: as is usual for the target."""

    @abstractmethod
    def lower(self, quantized: Quantized, runner: Runner) -> Product:
        """From the quantized graph to what runs."""


# ---- CPU -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuProduct(Product):
    """A plan of the CPU engine, not written yet."""

    target: ClassVar[str] = "cpu"
    quantized: Quantized
    graph: gs.Graph
    ran: tuple[PassRun, ...]
    lowered: Lowered

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]
        return self.lowered.layers

    @property
    def segments(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]
        return self.lowered.segments

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        return self.lowered.notes

    @cached_property
    def plan(self) -> PlanInMemory:
        """The plan as it would be read from its file."""
        return PlanInMemory({**self.header, **self.lowered.header}, self.lowered.arrays, self.lowered.blobs)

    @cached_property
    def session(self) -> Session:
        return Session(self.plan)

    def run(self, feeds: Arrays) -> Arrays:
        return self.session.run(feeds)

    def write(self, path: Path) -> None:
        """The plan; the caller sees to it that a file of a failed compile goes."""
        self.plan.write(path)

    @property
    def emitted(self) -> list[str]:
        return [SATURATES] if g.may_saturate(self.graph) else []


@dataclass(frozen=True)
class CpuTarget(Target):
    """Plans for the engine; each layer's kernel as `tuner` measures, or by the cost model."""

    name: ClassVar[str] = "cpu"
    attention: ClassVar[str] = "int8"
    tuner: Tuner | None = None

    def scheme(self, preset: Preset, attention: str | None = None) -> Scheme:
        return replace(preset.scheme(CPU), attention=attention or self.attention)

    def lower(self, quantized: Quantized, runner: Runner) -> CpuProduct:
        runner.progress("choosing kernels", 0, 1)
        graph = g.copy(quantized.graph)
        g.infer_shapes(graph)
        return CpuProduct(quantized, graph, quantized.ran, lower(graph, self.tuner or by_cost_model))


# ---- TensorRT ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorrtProduct(Product):
    """A graph for one version of TensorRT; engines are built of it elsewhere (backends.tensorrt.engine)."""

    target: ClassVar[str] = "tensorrt"
    quantized: Quantized
    graph: gs.Graph
    ran: tuple[PassRun, ...]
    layers: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    findings: Sequence[rules.Finding]

    @cached_property
    def _runner(self) -> Run:
        return g.runner(self.graph)

    def run(self, feeds: Arrays) -> Arrays:
        """The graph in onnxruntime, its Q/DQ pairs as they stand."""
        return self._runner(feeds)


@dataclass(frozen=True)
class TensorrtTarget(Target):
    """Graphs for one version of TensorRT. outputs: which layers hand on eight bits; weights: how they are stored."""

    name: ClassVar[str] = "tensorrt"
    multiple: ClassVar[int] = SPARSE_MULTIPLE
    attention: ClassVar[str] = "float"  # fused half-precision attention is what NVIDIA's own models run
    profile: Profile
    outputs: str = "sparse"
    weights: str = "float"

    def scheme(self, preset: Preset, attention: str | None = None) -> Scheme:
        return replace(preset.scheme(TENSORRT), attention=attention or self.attention, outputs=self.outputs)

    def lower(self, quantized: Quantized, runner: Runner) -> TensorrtProduct:
        """Legalize, and check every rule; UnsupportedError names the first that TensorRT would break on."""
        graph, ran = runner.run(legalizing_passes(self.profile, self.weights), quantized.graph)
        g.infer_shapes(graph)
        findings = rules.check(graph, self.profile)
        broken = [finding for finding in findings if finding.level == "error"]
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise UnsupportedError(f"TensorRT {self.profile.name} will not take the model: {broken[0]}{more}")
        layers = [asdict(verdict) for verdict in rules.explain(graph, self.profile)]
        return TensorrtProduct(quantized, graph, (*quantized.ran, *ran), layers, _grouped(findings), findings)


def _grouped(findings: Sequence[rules.Finding]) -> list[str]:
    """One line for each rule that is broken: how often, and where first."""
    groups: dict[tuple[str, str], list[rules.Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    return [f"{group[0]}" + (f" (and {len(group) - 1} more)" if len(group) > 1 else "") for group in groups.values()]
