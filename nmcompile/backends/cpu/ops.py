"""The vocabulary between matching and lowering: operations over token tensors, and how they read their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Space:
    """Whose tokens: the free sizes [batch, tokens] they come from; `first` when only one token of each is left."""

    batch: int | str
    tokens: int | str
    first: bool = False

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class Form:
    """How a value lies in memory: "f32", or "u8"/"keys"/"values" with its scale and zero point."""

    layout: str = "f32"
    scale: float = 1.0
    zero_point: int = 0


FLOAT = Form()


@dataclass(frozen=True)
class Read:
    tensor: str
    form: Form = FLOAT


@dataclass(frozen=True)
class Op:
    """One operation of the engine: what it reads, the tensor it makes, and the graph nodes it stands for."""

    kind: str
    reads: tuple[Read, ...]
    y: str
    rows: int
    space: Space
    nodes: tuple[gs.Node, ...]
    data: dict[str, object] = field(default_factory=dict)
    name: str = ""
