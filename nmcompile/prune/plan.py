"""What is to be pruned, and how: the values that passes, recipes and searches make, and that `prune` carries out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nmcompile import sparsity as sp
from nmcompile.errors import PassError
from nmcompile.solvers import SOLVERS, Needs

RANKINGS = ("uniform", "global", "sensitivity")
USUAL = 0.8  # sparsity where none is asked for
RULE = re.compile(r"(?P<glob>.+?):(?P<pattern>unstructured|dense|[0-9]+[:x][0-9]+)(?:@(?P<sparsity>[^@]+))?")
DENSE = "dense"


@dataclass(frozen=True)
class Goal:
    """Of a layer: the pattern of its zeros, and its sparsity (what share of its weights are zeros)."""

    pattern: sp.Pattern
    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise PassError(f"sparsity={self.sparsity} is not a share of zeros between 0 and 1, for example 0.8")

    def __str__(self) -> str:
        return str(self.pattern) if isinstance(self.pattern, sp.NM) else f"{self.pattern}@{self.sparsity:g}"


@dataclass(frozen=True)
class Rule:
    """The goal of the layers whose names match a glob; None: they stay dense."""

    glob: str
    goal: Goal | None


@dataclass(frozen=True)
class Fit:
    """How layers are fitted.

    sequential: inputs are those of the compressed model; otherwise they are the dense model's. correction: how much of
    what the inputs have lost by then the layer shall make up for: 0 aims at what it would give on these inputs, 1 at
    what the dense model gives, which shrinks what cannot be predicted. residual: the same share of what the residual
    beside it has lost is part of the target of the layer that is added to it. bias: biases take on the mean error.
    norms: gain and bias of a normalisation give each channel the mean and deviation that it has in the dense model.
    damping: None chooses by held-out batches. rounding: weights end on int8 levels, each rounding error made up for by
    later ones.
    """

    solver: str = "admm"
    sequential: bool = True
    correction: float = 0.25
    residual: bool = True
    bias: bool = True
    norms: bool = True
    damping: float | None = None
    rounding: bool = False


@dataclass(frozen=True)
class PrunePlan:
    """Which layers get which zeros, by which solver.

    goal: of the layers that no rule names; None: they stay dense. rules: the first whose glob matches decides. include,
    exclude: globs of the layers that are pruned at all (default: all but heads and poolers). ranking: every layer gets
    the sparsity of its goal (uniform), or the layers of one goal have it together: the least units of all of them go
    (global; for solvers that leave weights as they are), or sparsities follow what each layer's zeros cost
    (sensitivity); n:m always has its own. multiple: of which the outputs and inputs of a layer must be to get n:m.
    """

    goal: Goal | None
    rules: tuple[Rule, ...] = ()
    fit: Fit = Fit(solver="magnitude")
    ranking: str = "uniform"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        solver = SOLVERS.get(self.fit.solver)
        if solver is None:
            raise PassError(f"solver={self.fit.solver} is not known; choose one of {', '.join(SOLVERS)}")
        if self.ranking not in RANKINGS:
            raise PassError(f"ranking={self.ranking} is not known; choose one of {', '.join(RANKINGS)}")
        if self.ranking == "global" and solver.fits:
            able = " and ".join(f"solver={name}" for name, row in SOLVERS.items() if not row.fits)
            raise PassError(f"ranking=global is for {able}; take ranking=sensitivity")
        if self.fit.damping is not None and self.fit.damping < 0:
            raise PassError(f"damping={self.fit.damping} is negative; 0.01 is usual, 0 chooses it")
        if self.multiple < 1:
            raise PassError(f"multiple={self.multiple} is no size; 1 takes every layer")

    @property
    def needs_data(self) -> bool:
        """Whether it takes calibration samples."""
        return SOLVERS[self.fit.solver].needs is not Needs.NOTHING or self.ranking == "sensitivity"

    @property
    def zeros(self) -> bool:
        """Whether any layer could get zeros."""
        return any(goal is not None and goal.sparsity for goal in (self.goal, *(rule.goal for rule in self.rules)))

    @property
    def patterns(self) -> str:
        """The patterns that it names, as text."""
        goals = [goal for goal in (*(rule.goal for rule in self.rules), self.goal) if goal is not None]
        return ", ".join(dict.fromkeys(str(goal.pattern) for goal in goals)) or DENSE

    def goal_of(self, layer: str) -> Goal | None:
        """The goal of a layer by its name."""
        return next((rule.goal for rule in self.rules if fnmatchcase(layer, rule.glob)), self.goal)


def goal(pattern: str, sparsity: float | None) -> Goal | None:
    """The goal written as a pattern and a sparsity; None for `dense`. PassError where the two contradict each other."""
    if pattern.strip().lower() == DENSE:
        if sparsity:
            raise PassError(f"pattern dense has no zeros, sparsity {sparsity:g} is asked for; leave it out")
        return None
    kind = sp.parse_pattern(pattern)
    if not isinstance(kind, sp.NM):
        return Goal(kind, USUAL if sparsity is None else sparsity)
    own = 1 - kind.n / kind.m
    if sparsity is not None and abs(sparsity - own) > 1e-6:
        raise PassError(f"pattern {kind} always has {own:.3g} zeros; leave the sparsity out")
    return Goal(kind, own)


def parse_rules(texts: Iterable[str], sparsity: float | None) -> tuple[Rule, ...]:
    """Rules written GLOB:PATTERN or GLOB:PATTERN@SPARSITY, such as encoder.layer.0.*:2:4 or *.ffn.*:4x4@0.8. `sparsity`
    is that of blocks and single weights of a rule that gives none; PATTERN may be dense."""
    rules = []
    for text in texts:
        match = RULE.fullmatch(text)
        if match is None:
            raise PassError(f"layers={text} is not NAMES:PATTERN or NAMES:PATTERN@SPARSITY, for example *.0.*:4x4@0.8")
        own = _number(match["sparsity"], text)
        fixed = ":" in match["pattern"] or match["pattern"] == DENSE
        try:
            found = goal(match["pattern"], own if own is not None or fixed else sparsity)
        except (PassError, sp.PatternError) as error:
            raise PassError(f"layers={text}: {error}") from None
        rules.append(Rule(match["glob"], found))
    return tuple(rules)


def _number(text: str | None, where: str) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise PassError(f"layers={where}: '{text}' is not a sparsity; write for example 0.8") from None
