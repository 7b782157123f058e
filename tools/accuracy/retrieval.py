"""Retrieval with sentence embeddings: find the second paragraph of a docstring by its first among all seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Feeds = dict[str, np.ndarray]
Embed = Callable[[Feeds], np.ndarray]  # -> last hidden states [batch, tokens, hidden]

BATCH = 32


@dataclass(frozen=True)
class Scores:
    """top1: share of firsts whose own second is the nearest; mrr: mean of 1 / rank; cosine: to the dense model's
    embeddings, mean over all texts."""

    top1: float
    mrr: float
    cosine: float


@dataclass(frozen=True)
class Task:
    """Batches of texts, firsts then seconds, sorted by length inside."""

    batches: tuple[Feeds, ...]
    order: np.ndarray
    count: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], tokenizer: Path, length: int = 128) -> Task:
        from tokenizers import Tokenizer

        reader = Tokenizer.from_file(str(tokenizer))
        reader.enable_truncation(length)
        reader.no_padding()
        rows = [reader.encode(text).ids for side in (0, 1) for text in (pair[side] for pair in pairs)]
        order = np.argsort([len(row) for row in rows], kind="stable")
        starts = range(0, len(rows), BATCH)
        batches = tuple(_padded([rows[i] for i in order[start : start + BATCH]]) for start in starts)
        return cls(batches, order, len(pairs))

    def embeddings(self, embed: Embed) -> np.ndarray:
        """[2 * count, hidden]: means over real tokens, of length one."""
        parts = []
        for feeds in self.batches:
            weight = feeds["attention_mask"][..., None].astype(np.float32)
            mean = (embed(feeds) * weight).sum(axis=1) / weight.sum(axis=1)
            parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        found = np.empty((2 * self.count, parts[0].shape[1]), np.float32)
        found[self.order] = np.concatenate(parts)
        return found

    def scores(self, vectors: np.ndarray, dense: np.ndarray) -> Scores:
        """Of embeddings, next to the dense model's."""
        similar = vectors[: self.count] @ vectors[self.count :].T
        own = np.diag(similar)
        ranks = 1 + (similar > own[:, None]).sum(axis=1)
        cosine = float((vectors * dense).sum(axis=1).mean())
        return Scores(float((ranks == 1).mean()), float((1 / ranks).mean()), cosine)


def _padded(rows: Sequence[Sequence[int]]) -> Feeds:
    width = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
