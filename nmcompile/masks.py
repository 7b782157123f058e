"""Masks of attention: which keys a query sees, derived from the sub-graph that computes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile.derive import Derivation, Underived
from nmcompile.derive.value import aligned
from nmcompile.roles import HIDDEN
from nmcompile.symbolic import (
    ONE,
    ZERO,
    AtLeast,
    Atom,
    Element,
    Index,
    Infinity,
    IsZero,
    Poly,
    Running,
    at_least_zero,
    is_zero,
    mentioned,
    never_negative,
    poly,
    substitute,
)

LOWEST = float(np.finfo(np.float32).min)  # added to a score: its key is never seen
ABSORBS = -1e30  # added to a score, nothing is left of it
MAX_CONDITIONS = 6


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: where `padding` [batch, keys] says so, and none after it if `causal`.

    test: at which values of padding a key is seen: "nonzero", "one" (others hide it), "positive", or "linear", which is
    seen at 1 and hidden at 0 by (1 - padding) * lowest; "count": as many keys as the padding has ones, from the first.
    lowest: what is added to hidden scores. triangle: what the causal triangle adds by itself, where it is not one
    condition with the padding.
    """

    padding: gs.Tensor | None = None
    causal: bool = False
    test: str = "nonzero"
    lowest: float = LOWEST
    triangle: float | None = None

    def __str__(self) -> str:
        words = [f"padding by {self.padding.name}"] if self.padding is not None else []
        return " and ".join(words + ["causal"] * self.causal) or "none"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal masks."""
        name = self.padding.name if self.padding is not None else ""
        return (name, self.causal, self.test, self.lowest, self.triangle)

    @property
    def assumes(self) -> tuple[str, ...]:
        """What must hold of the padding for a key to be seen wherever it is not 0: rules of nmcompile.guards."""
        return () if self.padding is None else {"nonzero": (), "count": ("prefix",)}.get(self.test, ("binary",))

    def shows(self, values: np.ndarray) -> np.ndarray:
        """Which keys are seen by the padding's values [batch, keys]: bool, the same shape."""
        if self.test == "count":
            return np.asarray(np.arange(values.shape[1]) < (values == 1).sum(axis=1, keepdims=True))
        return np.asarray({"nonzero": values != 0, "positive": values > 0}.get(self.test, values == 1))

    @property
    def plain(self) -> Mask:
        """The same for a padding of 0 and 1, as one condition that hides by the lowest float."""
        return Mask(self.padding, self.causal)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a score: factor * product + added + endless * infinity."""

    factor: float
    added: float
    endless: float

    @property
    def hidden(self) -> bool:
        return self.endless < 0 or (self.endless == 0 and self.added <= HIDDEN)

    @property
    def seen(self) -> bool:
        return self.endless == 0 and self.added == 0 and self.factor != 0

    def like(self, other: Outcome) -> bool:
        """Whether both give the same number in float32."""
        if self.endless or other.endless:
            return self.endless < 0 and other.endless < 0
        if self.added <= ABSORBS and other.added <= ABSORBS:
            return self.added == other.added
        return self == other


Case = Mapping[Atom, int]  # conditions on places, each with its truth


@dataclass(frozen=True)
class _Table:
    """Every outcome of the scores: by which conditions on places hold, and by the value of the padding there."""

    outcomes: Mapping[tuple[int, float], Outcome]
    cases: tuple[Case, ...]
    values: tuple[float, ...]


def read_scores(d: Derivation, scores: gs.Tensor, product: str) -> tuple[float, Mask]:
    """(factor of the product where a key is seen, the mask) of scores [batch, heads, queries, keys].

    product: the tensor q k^T that they are computed from. Underived says what stands in the way.
    """
    shape = d.shape(scores)
    if shape is None or len(shape) != 4:
        raise Underived(f"its scores are of no known shape ({d.why.get(scores.name, 'they have not four dimensions')})")
    place = _places(shape)
    return _read(d, d.element(scores, place), Element(product, place, "f"), shape)


def match_bias(d: Derivation, bias: gs.Tensor, shape: Sequence[Poly]) -> Mask | None:
    """The mask that an additive bias is for scores of a shape [batch, heads, queries, keys]; None for any other."""
    score = Element("", _places(shape), "f")
    own = d.shape(bias)
    if own is None or len(own) > 4 or any(a not in (ONE, b) for a, b in zip(own[::-1], shape[::-1], strict=False)):
        return None  # of other tokens than the scores
    try:
        return _read(d, poly(score) + aligned(d.value(bias), score.index), score, shape)[1]
    except Underived:
        return None


def _places(shape: Sequence[Poly]) -> tuple[Poly, ...]:
    return tuple(ZERO if size == ONE else poly(Index(name, size)) for name, size in zip("bhqk", shape, strict=True))


def _read(d: Derivation, value: Poly, score: Element, shape: Sequence[Poly]) -> tuple[float, Mask]:
    value, counted = _counted(value, score.index, shape[3])
    padding = _padding(d, value, score, shape)
    table = _table(value, score, padding)
    source = None if padding is None else d.inputs[padding.tensor]
    mask = _explained(table, padding, source, score.index, shape)
    if counted and mask.test != "nonzero":
        raise Underived(f"its mask is computed from a count, {padding}")
    return _factor(table), replace(mask, test="count") if counted else mask


def _counted(value: Poly, place: Sequence[Poly], keys: Poly) -> tuple[Poly, bool]:
    """With [k < number of ones in a row of an input] as an element of that row by itself, and whether there was any."""
    known: dict[Atom, Poly] = {}
    for atom in mentioned(value):
        if not isinstance(atom, AtLeast):
            continue
        total = next((item for item in atom.value.atoms if isinstance(item, Running)), None)
        if total is None or total.over.extent != keys or total.last != keys - 1:
            continue
        seen = atom.value == poly(total) - place[3] - 1
        if not seen and atom.value != place[3] - poly(total):
            continue
        for one in mentioned(total.term):
            here = (place[0], poly(total.over))
            if isinstance(one, Element) and one.index == here and total.term == is_zero(poly(one) - 1):
                shown = poly(Element(one.tensor, (place[0], place[3]), "b"))
                known[atom] = shown if seen else ONE - shown
    return substitute(value, known), bool(known)


def _padding(d: Derivation, value: Poly, score: Element, shape: Sequence[Poly]) -> Element | None:
    """The one element of an input that the mask is computed from."""
    place, atoms = score.index, mentioned(value)
    if score not in atoms:
        raise Underived("its scores are not a factor times the product of queries and keys")
    others = [atom for atom in atoms if isinstance(atom, Element) and atom != score]
    for atom in sorted(others, key=lambda item: (item.tensor in d.inputs, str(item))):
        if atom.tensor not in d.inputs:
            raise Underived(f"a bias other than a mask is added to its scores, by {d.stopped(atom.tensor)}")
        if atom.kind == "f" and place[2] in atom.index:
            raise Underived(f"a bias other than a mask is added to its scores, {atom}")
    strange = [atom for atom in atoms if not isinstance(atom, (Element, Index, AtLeast, IsZero, Infinity))]
    sizes = [atom for atom in strange if type(atom).__name__ != "Size"]
    if sizes:
        raise Underived(f"its mask is computed from {sizes[0]}")
    if len(others) > 1:
        raise Underived(f"its mask is computed from {' and '.join(sorted(map(str, others)))}")
    if not others:
        return None
    # all of the input, or one row for every sequence; not its first row, nor its first columns
    rows = {(place[0], place[3]): (shape[0], shape[3]), (ZERO, place[3]): (ONE, shape[3])}
    if others[0].index not in rows or d.shape(d.inputs[others[0].tensor]) not in (
            rows[others[0].index], *[(ONE, shape[3])] * (shape[0] == ONE)):  # fmt: skip
        raise Underived(f"its mask is read as {others[0]}, and not as padding over [batch, keys]")
    return others[0]


def _table(value: Poly, score: Element, padding: Element | None) -> _Table:
    scaled = any({score, padding} <= dict(term).keys() for term in value.terms)
    if scaled and padding is not None and padding.kind != "b":
        raise Underived(f"its scores are scaled by {padding}")
    values = _values(value, padding)
    by_value = {v: value if padding is None else substitute(value, {padding: poly(v)}) for v in values}
    found = {atom for item in by_value.values() for atom in mentioned(item) if isinstance(atom, (AtLeast, IsZero))}
    places: list[Atom] = sorted(found, key=str)
    if len(places) > MAX_CONDITIONS:
        raise Underived(f"its mask has {len(places)} conditions")
    cases = tuple(case for bits in itertools.product((0, 1), repeat=len(places))
                  if _possible(case := dict(zip(places, bits, strict=True))))  # fmt: skip
    outcomes = {}
    for number, case in enumerate(cases):
        known = {atom: poly(bit) for atom, bit in case.items()}
        for v, item in by_value.items():
            outcomes[number, v] = _outcome(substitute(item, known), score)
    return _Table(outcomes, cases, values)


def _values(value: Poly, padding: Element | None) -> tuple[float, ...]:
    """Values of the padding that stand for all others: 0, 1, and around each number it is compared with."""
    if padding is None:
        return (1,)
    if padding.kind == "b":
        return (0, 1)
    found: set[float] = {0, 1, 2, -1, 1 << 40, -(1 << 40)}
    for atom in mentioned(value):
        if isinstance(atom, (AtLeast, IsZero)) and padding in mentioned(atom.value):
            slope = substitute(atom.value, {padding: ONE}) - substitute(atom.value, {padding: ZERO})
            rest = substitute(atom.value, {padding: ZERO})
            if slope.number is None or rest.number is None or atom.value != rest + poly(padding) * slope:
                raise Underived(f"its mask is computed by {atom}")
            root = -float(rest.number) / float(slope.number)
            found |= {root - 1, root, root + 1} if root == int(root) else {int(root) - 1, int(root), int(root) + 1}
            if padding.kind == "f":
                found |= {root - 0.25, root + 0.25}
    whole = padding.kind == "i"
    return tuple(sorted({int(item) if whole else float(item) for item in found}))


def _possible(case: Case) -> bool:
    """Whether these conditions can hold and fail together."""
    signed = [atom.value if bit else -atom.value - 1 for atom, bit in case.items()
              if isinstance(atom, AtLeast) and atom.value.whole]  # fmt: skip
    return not any(never_negative(-(a + b) - 1) for a, b in itertools.combinations(signed, 2))


def _outcome(value: Poly, score: Element) -> Outcome:
    factor = added = endless = 0.0
    for monomial, number in value.terms.items():
        if not monomial:
            added = float(number)
        elif monomial == frozenset({(score, 1)}):
            factor = float(number)
        elif monomial == frozenset({(Infinity(), 1)}):
            endless = float(number)
        else:
            others = [str(atom) for atom, _ in monomial if atom != score]
            what = "scaled by" if score in dict(monomial) else "biased by"
            raise Underived(f"its scores are {what} {', '.join(sorted(others)) or 'their square'}")
    return Outcome(factor, added, endless)


def _factor(table: _Table) -> float:
    """Of the product where the padding is 0 or 1 and a key is seen."""
    seen = [outcome for (_, v), outcome in table.outcomes.items() if v in (0, 1) and not outcome.hidden]
    if not seen:
        raise Underived("every key is masked")
    biased = [outcome for outcome in seen if not outcome.seen]
    if biased:
        raise Underived(f"a bias of {biased[0].added:g} other than a mask is added to its scores")
    factors = [outcome.factor for outcome in seen]
    if max(factors) - min(factors) > 1e-6 * abs(max(factors)):
        raise Underived("its scale differs between keys")
    return factors[0]


def _explained(
    table: _Table, padding: Element | None, source: gs.Tensor | None, place: Sequence[Poly], shape: Sequence[Poly]
) -> Mask:
    """The mask that hides exactly these keys; the one that adds the same numbers, if there is one."""
    below = at_least_zero(place[2] - place[3])
    conditions = set().union(*table.cases) if table.cases else set()
    triangle = {atom for atom in mentioned(below) if isinstance(atom, AtLeast)} & conditions
    square = shape[2] == shape[3]
    tests = ("nonzero",) if source is None else ("nonzero", "one", "positive", "linear")
    for causal, test in itertools.product((False, True), tests):
        if causal and not (triangle and square):
            continue
        if all(_fits(outcome, _seen(table.cases[number], v, below if causal else ONE, test, source is not None))
               for (number, v), outcome in table.outcomes.items() if test != "linear" or v in (0, 1)):  # fmt: skip
            return _exact(table, Mask(source, causal, test), below)
    raise Underived(_described(table, conditions, padding))


def _fits(outcome: Outcome, seen: bool) -> bool:
    return outcome.seen if seen else outcome.hidden


def _seen(case: Case, v: float, below: Poly, test: str, padded: bool) -> bool:
    passes = not padded or {"nonzero": v != 0, "one": v == 1, "positive": v > 0, "linear": v == 1}[test]
    return passes and _truth(case, below)


def _truth(case: Case, condition: Poly) -> bool:
    value = substitute(condition, {atom: poly(bit) for atom, bit in case.items()})
    return bool(value.number)


def _exact(table: _Table, mask: Mask, below: Poly) -> Mask:
    """The mask with the numbers that it adds where it hides. Underived where it is no sum that we build."""
    factor = _factor(table)
    added = {float("-inf") if o.endless else o.added for o in table.outcomes.values() if o.hidden}
    numbers = sorted({number for number in added if number <= HIDDEN} | {LOWEST}, key=lambda n: (n != LOWEST, n))
    # two sums of the lowest float, which cancel each other for a padding of 2, do so in their own order
    apart = mask.causal and mask.test == "linear"
    lowest = [n for n in numbers if mask.test != "linear" or n != float("-inf")]  # 0 times infinity is no number
    choices = [Mask(mask.padding, mask.causal, mask.test, number) for number in lowest]
    if mask.causal and mask.padding is not None:
        choices += [Mask(mask.padding, True, mask.test, a, b) for a in lowest for b in numbers]
    for choice in choices:
        made = ((_adds(choice, table.cases[number], v, below, factor), outcome)
                for (number, v), outcome in table.outcomes.items()
                if v in (0, 1) or not apart or _truth(table.cases[number], below))  # fmt: skip
        if all(new.like(old) or (len(added) == 1 and _replaced(old) and new.added <= ABSORBS) for new, old in made):
            return choice
    raise Underived(f"its mask ({mask}) adds {', '.join(f'{n:g}' for n in sorted(added))} in turn")


def _replaced(outcome: Outcome) -> bool:
    """The score is replaced by a number: where all are, they are alike, as they are when nothing is left of them."""
    return outcome.hidden and outcome.factor == 0 and not outcome.endless


def _adds(mask: Mask, case: Case, v: float, below: Poly, factor: float) -> Outcome:
    """What the canonical form of a mask makes of a score."""
    allowed = not mask.causal or _truth(case, below)
    passes = mask.padding is None or _seen({}, v, ONE, mask.test, True)
    if mask.triangle is None and mask.test != "linear":
        parts = [0.0 if allowed and passes else mask.lowest]
    else:
        over = mask.triangle if mask.triangle is not None else mask.lowest
        by_padding = (1 - v) * mask.lowest if mask.test == "linear" else 0.0 if passes else mask.lowest
        parts = [0.0 if allowed else over, 0.0 if mask.padding is None else by_padding]
    endless = sum(part == float("-inf") for part in parts)
    return Outcome(factor, 0.0 if endless else float(sum(parts)), -float(endless))


def _described(table: _Table, conditions: set[Atom], padding: Element | None) -> str:
    """What the mask is, for one that is neither causal nor padding."""
    words = sorted(map(str, conditions))
    if padding is not None:
        words.append(f"the values of {padding}")
    return f"its mask is neither causal nor padding: it depends on {' and '.join(words) or 'nothing'}"
