"""Inputs for a recipe: lengths around its constants, masks of every kind, ids over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from random_graph_masks import TRIANGLE
from random_graphs import Causal, Given, Recipe, constants, parts

Feeds = dict[str, np.ndarray]
USUAL = ("full", "right")  # masks that every plan must take
UNUSUAL = ("left", "holes", "empty", "values")
LENGTHS = (1, 2, 7, 40, 129, 200)
LONGEST = 600
SAMPLES = 16  # for calibration, of 6 to 12 tokens


@dataclass(frozen=True)
class Run:
    """One set of inputs: tokens of the first sequence, of the second, keys of the cache, what the masks are like."""

    tokens: int
    others: int
    past: int
    masks: str
    feeds: Feeds

    def __str__(self) -> str:
        others = f", {self.others} of the decoder's" * bool(self.others) + f", {self.past} before" * bool(self.past)
        return f"{self.tokens} tokens{others}, masks {self.masks}"


def longest(recipe: Recipe) -> int:
    """Most tokens that the tables of a recipe allow."""
    most = LONGEST
    at = recipe.positions
    if at is not None and at.kind not in ("given", "clip", "mod"):
        free = at.clamped and at.kind != "table"
        room = {"ids": 2, "mask": 3, "real": 1}.get(at.kind, 0) + at.first
        most = most if free and at.kind != "buffer" else min(most, at.rows - room)
    if at is not None and recipe.decoder is not None:
        most = min(most, at.rows)
    if any(part.form == "triangle" for part in parts(recipe) if isinstance(part, Causal)):
        most = min(most, TRIANGLE)
    return most


def lengths(recipe: Recipe) -> tuple[int, ...]:
    """Lengths to try: the usual ones, those around each constant, now and then the longest."""
    if recipe.static:
        return (recipe.static,)
    most = longest(recipe)
    around = {n for c in constants(recipe) for n in (c - 1, c, c + 1)}
    found = {n for n in {*LENGTHS, *around} if 1 <= n <= most}
    if recipe.seed % 4 == 0 or most < LENGTHS[-1]:
        found.add(most)
    return tuple(sorted(found))


def runs(recipe: Recipe) -> list[Run]:
    """Two sets of inputs at every length: usual masks, and one unusual kind after the other; all kinds at 11 tokens."""
    rng = np.random.default_rng([recipe.seed, 1])
    found = []
    for index, tokens in enumerate(lengths(recipe)):
        kinds = [USUAL[index % 2]] + [UNUSUAL[index % len(UNUSUAL)]] * bool(_hiding(recipe))
        found += [_run(recipe, rng, tokens, kind) for kind in kinds]
    middle = recipe.static or min(11, longest(recipe))
    kinds = [*USUAL, *UNUSUAL] if _hiding(recipe) else ["full"]
    return found + [_run(recipe, rng, middle, kind) for kind in kinds]


def samples(recipe: Recipe) -> list[Feeds]:
    """Short samples with usual masks, for calibration: of 6 to 12 tokens, and two of one token, whose attention is not
    averaged and so takes the widest range."""
    rng = np.random.default_rng([recipe.seed, 2])
    alike = any(item.shape == "b11s" for item in recipe.inputs)  # which calibration does not pad
    found = []
    for index in range(SAMPLES):
        tokens = recipe.static or (8 if alike else 1 if index % 8 == 5 else int(rng.integers(6, 13)))
        others = 0 if recipe.decoder is None else tokens if alike or not recipe.decoder.own else min(tokens, 9)
        kind = "right" if index % 4 == 0 else "full"
        found.append(_feeds(recipe, rng, (1, tokens, others, 5 if recipe.past else 0), kind))
    return found


def _hiding(recipe: Recipe) -> list[Given]:
    return [item for item in recipe.inputs if item.name not in ("segments", "position_ids")]


def _run(recipe: Recipe, rng: np.random.Generator, tokens: int, kind: str) -> Run:
    others = 0
    if recipe.decoder is not None:
        most = longest(recipe)
        others = int(rng.choice([1, 5, min(17, most), tokens]))
        if not recipe.decoder.own and recipe.positions is not None:
            others = tokens
    past = int(rng.choice([0, 1, 5, 16])) if recipe.past else 0
    past = min(past, longest(recipe) - tokens)
    return Run(tokens, others, past, kind, _feeds(recipe, rng, (3, tokens, others, past), kind))


def _feeds(recipe: Recipe, rng: np.random.Generator, sizes: tuple[int, int, int, int], kind: str) -> Feeds:
    batch, tokens, others, past = sizes
    feeds: Feeds = {"input_ids": _ids(recipe, rng, (batch, tokens))}
    if recipe.decoder is not None:
        feeds["decoder_input_ids"] = _ids(recipe, rng, (batch, others))
    if recipe.types == "input":
        feeds["token_type_ids"] = rng.integers(0, 2, (batch, tokens)).astype(recipe.ids.dtype)
    for index in range(len(recipe.masks) if recipe.past else 0):
        for part in ("key", "value"):
            shape = (batch, recipe.heads // recipe.share, past, recipe.size)
            feeds[f"past_{part}_{index}"] = rng.standard_normal(shape).astype(np.float32)
    for given in recipe.inputs:
        lead = 1 if given.shape == "1s" else batch
        if given.name == "position_ids":
            feeds[given.name] = _positions(recipe, rng, (lead, tokens), past, kind).astype(given.dtype)
        elif given.name == "segments":
            bounds = np.sort(rng.integers(0, past + tokens + 1, (lead, 3)), axis=1)
            feeds[given.name] = (np.arange(past + tokens) >= bounds[:, :, None]).sum(1).astype(given.dtype)
        else:
            values = _mask(rng, (lead, past + tokens), kind, given.dtype)
            feeds[given.name] = values[:, None, None] if given.shape == "b11s" else values
    return feeds


def _ids(recipe: Recipe, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    ids = rng.integers(0, recipe.ids.vocabulary, shape)
    ids.flat[rng.integers(ids.size)] = recipe.ids.vocabulary - 1
    return ids.astype(recipe.ids.dtype)


def _positions(recipe: Recipe, rng: np.random.Generator, shape: tuple[int, int], past: int, kind: str) -> np.ndarray:
    assert recipe.positions is not None
    if kind in USUAL:
        return np.broadcast_to((past + np.arange(shape[1])) % recipe.positions.rows, shape).copy()
    return rng.integers(0, recipe.positions.rows, shape)


def _mask(rng: np.random.Generator, shape: tuple[int, int], kind: str, dtype: str) -> np.ndarray:
    """0 and 1, or with `values` what else the type takes; one row of it is full but for `empty`."""
    batch, tokens = shape
    counts = rng.integers(1, tokens + 1, batch)
    counts[0] = tokens if batch > 1 else max(1, tokens - 2)
    right = np.arange(tokens) < counts[:, None]
    holes = rng.random(shape) < 0.7
    holes[np.arange(batch), rng.integers(0, tokens, batch)] = True
    mask: np.ndarray = {
        "full": np.ones(shape, bool),
        "right": right,
        "left": right[:, ::-1],
        "holes": holes,
        "empty": right & (np.arange(batch) != batch - 1)[:, None],
        "values": right,
    }[kind]
    if kind != "values" or dtype == "bool":
        return mask.astype(dtype)
    odd = rng.choice([2, -1, 1, 1] if dtype != "float32" else [2, -1, 0.5, 1], shape)
    return np.asarray(np.where(mask, odd, 0), dtype)
