"""Pruning on a graph: which layers, which zeros each, and weights fitted to what the dense model computes.

plan          what is asked for: a goal (pattern and sparsity) per layer, a solver, a ranking
pruning       carries a plan out; options is the base of the passes that make plans
selection     which layers, and why others stay dense
masking       solvers that leave the kept weights as they are
fitting       solvers that fit them, stage by stage (stages, sequential: the inputs that each stage will see)
norms         normalisations that follow
sensitivity   what zeros cost each group of layers, and the sparsities that follow from it
features      an order of features in which zeros lose least
records       what was done to each layer, as values; undo takes it back
checkpoints   finished stages in files
"""

from nmcompile.prune.options import PruningPass
from nmcompile.prune.plan import Fit, Goal, PrunePlan, Rule, goal, parse_rules
from nmcompile.prune.pruning import prune
from nmcompile.prune.records import LayerRecord, NormRecord, Records, joined
from nmcompile.prune.undo import completed, undone

__all__ = ["Fit", "Goal", "LayerRecord", "NormRecord", "PrunePlan", "PruningPass", "Records", "Rule", "completed",
           "goal", "joined", "parse_rules", "prune", "undone"]  # fmt: skip
