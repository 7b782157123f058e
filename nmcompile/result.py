"""What a compile says of itself: to its caller, in the report, in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmcompile.backends.tensorrt.engine import Engine, to_json
from nmcompile.compare import Difference
from nmcompile.coverage import Coverage
from nmcompile.fallback import Held, Noise
from nmcompile.lengths import Look
from nmcompile.pipeline import Report


@dataclass(frozen=True)
class Result:
    """What `compile` did: the plan's path, each pass with its report and seconds, the layers, and what was lost.

    `loss` compares the plan with the model it came from in onnxruntime, output by output, on the samples that
    `measured_on` names; empty when there was no plan. `synthetic` says that these samples were made up. `noise` is that
    of each layer's output against the dense model. `held` says how a limit on the loss was held: metric, limit, drop,
    and the layers that went back to dense or float. `segments`: with the milliseconds that each took on a sample.
    `coverage`: what share of the model runs native. `lengths`: plan against model at lengths that calibration had
    not. `engine`: what became of a TensorRT engine. `findings`: every rule of TensorRT's that its graph breaks, node by
    node.
    """

    plan: Path | None
    passes: tuple[tuple[str, Report, float], ...]
    layers: tuple[Mapping[str, Any], ...]
    segments: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    loss: Mapping[str, Difference]
    synthetic: bool
    held_out: bool
    seconds: float
    sizes: Mapping[str, int] = field(default_factory=dict)
    noise: Mapping[str, Noise] = field(default_factory=dict)
    held: Held | None = None
    coverage: Coverage | None = None
    lengths: Look | None = None
    engine: Engine | None = None
    findings: tuple[str, ...] = ()
    chosen_by: bool = False  # a limit was held on the very samples that the loss was measured on

    @property
    def measured_on(self) -> str:
        """What samples the loss was measured on."""
        if self.synthetic:
            what = "synthetic samples"
        else:
            what = "held-out samples" if self.held_out else "the calibration samples, too few to hold any out"
        return f"{what}, those that the limit was held by" if self.chosen_by else what

    @property
    def native(self) -> bool:
        """One native segment and nothing else."""
        return len(self.segments) == 1 and self.segments[0]["kind"] == "native"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON: the content of `--report`."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "seconds": round(self.seconds, 3),
            "passes": [{"pass": name, "changed": report.changed, "seconds": round(seconds, 3), "detail": report.detail,
                        "notes": list(report.notes)} for name, report, seconds in self.passes],
            "segments": [dict(segment) for segment in self.segments],
            "layers": list(self.layers),
            "notes": list(self.notes),
            "loss": {name: difference.to_json() for name, difference in self.loss.items()},
            "loss_on": self.measured_on,
            "held": {} if self.held is None else self.held.to_json(),
            "sqnr_db": {name: round(noise.sqnr, 2) for name, noise in self.noise.items()},
            "sizes": dict(self.sizes),
            **({} if self.coverage is None else {"native": self.coverage.to_json()}),
            **({} if self.lengths is None else {"lengths": self.lengths.to_json()}),
            **({} if self.engine is None else {"engine": to_json(self.engine)}),
            **({"findings": list(self.findings)} if self.findings else {}),
        }  # fmt: skip
