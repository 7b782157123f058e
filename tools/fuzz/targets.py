"""The fuzz targets by name. To add one: a module beside this one with a `TARGET`, and its line here."""

from __future__ import annotations

from tools.fuzz import engines, feeds, inputs, plans, programs

TARGETS = {target.name: target for target in (
    plans.TARGET, programs.TARGET, feeds.TARGET, engines.TARGET, inputs.MODELS, inputs.DATA)}  # fmt: skip
