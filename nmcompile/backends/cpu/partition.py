"""Cut a graph into native segments and onnxruntime segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_graphsurgeon as gs

from nmcompile.backends.cpu.match import Matcher
from nmcompile.backends.cpu.ops import AnyAttention, Attention, Embed, First, Op, PatchEmbed
from nmcompile.backends.cpu.padding import Reading, reads_padding
from nmcompile.derive import Derivation
from nmcompile.guards import Guard

# A native segment pays for moving its activations into the engine's layout from this many layers on.
MIN_LAYERS = 2


@dataclass
class Segment:
    """Operations of the engine, or nodes for onnxruntime; `inputs` and `outputs` are tensor names."""

    native: bool
    ops: list[Op] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    mask: str | None = None


Item: TypeAlias = "Op | gs.Node"


@dataclass(frozen=True)
class Partition:
    segments: tuple[Segment, ...]  # in the order in which they run
    reasons: tuple[str, ...]  # why nodes fell to onnxruntime
    guards: tuple[Guard, ...] = ()  # what the native segments assume of the inputs


def partition(graph: gs.Graph) -> Partition:
    """Segments in an order in which each finds its inputs ready; the graph has shapes.

    Every item gets a level: that of its latest producer, one more where the stream changes or onnxruntime takes over.
    Items of one level and stream are one segment, so segments cannot wait for each other in a circle. Native segments
    that would not pay, or whose attentions disagree about the mask, give operations back to onnxruntime until all of
    them hold.
    """
    matcher = Matcher(graph)
    reasons = dict(matcher.reasons)
    banned: set[str] = set()
    while True:
        ops = [op for op in matcher.ops if op.y not in banned]
        segments = _segments(graph, ops)
        refused = [(op, why) for segment in segments if segment.native for op, why in _refuse(segment)]
        if not refused:
            refused = [pair for segment in segments for pair in _leaks(graph, matcher.derived, segment, segments)]
        if not refused:
            break
        for op, why in refused:
            banned.add(op.y)
            reasons.setdefault(op.name, why)
    outside = {node.name for segment in segments if not segment.native for node in segment.nodes}
    told = tuple(f"{name}: runs on onnxruntime, {why}" for name, why in reasons.items() if name in outside)
    guards = {guard for segment in segments for guard in _guards(graph, matcher.derived, segment, segments)}
    return Partition(tuple(segments), told, tuple(sorted(guards)))


def _segments(graph: gs.Graph, ops: Sequence[Op]) -> list[Segment]:
    # A node inside an operation is an item of its own only where something else reads what it makes.
    made_by: dict[str, Item] = {y.name: node for node in graph.nodes for y in node.outputs}
    made_by.update({op.y: op for op in ops})
    needed = _needed(graph, made_by)
    order = _order(graph, ops, needed)
    level: dict[int, int] = {}
    groups: dict[tuple[int, str], Segment] = {}
    for item in order:
        stream = _stream(item)
        depth = 0
        for name in _reads(item):
            before = made_by.get(name)
            if before is not None:
                depth = max(depth, level[id(before)] + (_stream(before) != stream))
        level[id(item)] = depth
        segment = groups.setdefault((depth, stream), Segment(native=isinstance(item, Op)))
        if isinstance(item, Op):
            segment.ops.append(item)
        else:
            segment.nodes.append(item)
    segments = [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1]))]
    _connect(graph, segments)
    return segments


def _stream(item: Item) -> str:
    """Items may share a segment where this is equal: operations over one stream's tokens, or nodes for onnxruntime."""
    return item.space.stream.key if isinstance(item, Op) else ""


def _reads(item: Item) -> list[str]:
    return [*_values(item), *item.takes] if isinstance(item, Op) else node_reads(item)


def _values(op: Op) -> list[str]:
    """The token tensors that it reads."""
    return [read.tensor for read in op.reads]


def node_reads(node: gs.Node) -> list[str]:
    """Names of the computed tensors a node reads, those captured by its sub-graphs among them."""
    names = [x.name for x in node.inputs if x.name and not isinstance(x, gs.Constant)]
    for sub in node.subgraphs(recursive=True):
        made = {y.name for inner in sub.nodes for y in inner.outputs} | {t.name for t in sub.inputs}
        read = [x for inner in sub.nodes for x in inner.inputs] + list(sub.outputs)
        names += [x.name for x in read if x.name and x.name not in made and not isinstance(x, gs.Constant)]
    return list(dict.fromkeys(names))


def _needed(graph: gs.Graph, made_by: dict[str, Item]) -> set[int]:
    """Items that the graph's outputs depend on; what only fed matched nodes is gone."""
    seen: set[int] = set()
    names = [t.name for t in graph.outputs]
    while names:
        item = made_by.get(names.pop())
        if item is not None and id(item) not in seen:
            seen.add(id(item))
            names += _reads(item)
    return seen


