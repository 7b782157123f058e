"""A scheme and a target that are made up here go through the stages like those that are built in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from compiled import MODELS, feeds

from nmcompile import ir as g
from nmcompile.accuracy import Reference, Search, held_by
from nmcompile.calibrate import Calibration, open_data
from nmcompile.compare import Comparison, worst
from nmcompile.holdout import hold_out
from nmcompile.metrics import parse_limit
from nmcompile.qdq.scheme import CPU, Scheme
from nmcompile.recipes import PRESETS, Preset
from nmcompile.spec import parse_spec
from nmcompile.stages import Keep, PassRun, PrunePasses, Quantized, Runner, canonicalise, prune, quantize
from nmcompile.targets import CpuTarget, Product, Target

BERT = MODELS / "bert-torchscript.onnx"
COARSE = replace(CPU, clip="percentile", percentile=80.0, weight_bits=7)  # a scheme that loses more


@dataclass(frozen=True)
class Portable(Product):
    """The Q/DQ graph as it is, in onnxruntime."""

    target: ClassVar[str] = "portable"
    quantized: Quantized
    graph: gs.Graph
    ran: tuple[PassRun, ...]

    def run(self, given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return g.run(self.graph, given)


@dataclass(frozen=True)
class PortableTarget(Target):
    name: ClassVar[str] = "portable"
    attention: ClassVar[str] = "float"

    def scheme(self, preset: Preset, attention: str | None = None) -> Scheme:
        return replace(preset.scheme(COARSE), attention=attention or self.attention, clip="percentile")

    def lower(self, quantized: Quantized, runner: Runner) -> Portable:
        return Portable(quantized, quantized.graph, quantized.ran)


def lost(source: gs.Graph, product: Product) -> float:
    comparison = Comparison(g.outputs(source))
    for batch in feeds(BERT):
        comparison.add(g.run(source, batch), product.run(batch))
    found = worst(comparison.differences().values())
    assert found is not None
    return 1 - found.cosine


def test_a_target_and_a_scheme_go_through_the_stages() -> None:
    source, target, preset = g.load(BERT), PortableTarget(), PRESETS["fast"]
    runner = Runner(Calibration(open_data(feeds(BERT), g.inputs(source))))
    pruned = prune(canonicalise(source, runner), PrunePasses(), runner)
    coarse = target.lower(quantize(pruned, target.scheme(preset), runner), runner)
    fine = target.lower(quantize(pruned, CpuTarget().scheme(preset), runner), runner)
    assert coarse.header["target"] == "portable" and coarse.header["passes"][-1].startswith("insert-qdq(")
    assert "percentile=80.0" in coarse.header["passes"][-1] and "attention=float" in coarse.header["passes"][-1]
    assert lost(source, coarse) > 2 * lost(source, fine) > 0


def test_accuracy_fallback_knows_no_target() -> None:
    source, target = g.load(BERT), PortableTarget()
    data = open_data([{name: row[None] for name, row in zip(batch, rows, strict=True)} for batch in feeds(BERT)
                      for rows in zip(*batch.values(), strict=True)], g.inputs(source))  # fmt: skip
    parts = hold_out(data, limited=True)
    runner = Runner(Calibration(parts.seen))
    pruned = prune(canonicalise(source, runner), PrunePasses.of(parse_spec("block-prune(sparsity=0.9)")), runner)
    scheme = target.scheme(PRESETS["fast"])

    def build(keep: Keep) -> Product:
        return target.lower(quantize(pruned, scheme, runner, keep), runner)

    search = Search(Reference(source), pruned, build, False, runner.progress)
    limit = parse_limit("cosine=0.02", list(parts.chosen), data.inputs)
    product, held, _, _ = held_by(search, limit, "cosine=0.02", parts)
    assert held.drop <= 0.02 and held.dense and isinstance(product, Portable)
    assert product.quantized.keep == Keep(held.dense, held.floating)
