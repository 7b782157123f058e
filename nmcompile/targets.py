"""What each target makes of a pruned graph: its last passes, what runs, and what is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.backends.cpu.lower import Lowered, lower
from nmcompile.backends.cpu.tuning import Tuner, by_cost_model
from nmcompile.backends.tensorrt import rules
from nmcompile.backends.tensorrt.profiles import Profile
from nmcompile.errors import UnsupportedError
from nmcompile.pipeline import Pass
from nmcompile.plan import write_plan
from nmcompile.recipes import SPARSE_MULTIPLE, Preset, legalizing_passes, quantizing_passes, tensorrt_passes
from nmcompile.session import load

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
SATURATES = ("the emitted ONNX multiplies u8 by s8, which saturates in onnxruntime on CPUs without VNNI; set its "
             "session entry session.x64quantprecision to 1 there, or compile with --reduce-range")  # fmt: skip


class Target(ABC):
    """One compile for one target. `finish` takes the quantized graph; the rest describes what came out."""

    name: ClassVar[str]
    multiple: ClassVar[int] = 1  # of which sizes must be for n:m zeros
    attention: ClassVar[str]  # int8 or float, unless the user says

    @abstractmethod
    def quantizing(self, preset: Preset, attention: str, floating: Sequence[str]) -> list[Pass]:
        """The passes after pruning; layers `floating` stay in float."""

    def legalizing(self) -> list[Pass]:
        """The passes from the Q/DQ graph to what `finish` takes."""
        return []

    @abstractmethod
    def finish(self, graph: gs.Graph) -> None:
        """Take the graph after all passes."""

    @abstractmethod
    def opened(self, scratch: Path, header: Mapping[str, Any]) -> Run:
        """What the target computes, as near to the target as this machine gets; it may write to `scratch`."""

    def emitted(self, graph: gs.Graph) -> list[str]:
        """What to know of the graph where it is written as ONNX."""
        return []

    layers: Sequence[Mapping[str, Any]] = ()
    segments: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass
class CpuTarget(Target):
    """Plans for the engine; each layer's kernel as `tuner` measures, or by the cost model."""

    name: ClassVar[str] = "cpu"
    attention: ClassVar[str] = "int8"
    tuner: Tuner | None = None

    def quantizing(self, preset: Preset, attention: str, floating: Sequence[str]) -> list[Pass]:
        return quantizing_passes(preset, attention, floating)

    def finish(self, graph: gs.Graph) -> None:
        g.infer_shapes(graph)
        self.lowered: Lowered = lower(graph, self.tuner or by_cost_model)
        self.layers, self.segments, self.notes = self.lowered.layers, self.lowered.segments, self.lowered.notes

    def emitted(self, graph: gs.Graph) -> list[str]:
        return [SATURATES] if g.may_saturate(graph) else []

    def opened(self, scratch: Path, header: Mapping[str, Any]) -> Run:
        """The plan itself, written to `scratch`."""
        self.write(scratch, header)
        return load(scratch).run

    def write(self, path: Path, header: Mapping[str, Any]) -> None:
        """The plan; the caller sees to it that a file of a failed compile goes."""
        write_plan(path, {**header, **self.lowered.header}, self.lowered.arrays, self.lowered.blobs)


@dataclass
class TensorrtTarget(Target):
    """Graphs for one version of TensorRT; engines are built from them elsewhere (backends.tensorrt.engine)."""

    name: ClassVar[str] = "tensorrt"
    multiple: ClassVar[int] = SPARSE_MULTIPLE
    attention: ClassVar[str] = "float"  # fused half-precision attention is what NVIDIA's own models run
    profile: Profile
    outputs: str = "sparse"
    weights: str = "float"
    findings: Sequence[rules.Finding] = field(default=())

    def quantizing(self, preset: Preset, attention: str, floating: Sequence[str]) -> list[Pass]:
        return tensorrt_passes(preset, attention, self.outputs, floating)

    def legalizing(self) -> list[Pass]:
        return legalizing_passes(self.profile, self.weights)

    def finish(self, graph: gs.Graph) -> None:
        """Check every rule; UnsupportedError names the first that TensorRT would break on."""
        g.infer_shapes(graph)
        self.graph = graph
        self.findings = rules.check(graph, self.profile)
        broken = [finding for finding in self.findings if finding.level == "error"]
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise UnsupportedError(f"TensorRT {self.profile.name} will not take the model: {broken[0]}{more}")
        self.layers = [asdict(verdict) for verdict in rules.explain(graph, self.profile)]
        self.notes = _grouped(self.findings)

    def opened(self, scratch: Path, header: Mapping[str, Any]) -> Run:
        """The graph in onnxruntime, its Q/DQ pairs as they stand."""
        return g.runner(self.graph)


def _grouped(findings: Sequence[rules.Finding]) -> list[str]:
    """One line for each rule that is broken: how often, and where first."""
    groups: dict[tuple[str, str], list[rules.Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.rule), []).append(finding)
    return [f"{group[0]}" + (f" (and {len(group) - 1} more)" if len(group) > 1 else "") for group in groups.values()]
