"""How a step of the engine is declared: a frozen dataclass whose fields say what they stand for.

The name of the class's method of `_native.Program` is `name`; its fields are that method's arguments, in its order,
with its defaults. A field is annotated with its role: a buffer that is read or written, an array of the plan, a slot.
Numbers and words without a role are options. From that follow the step's JSON, what a plan may say of it, and what
profiles know of it: nothing else lists steps or their fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu.streams import Counts
from nmcompile.errors import PlanError

Json: TypeAlias = dict[str, object]
Held: TypeAlias = Mapping[str, np.ndarray]  # the arrays of a plan, by name
Layout: TypeAlias = Literal["f32", "u8", "keys", "values"]
NONE = -1  # in place of a buffer that is optional


# ---- roles ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """The number of a buffer that the step reads, in one of these layouts."""

    layouts: tuple[Layout, ...] = ("f32",)


@dataclass(frozen=True)
class Writes:
    """The number of a buffer that the step writes, in one of these layouts."""

    layouts: tuple[Layout, ...] = ("f32",)


@dataclass(frozen=True)
class Takes:
    """The number of an input of the segment that the step reads, one row of float32 per token."""


@dataclass(frozen=True)
class Gives:
    """The number of an output of the segment that the step makes."""


@dataclass(frozen=True)
class Holds:
    """An array of the plan: its types and shape. A word in the shape is the rows of that buffer, None any size.

    looked_up: each token reads one row of it.
    """

    shape: tuple[str | None, ...]
    dtypes: tuple[str, ...] = ("float32",)
    looked_up: bool = False


Role: TypeAlias = Reads | Writes | Takes | Gives | Holds

Floats: TypeAlias = Annotated[int, Reads(("f32",))]  # a float buffer that is read
Made: TypeAlias = Annotated[int, Writes(("f32",))]  # a float buffer that is written


# ---- what a field may hold beside numbers and words ---------------------------------------------------------------


class Part(ABC):
    """A value of a field that is more than a number or a word, with a JSON form of its own."""

    @abstractmethod
    def to_json(self) -> object: ...

    @classmethod
    @abstractmethod
    def from_json(cls, value: object) -> Self:
        """TypeError or ValueError for what is not its JSON form."""

    def arrays(self) -> Iterator[Ref]:
        """The arrays of the plan that it stands for."""
        yield from ()


@dataclass(frozen=True)
class Ref(Part):
    """An array of the plan, by name: {"array": name} in plan.json."""

    name: str

    def to_json(self) -> Json:
        return {"array": self.name}

    @classmethod
    def from_json(cls, value: object) -> Self:
        if not isinstance(value, dict) or set(value) != {"array"} or not isinstance(value["array"], str):
            raise TypeError("is no array of the plan")
        return cls(value["array"])

    def arrays(self) -> Iterator[Ref]:
        yield self

    def of(self, held: Held) -> np.ndarray:
        """The array itself; PlanError when the plan has none of that name."""
        found = held.get(self.name)
        if found is None:
            raise PlanError(f"the plan refers to an array {self.name[:60]!r} that it does not hold; compile it again")
        return found


def maybe(ref: Ref | None, held: Held) -> np.ndarray | None:
    """An array that may be left out."""
    return None if ref is None else ref.of(held)


@dataclass(frozen=True)
class Buffer:
    """Values of some tokens: `rows` features of each, how they lie in memory, and the word for the tokens."""

    rows: int
    layout: str
    geometry: str

    def to_json(self) -> list[object]:
        return [self.rows, self.layout, self.geometry]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """TypeError for what is no [rows, layout, geometry]."""
        try:
            rows, layout, geometry = value
            return cls(integer(rows), word(layout), word(geometry))
        except (TypeError, ValueError) as error:
            raise TypeError(f"a buffer is no [rows, layout, geometry]: {error}") from None

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return self.rows * (4 if self.layout == "f32" else 1)


# ---- the step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step(ABC):
    """A step of the engine; see the top of this file for what a class of its kind declares."""

    name: ClassVar[str]
    order: ClassVar[tuple[str, ...]] = ()  # of the fields in plan.json, where it is not that of the fields
    together: ClassVar[tuple[str, ...]] = ()  # fields that plan.json has all or, where all are at their defaults, none
    multiplies_floats: ClassVar[bool] = False  # its products are of floats, and count against that peak

    @abstractmethod
    def call(self, program: _native.Program, held: Held) -> None:
        """Call the engine's method. ValueError or TypeError where the engine refuses an argument."""

    def multiply_adds(self, buffers: Sequence[Buffer], held: Held, counts: Counts) -> int:
        """Products that a run of the step computes: those of blocks that are not zero, of tokens that are real."""
        return 0

    def length(self, shape: Sequence[int]) -> int | None:
        """Tokens of each sequence in an input of this shape, where the step makes tokens of something else."""
        return None

    # ---- what follows from the declaration ----

    def to_json(self) -> Json:
        """As it stands in plan.json."""
        written = declared(type(self))
        given = {key: getattr(self, key) for key in self.order or written}
        if all(given[key] == written[key].default for key in self.together):
            given = {key: value for key, value in given.items() if key not in self.together}
        return {"step": self.name, **{key: _plain(value) for key, value in given.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Self:
        """TypeError or ValueError, one line that begins with the step's name, for what no such step is."""
        known = declared(cls)
        given: dict[str, Any] = {}
        for key, value in content.items():
            if key == "step":
                continue
            field = known.get(key)
            if field is None:
                raise TypeError(f"{cls.name}: there is no {str(key)[:60]!r}")
            try:
                given[key] = field.read(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise TypeError(f"{cls.name}: {key} {error}") from None
        if len(given) < len(known):
            missing = [key for key, field in known.items() if key not in given and field.default is MISSING]
            if missing:
                raise TypeError(f"{cls.name}: lacks {missing[0]!r}")
        return cls(**given)

    def reads(self) -> tuple[int, ...]:
        """The buffers that it reads."""
        return self._numbers(Reads)

    def writes(self) -> tuple[int, ...]:
        """The buffers that it writes."""
        return self._numbers(Writes)

    def takes(self) -> tuple[int, ...]:
        """The inputs of which it reads a row of floats per token."""
        return self._numbers(Takes)

    def gives(self) -> tuple[int, ...]:
        """The outputs that it makes."""
        return self._numbers(Gives)

    def arrays(self) -> Iterator[tuple[Ref, bool]]:
        """The arrays of the plan that it holds, and whether a token reads but a row."""
        for key, field in declared(type(self)).items():
            value = getattr(self, key)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Part):
                    yield from ((ref, isinstance(field.role, Holds) and field.role.looked_up) for ref in part.arrays())

    def buffer(self, buffers: Sequence[Buffer]) -> Buffer:
        """Of the tokens that it walks: what it writes, or what it reads where it writes nothing."""
        return buffers[(*self.writes(), *self.reads())[0]]

    def _numbers(self, role: type[Role]) -> tuple[int, ...]:
        found = (getattr(self, key) for key, field in declared(type(self)).items() if isinstance(field.role, role))
        return tuple(number for number in found if number != NONE)


@dataclass(frozen=True)
class Field:
    """A declared field: its type without role, its role, its default (MISSING where it has none), what reads it."""

    type: Any
    role: Role | None
    default: Any
    read: Callable[[object], Any]


@cache
def declared(step: type[Step]) -> Mapping[str, Field]:
    """The fields of a step in the order of the engine's arguments."""
    hints, plain = get_type_hints(step, include_extras=True), get_type_hints(step)
    found = {}
    for item in fields(step):
        role = next((note for note in get_args(hints[item.name]) if isinstance(note, Role)), None)
        found[item.name] = Field(plain[item.name], role, item.default, _reader(plain[item.name]))
    if step.order and sorted(step.order) != sorted(found):
        raise TypeError(f"{step.__name__}: its order in plan.json does not name each of its fields")
    return found


def layouts(step: type[Step], field: str) -> tuple[Layout, ...]:
    """The layouts that a buffer of the step may have, the usual one first."""
    role = declared(step)[field].role
    assert isinstance(role, Reads | Writes), f"{step.__name__}.{field} is no buffer"
    return role.layouts


def _reader(kind: Any) -> Callable[[object], Any]:
    """What makes a field's value of its JSON."""
    plain: dict[Any, Callable[[object], Any]] = {int: integer, float: _number, bool: _flag, str: word}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is tuple:
        inner = _reader(get_args(kind)[0])
        return lambda value: tuple(inner(item) for item in _list(value))
    options = [option for option in get_args(kind) if option is not NoneType]
    if len(options) == 1:
        inner = _reader(options[0])
        return lambda value: None if value is None else inner(value)
    if isinstance(kind, type) and issubclass(kind, Part):
        return kind.from_json
    raise TypeError(f"a field of type {kind} has no JSON form")


def _plain(value: object) -> object:
    """The JSON of a field's value."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_json() if isinstance(value, Part) else value


def integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError("is no integer")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError("is no number")
    return float(value)


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise TypeError("is neither true nor false")
    return value


def word(value: object) -> str:
    if type(value) is not str:
        raise TypeError("is no text")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("is no list")
    return value
