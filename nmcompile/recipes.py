"""Which passes run for a target, in which order: the recipes of the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields

from nmcompile import sparsity as sp
from nmcompile.backends.tensorrt.profiles import Profile
from nmcompile.errors import PassError, UnsupportedError
from nmcompile.passes import (
    BlockPrune,
    CanonicaliseEmbeddings,
    CanonicaliseLinear,
    ExpandFused,
    FoldConstants,
    FuseAttention,
    FuseGelu,
    FuseLayerNorm,
    InsertQdq,
    LowerOpset,
    MagnitudePrune,
    NarrowFloats,
    NMPrune,
    PermuteFeatures,
    Prune,
    QuantizeOutputs,
    RaiseOpset,
    ScaleQueries,
    SimplifyMasks,
    SimplifyShapes,
    SmoothActivations,
    StoreWeights,
    Train,
    WidenFloats,
)
from nmcompile.passes.train import Fields
from nmcompile.pipeline import Pass
from nmcompile.prune import PruningPass
from nmcompile.prune.plan import USUAL
from nmcompile.qdq.scheme import Scheme
from nmcompile.solvers import SOLVERS

SPARSE_MULTIPLE = 32  # outputs and inputs of a layer that TensorRT may run sparse: INT8 formats hold 32 channels


@dataclass(frozen=True)
class Preset:
    """How much time the compiler may spend: the solver that prunes where there are real samples, how activation ranges
    are clipped, on how many samples, real and made-up ones."""

    solver: str
    clip: str
    limit: int
    made_up: int
    options: Mapping[str, object] = field(default_factory=dict)  # of the pruning pass
    smooth: bool = True  # outlier channels move into the weights
    alpha: float = 0.6  # how far; 0 chooses it for each normalisation
    bias: bool = False  # biases take on the mean error of rounding
    weight_bits: int = 8  # 7: the emitted graph is right in onnxruntime on CPUs without VNNI too

    def scheme(self, target: Scheme) -> Scheme:
        """A target's scheme with what the preset says of it."""
        alpha = self.alpha if self.smooth else None
        return replace(target, clip=self.clip, bias=self.bias, alpha=alpha, weight_bits=self.weight_bits)


PRESETS: Mapping[str, Preset] = {
    "default": Preset("admm", "output", 256, 128, alpha=0.0, bias=True),
    "fast": Preset("obs", "min-max", 128, 32, {"damping": 0.05, "norms": False, "ranking": "uniform"}),
}


def reduced(preset: Preset, target: str) -> Preset:
    """The preset with weights of 7 bits. UnsupportedError for TensorRT, which saturates nowhere."""
    if target != "cpu":
        raise UnsupportedError(f"reduce_range is for CPUs without VNNI; leave it out for target {target}")
    return replace(preset, weight_bits=7)


def canonical_passes() -> list[Pass]:
    """From any exporter's graph to few operators; every one of them keeps what the graph computes."""
    return [
        RaiseOpset(),  # first: one version of each operator for all that follows
        ExpandFused(),  # before shapes are simplified: a fused node hides them
        WidenFloats(),
        FoldConstants(),  # transposed weights, masks of fixed size
        SimplifyShapes(),  # needs folded constants to see fixed sizes
        FoldConstants(),  # sizes that have just become constant
        CanonicaliseLinear(),
        FuseLayerNorm(),
        FuseGelu(),
        FuseAttention(),  # after linear: merged projections must be linear layers before they are taken apart
        CanonicaliseLinear(),  # the product after attention has lost the reshapes that hid it
        CanonicaliseEmbeddings(),
    ]


def pruning_passes(
    pattern: str | None, sparsity: float | None, solver: str, options: Mapping[str, object] | None = None,
    multiple: int = 1,
) -> list[Pass]:
    """The passes for a pattern ("2x4", "2:4", "unstructured") and a share of zeros; none when neither is given, for
    "dense", and for a share of 0.

    Solvers that fit what is left also get the features in a good order first, and zeros where they harm least.
    multiple: of which sizes must be for n:m zeros.
    """
    if (pattern is None and sparsity is None) or pattern == "dense":
        return []
    kind = sp.parse_pattern(pattern or "2x4")
    fitted = solver in SOLVERS and SOLVERS[solver].fits
    given = {"solver": solver, **({"ranking": "sensitivity"} if fitted else {}), **(options or {})}
    order: list[Pass] = []
    if fitted and not isinstance(kind, sp.Unstructured) and given["ranking"] != "uniform":
        order = [PermuteFeatures(pattern=str(kind))]
    if isinstance(kind, sp.NM):
        given.pop("ranking", None)
        if sparsity is not None and abs(sparsity - (1 - kind.n / kind.m)) > 1e-6:
            raise PassError(f"pattern {kind} always has {1 - kind.n / kind.m:.3g} zeros; leave --sparsity out")
        return [*order, NMPrune(pattern=str(kind), multiple=multiple, **given)]  # type: ignore[arg-type]
    wanted = USUAL if sparsity is None else sparsity
    if not 0 <= wanted < 1:
        raise PassError(f"sparsity {wanted} is not a share of zeros between 0 and 1, for example 0.8")
    if not wanted:
        return []
    if isinstance(kind, sp.Block):
        return [*order, BlockPrune(sparsity=wanted, block=str(kind), **given)]  # type: ignore[arg-type]
    if solver == "magnitude":
        return [MagnitudePrune(sparsity=wanted, **given)]  # type: ignore[arg-type]
    return [Prune(pattern=str(kind), sparsity=wanted, **given)]  # type: ignore[arg-type]


def training_passes(passes: Sequence[Pass], fields: Fields) -> tuple[list[Pass], Train]:
    """The passes but the last, which prunes, and one in its place that trains as well."""
    *before, last = passes
    assert isinstance(last, PruningPass)
    plan = last.plan
    assert plan.goal is not None
    shared = {item.name: getattr(last, item.name) for item in dataclass_fields(PruningPass)}
    sparsity = None if isinstance(plan.goal.pattern, sp.NM) else plan.goal.sparsity
    return before, Train(pattern=str(plan.goal.pattern), sparsity=sparsity, multiple=plan.multiple, **shared, **fields)


def scheme_passes(scheme: Scheme) -> list[Pass]:
    """What follows pruning, as a scheme says."""
    # of the pruned model: what is left of the weights takes the outliers
    smooth = [] if scheme.alpha is None else [SmoothActivations(alpha=scheme.alpha, activations=scheme.activations)]
    # after pruning and Q/DQ: only quantized sparse layers gain
    outputs = [] if scheme.outputs == "none" else [QuantizeOutputs.of(scheme)]
    return [*smooth, InsertQdq.of(scheme), *outputs]  # ranges are those of the smoothed model


def legalizing_passes(profile: Profile, weights: str) -> list[Pass]:
    """From the Q/DQ graph to the one that a version of TensorRT reads."""
    return [
        SimplifyMasks(),  # first, as the next: both match attention, which what follows takes apart
        ScaleQueries(),
        StoreWeights(form=weights),
        LowerOpset(version=profile.opset),  # before types: a legalized GELU is typed like the rest
        *([NarrowFloats()] if profile.strong else []),
    ]
