"""What each step of a plan has to do: multiply-adds and bytes, read off the plan's header and the shapes of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nmcompile.backends.cpu.session import Span
from nmcompile.errors import PlanError

Json = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

READS = ("x", "a", "b", "k", "v", "residual")
OPERATORS = 4  # of a segment on onnxruntime, in its label
TABLES = ("tables", "table")  # of which a step reads one row per token


@dataclass(frozen=True)
class Linear:
    """A linear layer as it is computed. `share`: of the dense products; `tokens`: the geometry they run over."""

    outputs: int
    inputs: int
    format: str  # "dense", "blocks", "gather" or "float"
    rows: int
    share: float
    activation: str

    @property
    def kernel(self) -> str:
        """As patterns are written, outputs x inputs: 2x4."""
        return {"blocks": f"{self.rows}x4", "gather": f"{self.rows}x1"}.get(self.format, self.format)


@dataclass(frozen=True)
class Step:
    """A step of a plan. Steps of equal `head` and `tail` are equal but for their weights' share of zeros."""

    kind: str
    head: str  # "linear 768 -> 3072 2x4"
    tail: str = ""  # "gelu"
    layer: str = ""  # the model's name of a linear layer
    geometry: str = "tokens"
    linear: Linear | None = None
    segment: int = 0
    facts: Json = field(default_factory=dict, repr=False, compare=False)  # of the plan's header

    @property
    def label(self) -> str:
        """All that tells it from others: "linear 768 -> 3072 2x4 10% gelu"."""
        return named(self.head, [self.linear.share] if self.sparse and self.linear else [], self.tail)

    @property
    def sparse(self) -> bool:
        return self.linear is not None and self.linear.format in ("blocks", "gather")


def named(head: str, shares: Sequence[float], tail: str) -> str:
    """The label of steps that compute these shares of their dense products."""
    low, high = (round(100 * value) for value in (min(shares, default=0), max(shares, default=0)))
    share = "" if not shares else f"{low}%" if low == high else f"{low}-{high}%"
    return " ".join(word for word in (head, share, tail) if word)


def steps_of(header: Json, arrays: Arrays, described: Sequence[tuple[str, str]]) -> list[Step]:
    """The steps of a plan in the order of a session's trace; `described` (kind, text) is what the engine calls them.

    PlanError when the plan and the engine do not agree on the steps.
    """
    layers = iter(header["layers"])
    found: list[Step] = []
    for number, segment in enumerate(header["segments"]):
        if segment["kind"] != "native":
            operators = [*segment["operators"][:OPERATORS], *(["..."] if len(segment["operators"]) > OPERATORS else [])]
            text = f"onnxruntime, {segment['nodes']} nodes: {', '.join(operators)}"
            found.append(Step("onnxruntime", text, segment=number))
            continue
        names = _layer_names(segment, layers)
        for step, name in zip(segment["steps"], names, strict=True):
            text = described[len(found)][1] if len(found) < len(described) else ""
            found.append(_step(step, segment, arrays, text, name, number))
    if [step.kind for step in found] != [kind for kind, _ in described]:
        raise PlanError("the engine's steps are not those of the plan; compile it again")
    return found


def _layer_names(segment: Json, layers: Iterator[Json]) -> list[str]:
    """The header lists linear layers in order; one may take two steps, in two forms of its result."""
    names: list[str] = []
    last: Json = {}
    before = ""
    for step in segment["steps"]:
        name = ""
        if step["step"] == "linear_float" and before == "patches":
            name = "patches"
        elif step["step"] in ("linear", "linear_float"):
            if last and (last["weight"], last["x"]) == (step["weight"], step["x"]):
                name = names[-1]
            else:
                layer = next(layers, {})
                shape = tuple(segment["buffers"][step[key]][0] for key in ("y", "x"))
                name = str(layer["name"]) if shape == (layer.get("outputs"), layer.get("inputs")) else ""
        last = step if name and name != "patches" else {}
        names.append(name)
        before = step["step"]
    return names


