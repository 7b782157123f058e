"""Streams: the sequences of tokens that go through the engine, and what is told apart in each.

A stream is [batch, tokens] with lengths of its own: an encoder's tokens are one, a decoder's would be another. A value
holds some of a stream's tokens (`Space`); the engine knows that by a word, the geometry of the value's buffer. This
module alone says which word, and how many tokens a run has of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

Geometry: TypeAlias = str
ENTERED, CLASSED, FIRST = "tokens", "tokens1", "first"  # those that came in, behind a class token, one of each sequence


@dataclass(frozen=True)
class Stream:
    """The sizes [batch, tokens] that its tensors begin with: numbers, or names of free sizes."""

    batch: int | str
    tokens: int | str

    @property
    def key(self) -> str:
        """Values of equal keys have equal sizes."""
        return f"{self.batch}x{self.tokens}"

    @property
    def shape(self) -> list[int | str]:
        return [self.batch, self.tokens]


@dataclass(frozen=True)
class Space:
    """Which tokens a value holds: all of a stream, or the first of each sequence."""

    stream: Stream
    first: bool = False

    def whole(self) -> Space:
        return replace(self, first=False)

    def firsts(self) -> Space:
        return replace(self, first=True)


@dataclass(frozen=True)
class Places:
    """The words that one native segment has for its tokens. class_token: one stands before those that come in."""

    class_token: bool = False

    def geometry(self, space: Space) -> Geometry:
        """Of the buffers that hold a value."""
        return FIRST if space.first else CLASSED if self.class_token else ENTERED

    @property
    def entering(self) -> Geometry:
        """Of tokens before a class token is put in front of them."""
        return ENTERED


@dataclass(frozen=True, eq=False)
class Counts:
    """How much a run was given: by geometry the real tokens of each sequence, int64 [batch]; tokens with padding."""

    lengths: Mapping[Geometry, np.ndarray]
    padded: int

    def tokens(self, geometry: Geometry) -> int:
        return int(self.lengths[geometry].sum())

    def pairs(self, queries: Geometry, keys: Geometry, causal: bool) -> int:
        """Of a query and a key that attention looks at; causal: the keys up to each query, of the same tokens."""
        q, k = self.lengths[queries], self.lengths[keys]
        return int((q * (q + 1) // 2 if causal else q * k).sum())


def count(lengths: np.ndarray, padded: int, class_token: bool) -> Counts:
    """Of sequences with these numbers of real tokens, int [batch], each padded to `padded`; a class token comes on
    top."""
    entered = lengths.astype(np.int64)
    found = {ENTERED: entered, CLASSED: entered + class_token, FIRST: np.ones_like(entered)}
    return Counts(found, len(lengths) * (padded + class_token))
