"""What a pass is, what it is given, and what it reports: one contract for built-in passes and those of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_graphsurgeon as gs

from nmcompile.calibrate import Calibration, Data, Statistics
from nmcompile.derive import Derivation
from nmcompile.errors import PassError
from nmcompile.shapes import Shapes

if TYPE_CHECKING:
    from nmcompile.prune.records import Records

SHAPES = "shapes"  # a pass requires: shapes and types by onnx's inference, written on every tensor
CANONICAL = "canonical"  # a pass requires: linear layers in the one form that `ir.linear_layers` finds
DERIVATION = "derivation"  # a pass requires: what tensors hold (nmcompile.derive), made when it asks for it

Progress = Callable[[str, int, int], None]  # (what, done, total)
NEEDS_DATA = "needs calibration data; give the pipeline calibration=..., or --calibration"


@dataclass(frozen=True)
class Report:
    """What a pass did: how many things it changed, facts by name (JSON-able), and remarks such as why not. records: of
    a pass that prunes, what was there before."""

    changed: int = 0
    detail: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    records: Records | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Context:
    """What a pass is given beside its graph.

    calibration: the samples, None where there are none. gathered: the statistics that the pass's `needs` asked for.
    known: infers and derives shapes, and remembers them from pass to pass. graph: the
    pass's own, where it requires DERIVATION. fitted_to: the samples that layers are fitted to, where not to `data`.
    """

    calibration: Calibration | None = None
    gathered: Statistics | None = None
    known: Shapes = field(default_factory=Shapes, repr=False)
    graph: gs.Graph | None = field(default=None, repr=False)
    fitted_to: Data | None = field(default=None, repr=False)

    @property
    def shapes(self) -> Derivation:
        """The derivation of the pass's graph, to be asked before the graph is changed. PassError for a pass that does
        not require DERIVATION."""
        if self.graph is None:
            raise PassError("asks for a derivation without requiring it; add DERIVATION to what it requires")
        return self.known.read(self.graph)

    @property
    def statistics(self) -> Statistics:
        """What `needs` asked for; PassError where the pipeline has no calibration data."""
        if self.gathered is None:
            raise PassError(NEEDS_DATA)
        return self.gathered

    @property
    def data(self) -> Data:
        """The calibration samples; PassError where there are none."""
        return self._calibrated.data

    @property
    def fitting(self) -> Data:
        """The samples that the weights which stay are fitted to; PassError where there are none."""
        return self.data if self.fitted_to is None else self.fitted_to

    @property
    def training(self) -> Data:
        """The samples that weights may be trained on; PassError where there are none."""
        return self._calibrated.training or self._calibrated.data

    @property
    def checkpoints(self) -> Path | None:
        """A folder for what a long pass has done so far."""
        return None if self.calibration is None else self.calibration.checkpoints

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell how far a long pass is."""
        if self.calibration is not None and self.calibration.progress is not None:
            self.calibration.progress(what, done, total)

    def collect(self, graph: gs.Graph, needs: Mapping[str, Sequence[str]]) -> Statistics:
        """Statistics of a graph's tensors, as `Calibration.collect` takes them."""
        return self._calibrated.collect(graph, needs)

    def infer(self, graph: gs.Graph) -> None:
        """Shapes and types of a graph that the pass has made, or changed since it began, written on its tensors."""
        self.known.infer(graph)

    def derive(self, graph: gs.Graph) -> Derivation:
        """The same with all that can be derived; for a graph that is as the pass got it too."""
        return self.known.derive(graph)

    def given(self, statistics: Statistics | None, graph: gs.Graph | None) -> Context:
        """The same for one pass."""
        return replace(self, gathered=statistics, graph=graph)

    @property
    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise PassError(NEEDS_DATA)
        return self.calibration


class Pass:
    """Base of the passes: a frozen dataclass whose fields are its options, of type str, int, float, bool or
    tuple[str, ...].

    name: the kebab-case of the class name unless given. preserves: the pass keeps what the graph computes, which the
    pipeline can check. requires: what the runner provides (SHAPES, DERIVATION), so that no pass infers shapes itself,
    or holds the graph to (CANONICAL).
    """

    name: ClassVar[str] = "pass"
    preserves: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def needs(self, graph: gs.Graph) -> dict[str, tuple[str, ...]]:
        """Statistics wanted by tensor name: "range", "histogram", "squares", ...; empty when none are."""
        return {}

    def run(self, graph: gs.Graph, context: Context) -> Report:
        """Change the graph in place; raises NmcompileError for what the user can mend."""
        raise NotImplementedError
