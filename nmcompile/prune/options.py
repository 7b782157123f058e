"""The options that all pruning passes have, and the plan that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from nmcompile.contract import CANONICAL, Context, Pass, Report
from nmcompile.prune.plan import Fit, Goal, PrunePlan, Rule
from nmcompile.prune.pruning import prune
from nmcompile.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class PruningPass(Pass):
    """A pass that prunes by its `plan`.

    solver: magnitude and wanda choose weights and leave the others as they are; obs (SparseGPT) and admm (ALPS) fit
    what is left to the dense model's outputs on the calibration data. ranking: every layer gets its own sparsity
    (uniform), the least units of all layers together go (global; magnitude and wanda), or sparsities follow what each
    layer's zeros cost (sensitivity). The other options are those of nmcompile.prune.plan.Fit; damping 0 chooses it by
    held-out batches.
    """

    requires: ClassVar[tuple[str, ...]] = (CANONICAL,)
    solver: str = "magnitude"
    ranking: str = "uniform"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sequential: bool = True
    correction: float = 0.25
    residual: bool = True
    bias: bool = True
    norms: bool = True
    damping: float = 0.0
    rounding: bool = False

    @property
    def plan(self) -> PrunePlan:
        """What the options ask for; PassError for what they cannot mean."""
        raise NotImplementedError

    @property
    def fits(self) -> bool:
        """Whether weights that stay are fitted to the calibration data; False for a solver that there is not."""
        return self.solver in SOLVERS and SOLVERS[self.solver].fits

    def run(self, graph: gs.Graph, context: Context) -> Report:
        return prune(graph, self.plan, context)

    def planned(self, goal: Goal | None, rules: tuple[Rule, ...] = (), multiple: int = 1) -> PrunePlan:
        """The plan for some goals, with the options that all these passes have."""
        fit = Fit(self.solver, self.sequential, self.correction, self.residual, self.bias, self.norms,
                  self.damping or None, self.rounding)  # fmt: skip
        return PrunePlan(goal, rules, fit, self.ranking, self.include, self.exclude, multiple)
