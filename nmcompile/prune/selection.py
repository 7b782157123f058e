"""What the pruning passes share: which layers, by which solver, ranked over which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.canonical import role
from nmcompile.contract import CANONICAL, NEEDS_DATA, Context, Pass, Report
from nmcompile.errors import PassError
from nmcompile.prune import sensitivity
from nmcompile.prune.fitting import Fit, fit
from nmcompile.solvers import SOLVERS

MASKS = ("magnitude", "wanda")  # solvers that leave the kept weights as they are
INTEGER_PRODUCTS = ("MatMulInteger", "QLinearMatMul", "MatMulNBits", "QGemm", "DynamicQuantizeMatMul")
RANKINGS = ("uniform", "global", "sensitivity")


@dataclass(frozen=True)
class Selection:
    """The layers to prune, and those left alone with the reason."""

    layers: tuple[g.Linear, ...]
    kept: Mapping[str, str]


def select(graph: gs.Graph, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """Layers named by a glob of `include` (default: all but heads and poolers) and by none of `exclude`."""
    layers, kept = [], {}
    for layer in g.linear_layers(graph):
        default = role(graph, layer)
        if any(fnmatchcase(layer.name, glob) for glob in exclude):
            kept[layer.name] = "excluded by name"
        elif include and not any(fnmatchcase(layer.name, glob) for glob in include):
            kept[layer.name] = "not included by name"
        elif layer.quantized:
            kept[layer.name] = "already quantized"
        elif not include and default:
            kept[layer.name] = f"{default}s are kept dense by default"
        else:
            layers.append(layer)
    if include and not layers and "excluded by name" not in kept.values():
        names = ", ".join(layer.name for layer in g.linear_layers(graph)[:4])
        raise PassError(f"include={'|'.join(include)} matches no linear layer; the graph has {names or 'none'}, ...")
    return Selection(tuple(layers), kept)


@dataclass(frozen=True, kw_only=True)
class PruningPass(Pass):
    """The options that all pruning passes have.

    solver: magnitude and wanda choose weights and leave the others as they are; obs (SparseGPT) and admm (ALPS) fit
    what is left to the dense model's outputs on the calibration data. ranking: every layer gets the same share of
    zeros (uniform), the least units of all layers together go (global; magnitude and wanda), or shares follow what each
    layer's zeros cost (sensitivity). The other options are those of nmcompile.prune.fitting.Fit; damping 0 chooses it
    by held-out batches.
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

    def prune(
        self,
        graph: gs.Graph,
        pattern: sp.Pattern,
        sparsity: float,
        selection: Selection,
        context: Context,
    ) -> Report:
        """Zero `sparsity` of the weights of the selected layers, in units of the pattern."""
        if not 0 <= sparsity < 1:
            raise PassError(f"sparsity={sparsity} is not a share of zeros between 0 and 1, for example 0.8")
        if self.solver not in SOLVERS:
            raise PassError(f"solver={self.solver} is not known; choose one of {', '.join(SOLVERS)}")
        if self.ranking not in RANKINGS:
            raise PassError(f"ranking={self.ranking} is not known; choose one of {', '.join(RANKINGS)}")
        fitted = self.solver not in MASKS
        if self.ranking == "global" and fitted:
            raise PassError("ranking=global is for solver=magnitude and solver=wanda; take ranking=sensitivity")
        if self.damping < 0:
            raise PassError(f"damping={self.damping} is negative; 0.01 is usual, 0 chooses it")
        needed = fitted or self.solver == "wanda" or self.ranking == "sensitivity"
        if needed and context.calibration is None and selection.layers:
            raise PassError(NEEDS_DATA)
        if not sparsity or not selection.layers:
            return Report(detail={"pattern": str(pattern), "density": {}},
                          notes=(*_nothing(graph, sparsity, selection), *_kept_dense(selection)))  # fmt: skip
        layers = _each_weight_once(selection.layers)
        shares = dict.fromkeys((layer.name for layer in selection.layers), sparsity)
        detail: dict[str, object] = {"pattern": str(pattern)}
        if self.ranking == "sensitivity" and not isinstance(pattern, sp.NM) and layers:
            table = sensitivity.measure(graph, context.data, layers, pattern, sensitivity.ladder(sparsity),
                                        context.progress)  # fmt: skip
            shares = sensitivity.sparsities(table, sparsity)
            detail["table"] = [unit.to_json() for unit in table]
        before = {layer.name: layer.weight for layer in layers}
        few: list[str] = []
        if fitted and layers:
            how = Fit(self.solver, self.sequential, self.correction, self.residual, self.bias, self.norms,
                      self.damping or None, self.rounding)  # fmt: skip
            found = fit(graph, context.data, layers, pattern, shares, how, context.progress,
                        context.checkpoints)  # fmt: skip
            detail["fitted"] = {name: {"error": round(item.error, 6), "damping": item.damping}
                                for name, item in found.items()}  # fmt: skip
            few = _few(layers, {name: item.rows for name, item in found.items()})
        else:
            self._mask(graph, layers, pattern, sparsity, shares, context)
        after = {layer.name: layer.weight for layer in g.linear_layers(graph)}
        n_changed = sum(not np.array_equal(after[name], weight) for name, weight in before.items())
        detail["density"] = {name: round(float(sp.density(after[name])), 4) for name in before}
        already = [] if n_changed else ["nothing was pruned: the layers have such zeros already"]
        notes = [*already, *few, *_emptied(before, after, pattern), *_kept_dense(selection)]
        return Report(changed=n_changed, detail=detail, notes=tuple(notes))

    def _mask(
        self,
        graph: gs.Graph,
        layers: Sequence[g.Linear],
        pattern: sp.Pattern,
        sparsity: float,
        shares: Mapping[str, float],
        context: Context,
    ) -> None:
        """Zero the units of least score, the rest stays."""
        scores: dict[str, np.ndarray] = {}
        if self.solver == "wanda":
            statistics = context.collect(graph, {layer.x.name: ("squares",) for layer in layers})
            scores = {layer.name: sp.wanda(layer.weight, statistics.squares(layer.x.name)) for layer in layers}
        else:
            scores = {layer.name: sp.magnitude(layer.weight) for layer in layers}
        threshold = None
        if self.ranking == "global" and not isinstance(pattern, sp.NM) and scores:
            units = [sp.unit_scores(score, pattern) for score in scores.values()]
            sizes = [score.size // unit.size for score, unit in zip(scores.values(), units, strict=True)]
            threshold = sp.global_threshold(units, sizes, sparsity)
        for layer in layers:
            score = scores[layer.name]
            mask = (sp.keep_mask(score, pattern, shares[layer.name]) if threshold is None
                    else sp.keep_above(score, pattern, threshold))  # fmt: skip
            pruned = layer.weight * mask
            if np.count_nonzero(pruned) != np.count_nonzero(layer.weight):
                g.set_weight(graph, layer, pruned)


def _nothing(graph: gs.Graph, sparsity: float, selection: Selection) -> list[str]:
    """Why a pass that prunes has nothing to do, beside the reasons of the layers that it keeps."""
    if not sparsity:
        return ["nothing was pruned: the share of zeros that was asked for is 0"]
    if selection.kept:
        return []
    integers = sorted({node.op for node in graph.nodes if node.op in INTEGER_PRODUCTS})
    has = f"its products are {', '.join(integers)}, quantized already" if integers else (
        "only products with constant float weights (MatMul, Gemm) are layers")  # fmt: skip
    return [f"nothing was pruned: the model has no linear layers that could be; {has}"]


def _kept_dense(selection: Selection) -> list[str]:
    return [f"{name}: kept dense, {reason}" for name, reason in selection.kept.items()]


def _each_weight_once(layers: Sequence[g.Linear]) -> list[g.Linear]:
    """A weight shared by several layers is pruned once, by its first user's inputs."""
    found: dict[str, g.Linear] = {}
    for layer in layers:
        found.setdefault(layer.node.inputs[1].name, layer)
    return list(found.values())


def _few(layers: Sequence[g.Linear], rows: Mapping[str, int]) -> list[str]:
    """Fewer tokens than inputs leave directions that no sample shows: only damping holds the weights there."""
    poor = [layer for layer in layers if rows[layer.name] < layer.weight.shape[1]]
    if not poor:
        return []
    most = max(layer.weight.shape[1] for layer in poor)
    return [f"{len(poor)} layers of up to {most} inputs were fitted to {rows[poor[0].name]} tokens only, held by "
            "damping; give more calibration samples"]  # fmt: skip


def _emptied(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], pattern: sp.Pattern
) -> list[str]:
    return [f"{name}: nothing is left of its {weight.shape[0]}x{weight.shape[1]} weights at {pattern}; "
            "take smaller units"
            for name, weight in before.items() if weight.any() and not after[name].any()]  # fmt: skip
