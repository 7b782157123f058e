"""The built-in passes, one file each; `BUILTIN` is the registry that spec strings are read against."""

from __future__ import annotations

from nmcompile.contract import Pass
from nmcompile.passes.block_prune import BlockPrune
from nmcompile.passes.canonicalise_embeddings import CanonicaliseEmbeddings
from nmcompile.passes.canonicalise_linear import CanonicaliseLinear
from nmcompile.passes.expand_fused import ExpandFused
from nmcompile.passes.fold_constants import FoldConstants
from nmcompile.passes.fuse_attention import FuseAttention
from nmcompile.passes.fuse_gelu import FuseGelu
from nmcompile.passes.fuse_layer_norm import FuseLayerNorm
from nmcompile.passes.insert_qdq import InsertQdq
from nmcompile.passes.lower_opset import LowerOpset
from nmcompile.passes.magnitude_prune import MagnitudePrune
from nmcompile.passes.n_m_prune import NMPrune
from nmcompile.passes.narrow_floats import NarrowFloats
from nmcompile.passes.permute_features import PermuteFeatures
from nmcompile.passes.prune import Prune
from nmcompile.passes.quantize_outputs import QuantizeOutputs
from nmcompile.passes.raise_opset import RaiseOpset
from nmcompile.passes.scale_queries import ScaleQueries
from nmcompile.passes.simplify_masks import SimplifyMasks
from nmcompile.passes.simplify_shapes import SimplifyShapes
from nmcompile.passes.smooth_activations import SmoothActivations
from nmcompile.passes.store_weights import StoreWeights
from nmcompile.passes.train import Train
from nmcompile.passes.widen_floats import WidenFloats

BUILTIN: tuple[type[Pass], ...] = (
    RaiseOpset,
    ExpandFused,
    WidenFloats,
    FoldConstants,
    SimplifyShapes,
    CanonicaliseLinear,
    FuseLayerNorm,
    FuseGelu,
    FuseAttention,
    CanonicaliseEmbeddings,
    PermuteFeatures,
    Prune,
    MagnitudePrune,
    NMPrune,
    BlockPrune,
    Train,
    SmoothActivations,
    InsertQdq,
    QuantizeOutputs,
    SimplifyMasks,
    ScaleQueries,
    StoreWeights,
    LowerOpset,
    NarrowFloats,
)

__all__ = [
    "BUILTIN",
    "BlockPrune",
    "CanonicaliseEmbeddings",
    "CanonicaliseLinear",
    "ExpandFused",
    "FoldConstants",
    "FuseAttention",
    "FuseGelu",
    "FuseLayerNorm",
    "InsertQdq",
    "LowerOpset",
    "MagnitudePrune",
    "NMPrune",
    "NarrowFloats",
    "PermuteFeatures",
    "Prune",
    "QuantizeOutputs",
    "RaiseOpset",
    "ScaleQueries",
    "SimplifyMasks",
    "SimplifyShapes",
    "SmoothActivations",
    "StoreWeights",
    "Train",
    "WidenFloats",
]
