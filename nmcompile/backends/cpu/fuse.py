"""Which operations of a native segment become part of another's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nmcompile.backends.cpu.ops import FLOAT, Affine, AnyLinear, Binary, Form, LayerNorm, Op, Unary


@dataclass(frozen=True)
class Chain:
    """A linear layer with what its epilogue takes in: an activation, a residual."""

    root: AnyLinear
    last: Op
    activation: str = "none"
    residual: str | None = None


class Fusion:
    """Who reads what in which form, and what is fused by that.

    chains: linear layers by the id of the last operation they take in. smoothed: per-channel factors that the
    normalisation before them applies, by the name of their result; ops: all others. absorbed: ids of operations that a
    chain takes in before its last.
    """

    def __init__(self, ops: Sequence[Op], outputs: Sequence[str]) -> None:
        self.users: dict[str, list[tuple[Op, Form]]] = defaultdict(list)
        for op in ops:
            for read in op.reads:
                self.users[read.tensor].append((op, read.form))
        self.leaving = frozenset(outputs)
        self.makers = {op.y: op for op in ops}
        self._position = {op.y: i for i, op in enumerate(ops)}
        self.smoothed: dict[str, Affine] = self._smoothed(ops)
        self.ops = [op for op in ops if op.y not in self.smoothed]
        self.chains = self._chains(self.ops)
        inner = {id(op) for chain in self.chains.values() for op in (chain.root, *self._between(chain))}
        self.absorbed = inner - set(self.chains)

    def forms(self, name: str) -> set[Form]:
        """The forms in which a value is wanted; float where it leaves the segment."""
        forms = {form for _, form in self.users[name]}
        return forms | {FLOAT} if name in self.leaving or not forms else forms

    def _chains(self, ops: Sequence[Op]) -> dict[int, Chain]:
        chains: dict[int, Chain] = {}
        taken: set[int] = set()
        for op in ops:
            if not isinstance(op, AnyLinear):
                continue
            last: Op = op
            activation, residual = "none", None
            user = self._only_user(last)
            if isinstance(user, Unary):
                last, activation = user, user.op
                user = self._only_user(last)
            if isinstance(user, Binary) and user.op == "add" and id(user) not in taken:
                names = [read.tensor for read in user.reads]
                other = names[1] if names[0] == last.y else names[0]
                if other != last.y and self._position.get(other, -1) < self._position[op.y]:
                    last, residual = user, other
                    taken.add(id(user))
            chains[id(last)] = Chain(op, last, activation, residual)
        return chains

    def _smoothed(self, ops: Sequence[Op]) -> dict[str, Affine]:
        """Per-channel factors between a normalisation and one quantized form of it; each normalisation takes one."""
        found: dict[str, Affine] = {}
        for op in ops:
            if not isinstance(op, Affine) or op.y in self.leaving:
                continue
            norm = self.makers.get(op.reads[0].tensor)
            forms = {form for _, form in self.users[op.y]}
            if not isinstance(norm, LayerNorm) or len(forms) != 1 or next(iter(forms)).layout != "u8":
                continue
            others = {form for user, form in self.users[norm.y] if user is not op}
            taken = any(item.reads[0].tensor == norm.y for item in found.values())
            if not taken and all(form == FLOAT for form in others):
                found[op.y] = op
        return found

    def _between(self, chain: Chain) -> list[Op]:
        """The activation between a chain's root and its residual."""
        user = self._only_user(chain.root)
        return [user] if isinstance(user, Unary) else []

    def _only_user(self, op: Op) -> Op | None:
        users = self.users[op.y]
        if len(users) != 1 or op.y in self.leaving or users[0][1] != FLOAT:
            return None
        return users[0][0]
