"""Training of pruned graphs by distillation; needs torch (pip install 'nmcompile[train]')."""

from __future__ import annotations

from nmcompile.training.batches import for_fitting
from nmcompile.training.clock import Clock, rung
from nmcompile.training.losses import Distillation
from nmcompile.training.recipe import Recipe, seconds
from nmcompile.training.train import Masked, Trained, check, train

__all__ = ["Clock", "Distillation", "Masked", "Recipe", "Trained", "check", "for_fitting", "rung", "seconds", "train"]