def _order(graph: gs.Graph, ops: Sequence[Op], needed: set[int]) -> list[Item]:
    """Needed items, producers first: an operation stands where the last of its nodes stood."""
    at = {id(node): i for i, node in enumerate(graph.nodes)}
    items: list[tuple[int, Item]] = [(max(at[id(n)] for n in op.nodes), op) for op in ops if id(op) in needed]
    items += [(at[id(n)], n) for n in graph.nodes if id(n) in needed]
    return [item for _, item in sorted(items, key=lambda pair: pair[0])]


def _connect(graph: gs.Graph, segments: list[Segment]) -> None:
    """Fill in what each segment takes and gives."""
    outputs = [t.name for t in graph.outputs]
    made = [{op.y for op in s.ops} | {y.name for node in s.nodes for y in node.outputs if y.name} for s in segments]
    for index, segment in enumerate(segments):
        read = [name for item in [*segment.ops, *segment.nodes] for name in _reads(item)]
        segment.inputs = [name for name in dict.fromkeys(read) if name not in made[index]]
        masks = [op.mask for op in segment.ops if isinstance(op, AnyAttention) and op.mask is not None]
        segment.mask = Counter(masks).most_common(1)[0][0] if masks else None
        if segment.native:
            segment.inputs = [name for name in segment.inputs if name not in masks or _read_as_value(segment, name)]
    for index, segment in enumerate(segments):
        later = {name for other in segments for name in other.inputs if other is not segment} | set(outputs)
        ordered = [op.y for op in segment.ops] + [y.name for node in segment.nodes for y in node.outputs]
        segment.outputs = [name for name in ordered if name in later and name in made[index]]


def _read_as_value(segment: Segment, name: str) -> bool:
    return any(name in (_values(op) if isinstance(op, AnyAttention) else _reads(op)) for op in segment.ops)


def _refuse(segment: Segment) -> list[tuple[Op, str]]:
    """Operations that this native segment cannot or should not keep, with the reason."""
    if sum(op.pays for op in segment.ops) < MIN_LAYERS:
        return [(op, "too little around it runs natively to pay for the way in and out") for op in segment.ops]
    refused: list[tuple[Op, str]] = []
    made = {op.y: op.space for op in segment.ops}
    for op in segment.ops:
        if isinstance(op, AnyAttention) and op.mask != segment.mask:
            refused.append((op, "its mask differs from the other attentions'"))
        if isinstance(op, Attention) and any(read.tensor not in made for read in op.reads):
            refused.append((op, "its queries, keys or values are made outside"))
        entering = [read.tensor for read in op.reads if read.tensor not in made]
        if op.space.first and not isinstance(op, First) and entering:
            refused.append((op, f"its input {entering[0]} has one vector per sequence and is made outside"))
    patched = [op for op in segment.ops if isinstance(op, PatchEmbed)]
    if patched and (segment.mask is not None or len(patched) > 1 or any(isinstance(op, Embed) for op in segment.ops)):
        refused += [(op, "patches and masks or other tokens do not mix") for op in patched]
    return refused


def _read_after(graph: gs.Graph, d: Derivation, segment: Segment, segments: Sequence[Segment]) -> Reading:
    """What comes after a segment that drops padding makes of its tokens' rows."""
    later = {name for other in segments if other is not segment for name in other.inputs}
    tensors = [name for name in segment.outputs if name in later]
    return reads_padding(graph, d, segment.mask, tensors) if segment.mask is not None and tensors else Reading()


def _leaks(
    graph: gs.Graph, d: Derivation, segment: Segment, segments: Sequence[Segment]
) -> list[tuple[Op, str]]:
    """The attentions of a segment that drops padding, when what comes after it would miss that padding."""
    leak = _read_after(graph, d, segment, segments).leak
    why = f"what follows may read padding, which the engine does not compute, at {leak}"
    return [(op, why) for op in segment.ops if isinstance(op, AnyAttention)] if leak else []


def _guards(graph: gs.Graph, d: Derivation, segment: Segment, segments: Sequence[Segment]) -> list[Guard]:
    """What a native segment assumes of the mask by which it drops tokens."""
    if segment.mask is None:
        return []
    assumed = {rule for op in segment.ops if isinstance(op, AnyAttention) for rule in op.assumes}
    after = _read_after(graph, d, segment, segments)
    first = after.first or any(isinstance(op, First) for op in segment.ops)
    assumed |= {"first-token"} if first else set()
    assumed |= {"some-token"} if after.keys else set()
    return [Guard(segment.mask, rule) for rule in assumed]
