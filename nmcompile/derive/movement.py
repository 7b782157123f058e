"""Rules of operators that move elements without changing them: reshaping, picking, joining, repeating."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs

from nmcompile.derive.elementwise import Made, Rule, given
from nmcompile.derive.value import Shape, Underived, Value, aligned, broadcast
from nmcompile.symbolic import (
    ONE,
    ZERO,
    Element,
    Index,
    Infinity,
    Poly,
    Running,
    at_least_zero,
    divided,
    floor_divided,
    least,
    mentioned,
    never_negative,
    poly,
)

FAR = 1 << 31  # an end of a Slice beyond it means: to the end


def product(sizes: Sequence[Poly]) -> Poly:
    total = ONE
    for size in sizes:
        total = total * size
    return total


def axes_of(node: gs.Node, args: Sequence[Value | None], place: int, rank: int) -> list[int] | None:
    """The axes of an attribute or of an input, counted from 0; None where none are given."""
    value = args[place] if place < len(args) else None
    raw = value.integers() if value is not None else node.attrs.get("axes")
    return None if raw is None else [int(axis) + rank * (axis < 0) for axis in raw]


# ---- one element for one ---------------------------------------------------------------------------------------


def _transpose(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    perm = [int(axis) for axis in node.attrs.get("perm", range(len(x.shape))[::-1])]
    if sorted(perm) != list(range(len(x.shape))):
        raise Underived("axes that there are not")

    def at(index: Shape) -> Poly:
        own = dict(zip(perm, index, strict=True))
        return x.element([own[axis] for axis in range(len(perm))])

    return [(tuple(x.shape[axis] for axis in perm), at)]


def _unsqueeze(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    raw = args[1].integers() if len(args) > 1 and args[1] is not None else node.attrs["axes"]
    rank = len(x.shape) + len(raw)
    new = {int(axis) + rank * (axis < 0) for axis in raw}
    if len(new) != len(raw) or not new <= set(range(rank)):
        raise Underived("axes that there are not")
    rest = iter(x.shape)
    shape = tuple(ONE if axis in new else next(rest) for axis in range(rank))
    return [(shape, lambda index: x.element([at for axis, at in enumerate(index) if axis not in new]))]


def _squeeze(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    axes = axes_of(node, args, 1, len(x.shape))
    if axes is None:
        if any(size != ONE and not never_negative(size - 2) for size in x.shape):
            raise Underived("which axes it drops depends on sizes")
        axes = [axis for axis, size in enumerate(x.shape) if size == ONE]
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]

    def at(index: Shape) -> Poly:
        own = dict(zip(kept, index, strict=True))
        return x.element([own.get(axis, ZERO) for axis in range(len(x.shape))])

    return [(tuple(x.shape[axis] for axis in kept), at)]


def _reshape(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    wanted = given(args, 1).entries()
    total = product(x.shape)
    shape: list[Poly | None] = []
    for axis, size in enumerate(wanted):
        if size.integer == 0 and not node.attrs.get("allowzero", 0):
            shape.append(x.shape[axis])
        else:
            if size.number is None and not never_negative(size - 1):
                raise Underived(f"a size {size} that may be 0, which copies one")
            shape.append(None if size.integer == -1 else size)
    if shape.count(None) == 1:
        rest = divided(total, product([size for size in shape if size is not None]))
        if rest is None:
            raise Underived(f"the size left of {total} is not known")
        shape[shape.index(None)] = rest
    return _reshaped(x, tuple(size for size in shape if size is not None))


def _reshaped(x: Value, shape: Shape) -> Made:
    groups = _groups(x.shape, shape)

    def at(index: Shape) -> Poly:
        own: list[Poly] = []
        for before, after in groups:
            flat = ZERO
            for axis in after:
                flat = flat * shape[axis] + index[axis]
            own += _spread(flat, [x.shape[axis] for axis in before])
        return x.element(own)

    return [(shape, at)]


def _spread(flat: Poly, sizes: Sequence[Poly]) -> list[Poly]:
    """The index into several axes that a place in all of them, row by row, stands for."""
    found: list[Poly] = []
    for size in reversed(sizes[1:]):
        flat, rest = floor_divided(flat, size)
        found.insert(0, rest)
    return [flat, *found] if sizes else []


def _groups(a: Shape, b: Shape) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes that hold the same elements, as short as may be."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        before, after = [i], [j]
        have, want = a[i], b[j]
        while have != want:
            if j + 1 < len(b) and divided(have, want) is not None:
                j += 1
                after.append(j)
                want = want * b[j]
            elif i + 1 < len(a) and divided(want, have) is not None:
                i += 1
                before.append(i)
                have = have * a[i]
            else:
                if have != want and (i + 1 < len(a) or j + 1 < len(b)):
                    return [(list(range(len(a))), list(range(len(b))))]
                break
        groups.append((before, after))
        i, j = i + 1, j + 1
    if i < len(a) or j < len(b):  # sizes of 1 at the end
        if not groups:
            return [(list(range(len(a))), list(range(len(b))))]
        groups[-1][0].extend(range(i, len(a)))
        groups[-1][1].extend(range(j, len(b)))
    return groups


def _flatten(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    axis = int(node.attrs.get("axis", 1))
    axis += len(x.shape) * (axis < 0)
    return _reshaped(x, (product(x.shape[:axis]), product(x.shape[axis:])))


def _expand(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    return [(broadcast(x.shape, tuple(given(args, 1).entries())), lambda index: aligned(x, index))]


def _tile(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, times = given(args, 0), given(args, 1).entries()
    shape = tuple(size * count for size, count in zip(x.shape, times, strict=True))

    def at(index: Shape) -> Poly:
        parts = zip(index, times, x.shape, strict=True)
        return x.element([place if count == ONE else floor_divided(place, size)[1] for place, count, size in parts])

    return [(shape, at)]


# ---- parts -----------------------------------------------------------------------------------------------------


def _slice(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    if len(args) < 3 and "starts" in node.attrs:
        starts, ends = ([poly(int(v)) for v in node.attrs[key]] for key in ("starts", "ends"))
        axes = [int(v) for v in node.attrs.get("axes", range(len(starts)))]
        steps = [1] * len(starts)
    else:
        starts, ends = given(args, 1).entries(), given(args, 2).entries()
        third, fourth = (args[place] if place < len(args) else None for place in (3, 4))
        axes = list(range(len(starts))) if third is None else third.integers()
        steps = [1] * len(starts) if fourth is None else fourth.integers()
    shape, first = list(x.shape), [ZERO] * len(x.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis += len(shape) * (axis < 0)
        if step != 1:
            raise Underived("a slice with steps")
        size = x.shape[axis]
        low, high = _edge(start, size), _edge(end, size)
        if not never_negative(high - low):
            raise Underived(f"a slice from {low} to {high}")
        shape[axis], first[axis] = high - low, low
    return [(tuple(shape), lambda index: x.element([at + low for at, low in zip(index, first, strict=True)]))]


def _edge(edge: Poly, size: Poly) -> Poly:
    """Where a slice begins or ends: counted from the end if negative, no further than the size."""
    constant = edge.integer
    if constant is not None and constant >= FAR - 1:
        return size
    if constant is not None and constant < 0:
        found = size + constant
        if constant <= -FAR + 1:
            return ZERO
        if not never_negative(found):
            raise Underived(f"a slice to {constant} of {size}")
        return found
    if not never_negative(edge):
        raise Underived(f"a slice to {edge}, which may be negative")
    return least(edge, size)


def _split(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    axis = int(node.attrs.get("axis", 0))
    axis += len(x.shape) * (axis < 0)
    second = args[1] if len(args) > 1 else None
    raw = second.integers() if second is not None else node.attrs.get("split")
    count = len(node.outputs)
    if raw is None:
        size = x.shape[axis].integer
        if size is None:
            raise Underived("a split into equal parts of a free size")
        each = -(-size // count)
        raw = [min(each, size - each * place) for place in range(count)]
    made: Made = []
    start = 0
    for size in map(int, raw):
        def at(index: Shape, start: int = start) -> Poly:
            return x.element([place + start if a == axis else place for a, place in enumerate(index)])

        made.append(((*x.shape[:axis], poly(size), *x.shape[axis + 1 :]), at))
        start += size
    return made


def _concat(node: gs.Node, args: Sequence[Value | None]) -> Made:
    parts = [given(args, place) for place in range(len(args))]
    rank = len(parts[0].shape)
    axis = int(node.attrs["axis"])
    axis += rank * (axis < 0)
    shape = list(parts[0].shape)
    shape[axis] = ZERO
    for part in parts:
        shape[axis] = shape[axis] + part.shape[axis]
    alike = all(part.kind == parts[0].kind for part in parts)

    def at(index: Shape) -> Poly:
        place, start = index[axis], ZERO
        found: Poly | None = None
        for part in parts:  # the last part whose start is not beyond the place
            value = None
            inside = at_least_zero(place - start)
            if inside.number != 0:
                end = at_least_zero(place - start - part.shape[axis])
                if end.number != 1:
                    value = part.element([place - start if a == axis else own for a, own in enumerate(index)])
            if value is not None:
                found = value if found is None else found + inside * (value - found)
            start = start + part.shape[axis]
        if found is None or not alike:
            raise Underived("a part of a concatenation that cannot be told")
        return found

    return [(tuple(shape), at)]


def _gather(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, picks = given(args, 0), given(args, 1)
    axis = int(node.attrs.get("axis", 0))
    axis += len(x.shape) * (axis < 0)
    rank = len(picks.shape)
    shape = (*x.shape[:axis], *picks.shape, *x.shape[axis + 1 :])

    def at(index: Shape) -> Poly:
        place = picks.element(index[axis : axis + rank])
        return picked(x, lambda at: [*index[:axis], at, *index[axis + rank :]], place, x.shape[axis])

    return [(shape, at)]


def picked(x: Value, at: Callable[[Poly], list[Poly]], place: Poly, size: Poly) -> Poly:
    """The element that a Gather picks: a place below 0 counts from the end of the axis."""
    if never_negative(place):
        return x.element(at(place))
    if place.number is not None:
        return x.element(at(place + size))
    anywhere = Index("anywhere", size)  # where it may be either, only what does not depend on it is known
    value = x.element(at(poly(anywhere)))
    if anywhere not in mentioned(value):
        return value
    if len(value.terms) == 1 and len(value.atoms) == 1 and isinstance(next(iter(value.atoms)), Element):
        return x.element(at(place))  # an element that stands for itself, picked by what may be negative
    raise Underived(f"it picks by {place}, which may be negative")


def _gather_nd(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, picks = given(args, 0), given(args, 1)
    depth = picks.shape[-1].integer
    if depth is None or node.attrs.get("batch_dims", 0):
        raise Underived("it picks by batches")
    lead = len(picks.shape) - 1

    def at(index: Shape) -> Poly:
        places = [picks.element([*index[:lead], poly(part)]) for part in range(depth)]
        if all(map(never_negative, places)):
            return x.element([*places, *index[lead:]])
        if depth != 1:
            raise Underived("it picks by what may be negative")
        return picked(x, lambda place: [place, *index[lead:]], places[0], x.shape[0])

    return [((*picks.shape[:-1], *x.shape[depth:]), at)]


def _gather_elements(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, picks = given(args, 0), given(args, 1)
    axis = int(node.attrs.get("axis", 0))
    axis += len(x.shape) * (axis < 0)

    def at(index: Shape) -> Poly:
        return picked(x, lambda place: [place if a == axis else own for a, own in enumerate(index)],
                      picks.element(index), x.shape[axis])  # fmt: skip

    return [(picks.shape, at)]


# ---- triangles and sums ----------------------------------------------------------------------------------------


def _trilu(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x = given(args, 0)
    second = args[1] if len(args) > 1 else None
    k = ZERO if second is None else second.element(() if not second.shape else (ZERO,))
    upper = bool(node.attrs.get("upper", 1))

    def at(index: Shape) -> Poly:
        offset = index[-1] - index[-2] - k  # upper keeps column - row >= k
        keep = at_least_zero(offset if upper else -offset)
        value = x.element(index)
        if any(isinstance(atom, Infinity) for atom in value.atoms) and len(value.terms) > 1:
            raise Underived("a triangle of infinities and numbers")
        return keep * value

    return [(x.shape, at)]


def _cumsum(node: gs.Node, args: Sequence[Value | None]) -> Made:
    x, (axis,) = given(args, 0), given(args, 1).integers()
    axis += len(x.shape) * (axis < 0)
    if node.attrs.get("exclusive", 0) or node.attrs.get("reverse", 0):
        raise Underived("a running sum from the end, or without its own place")

    def at(index: Shape) -> Poly:
        over = Index("#", x.shape[axis])
        term = x.element([poly(over) if a == axis else own for a, own in enumerate(index)])
        if over not in mentioned(term):
            return term * (index[axis] + 1)  # the same at every place
        return poly(Running(term, over, index[axis]))

    return [(x.shape, at)]


MOVEMENT: dict[str, Rule] = {
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Trilu": _trilu,
    "CumSum": _cumsum,
}