def _step(step: Json, segment: Json, arrays: Arrays, text: str, layer: str, number: int) -> Step:
    kind = str(step["step"])
    buffers = segment["buffers"]
    written = next((step[key] for key in ("y", "q", "x") if step.get(key, -1) >= 0), None)
    geometry = "tokens" if written is None else str(buffers[written][2])
    if kind not in ("linear", "linear_float"):
        first = "of first tokens" if geometry == "first" and kind != "first" else ""
        return Step(kind, f"{kind} {text}".strip(), first, geometry=geometry, segment=number, facts=step)
    inputs, outputs = int(buffers[step["x"]][0]), int(buffers[step["y"]][0])
    weight = step["weight"]
    if kind == "linear":
        packed = arrays[weight["values"]["array"]]
        whole = -(-outputs // 4) * 4 * -(-inputs // 4) * 4
        form, rows, share = str(weight["format"]), int(weight.get("rows", 0)), packed.size / whole
    else:
        form, rows, share = "float", 0, 1.0
    linear = Linear(outputs, inputs, form, rows, share, str(step["activation"]))
    tail = [] if linear.activation == "none" else [linear.activation]
    tail += ["+ residual"] if step["residual"] >= 0 else []
    tail += ["of first tokens"] if geometry == "first" else []
    return Step(kind, f"linear {inputs} -> {outputs} {linear.kernel}", " ".join(tail), layer, geometry, linear,
                number, step)  # fmt: skip


# ---- work -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much a native segment was given: real tokens by geometry, pairs that attention looks at, padded tokens."""

    tokens: Mapping[str, int]
    pairs: int
    causal_pairs: int
    padded: int


def sizes(segment: Json, span: Span) -> Sizes:
    """The sizes of one run of a native segment, from the shapes of its inputs and its mask."""
    batch, *rest = span.shapes[0] if span.shapes else (0,)
    patch = next((step for step in segment["steps"] if step["step"] == "patches"), None)
    length = math.prod(rest[:1])
    if patch is not None:
        _, height, width = span.shapes[patch["slot"]][1:]
        length = (height // patch["patch_h"]) * (width // patch["patch_w"])
    lengths = np.full(batch, length) if span.real is None else span.real
    class_token = any(geometry == "tokens1" for _, _, geometry in segment["buffers"])
    seen = (lengths + class_token).astype(np.int64)
    tokens = {"tokens": int(lengths.sum()), "tokens1": int(seen.sum()), "first": batch}
    return Sizes(tokens, int((seen**2).sum()), int((seen * (seen + 1) // 2).sum()), batch * (length + class_token))


def multiply_adds(step: Step, segment: Json, arrays: Arrays, at: Sizes) -> int:
    """Products that a run of the step computes: those of blocks that are not zero, of tokens that are not padding."""
    if step.kind == "linear":
        return int(arrays[step.facts["weight"]["values"]["array"]].size) * at.tokens[step.geometry]
    if step.kind == "linear_float":
        return int(arrays[step.facts["weight"]["array"]].size) * at.tokens[step.geometry]
    if step.kind.startswith("attention"):
        rows = int(segment["buffers"][step.facts["q"]][0])
        return 2 * rows * (at.causal_pairs if step.facts["causal"] else at.pairs)
    return 0


def moved_bytes(step: Step, segment: Json, arrays: Arrays, at: Sizes) -> int:
    """Bytes that a run of the step reads and writes if each is touched once: activations, weights, rows of tables."""
    facts, buffers = step.facts, segment["buffers"]
    reads = [*READS, *(["q"] if step.kind.startswith("attention") else [])]
    writes = ["y", *(["q"] if step.kind == "layer_norm" else [])]
    total = 0
    for key in (*reads, *writes):
        if facts.get(key, -1) >= 0:
            rows, layout, geometry = buffers[facts[key]]
            total += rows * (4 if layout == "f32" else 1) * at.tokens[geometry]
    if step.kind in ("enter", "leave", "patches"):  # their other side is an array of the caller's
        rows, _, geometry = buffers[facts["y"] if step.kind != "leave" else facts["x"]]
        total += rows * 4 * (at.padded if geometry != "first" and step.kind == "leave" else at.tokens[geometry])
    for key, value in facts.items():
        for name in _references(value):
            array = arrays[name]
            each = array.nbytes // max(1, len(array)) * at.tokens[step.geometry]
            total += min(each, array.nbytes) if key in TABLES else array.nbytes
    return total


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if set(value) == {"array"}:
            yield value["array"]
        else:
            for item in value.values():
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
