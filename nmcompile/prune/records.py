"""What pruning did to each layer, as values: masks, and what was there before, so that it can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from nmcompile import sparsity as sp


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """Of one layer [N outputs, K inputs].

    asked: the sparsity it was given. bits: its mask, packed (`mask`). weight: before, [N, K] float32. bias: before,
    [N], and `bias_name` the tensor that held it; None where the layer has none. norm: the node of the normalisation
    before the layer that was fitted too, a key of `Records.norms`. changed: whether any weight is another than before.
    """

    pattern: sp.Pattern
    asked: float
    bits: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray | None = field(repr=False)
    bias_name: str
    norm: str | None
    changed: bool

    @property
    def mask(self) -> sp.Mask:
        """Which weights were kept, bool [N, K]."""
        kept = np.unpackbits(self.bits, count=self.weight.size).astype(np.bool_)
        return kept.reshape(self.weight.shape)

    @property
    def sparsity(self) -> float:
        """The share of weights that the mask drops."""
        return 1 - int(np.bitwise_count(self.bits).sum()) / max(self.weight.size, 1)


@dataclass(frozen=True, eq=False)
class NormRecord:
    """Gain and bias [K] that a normalisation had before it was fitted, and the tensors that held them."""

    values: tuple[np.ndarray, np.ndarray] = field(repr=False)
    names: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Records:
    """By the name of the layer, and of the node of the normalisation. A weight that several layers share has a record
    under each of them."""

    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    norms: Mapping[str, NormRecord] = field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """The layers whose weights are others than before."""
        return [name for name, record in self.layers.items() if record.changed]


def joined(parts: Iterable[Records | None]) -> Records:
    """The records of passes that ran one after another: what was before the first of them, the masks of the last."""
    layers: dict[str, LayerRecord] = {}
    norms: dict[str, NormRecord] = {}
    for part in parts:
        if part is None:
            continue
        for name, later in part.layers.items():
            first = layers.get(name)
            layers[name] = later if first is None else replace(
                later, weight=first.weight, bias=first.bias, bias_name=first.bias_name, norm=first.norm or later.norm,
                changed=first.changed or later.changed)  # fmt: skip
        norms = {**part.norms, **norms}
    return Records(layers, norms)


def packed(mask: sp.Mask) -> np.ndarray:
    """A mask as bits."""
    return np.packbits(mask)
