"""The stub of the native module says what the module takes: names, order, defaults and plain types."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nmcompile import _native

STUB = Path(__file__).parent.parent / "nmcompile" / "_native.pyi"
PLAIN = {"int", "float", "str", "bool", "None"}  # types that both sides spell alike


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # "" where it is not a plain one
    default: str  # as Python shows it, "" where there is none


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    result: str


def plain(annotation: str) -> str:
    """A union of plain types in alphabetical order, else nothing."""
    parts = sorted(part.strip() for part in annotation.split("|"))
    return " | ".join(parts) if set(parts) <= PLAIN else ""


def declared(tree: ast.FunctionDef, owner: str) -> Signature:
    args = tree.args
    assert not (args.posonlyargs or args.kwonlyargs or args.vararg or args.kwarg), tree.name
    defaults: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults))
    defaults += args.defaults
    parameters = [
        Parameter(
            arg.arg,
            plain(ast.unparse(arg.annotation)) if arg.annotation else "",
            "" if default is None else repr(ast.literal_eval(default)),
        )
        for arg, default in zip(args.args, defaults, strict=True)
    ]
    if owner:
        assert parameters[0].name == "self", f"{owner}.{tree.name}"
    return Signature(tuple(parameters[bool(owner) :]), plain(ast.unparse(tree.returns)) if tree.returns else "")


def stub() -> dict[str, Signature]:
    """What the stub declares, by "function" or "Class.method"; properties take nothing, attributes can be set."""
    found = {}
    for owner, tree in statements(ast.parse(STUB.read_text()).body):
        if isinstance(tree, ast.FunctionDef):
            found[f"{owner}{tree.name}"] = declared(tree, owner)
        elif isinstance(tree, ast.AnnAssign):
            found[f"{owner}{ast.unparse(tree.target)} = "] = Signature((), plain(ast.unparse(tree.annotation)))
    return found


def statements(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for tree in body:
        if isinstance(tree, ast.ClassDef):
            yield from ((f"{tree.name}.", inner) for inner in tree.body)
        else:
            yield "", tree


def reported(function: Any, method: bool) -> Signature:
    """What nanobind says: "def name(self, x: int, y: int = \\0) -> int", and the value of \\0."""
    (text, _, defaults), *others = function.__nb_signature__
    assert not others, f"{text} is overloaded"
    taken, _, result = text[text.index("(") + 1 :].rpartition(") -> ")
    parameters = []
    for part in split(taken)[bool(method) :]:
        name, _, rest = part.partition(":")
        annotation, _, default = rest.partition(" = ")
        if default:
            assert re.fullmatch(r"\\\d+", default), text
            default = repr((defaults or ())[int(default[1:])])
        parameters.append(Parameter(name.strip(), plain(annotation.strip()), default))
    return Signature(tuple(parameters), plain(result.strip()))


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def module() -> dict[str, Signature]:
    found = {}
    for name, value in vars(_native).items():
        if hasattr(value, "__nb_signature__"):
            found[name] = reported(value, method=False)
        elif isinstance(value, type):
            for key, member in vars(value).items():
                if isinstance(member, property):
                    setter = " = " if member.fset else ""
                    found[f"{name}.{key}{setter}"] = Signature((), reported(member.fget, method=True).result)
                elif hasattr(member, "__nb_signature__"):
                    found[f"{name}.{key}"] = reported(member, method=True)
    return found


def test_stub_and_module_know_the_same_names() -> None:
    assert sorted(stub()) == sorted(module())


@pytest.mark.parametrize("name", sorted(stub()))
def test_stub_and_module_take_the_same(name: str) -> None:
    assert stub()[name] == module()[name]
