"""One spelling for passes: `block-prune(block=2x4, sparsity=0.9)` is typed, printed, quoted and stored alike.

passes  = pass, pass, ...
pass    = name | name(option=value, ...)
value   = 3 | 0.9 | true | none | word | "any text" | item|item|...          the last for tuple[str, ...]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from nmcompile.contract import Pass
from nmcompile.errors import PassError
from nmcompile.passes import BUILTIN

GROUP = "nmcompile.passes"  # the entry-point group of other packages' passes
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
PLAIN = re.compile(r'[^\s,()|="]+')
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
TUPLE = "tuple[str, ...]"


# ---- writing -----------------------------------------------------------------------------------------------


def spec(pass_: Pass) -> str:
    """The pass as text, with the options that differ from their defaults; `parse_spec` reads it back."""
    options = []
    for field in dataclasses.fields(pass_):  # type: ignore[arg-type]  # Pass itself has no fields
        value = getattr(pass_, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            options.append(f"{field.name}={_written(value)}")
    return f"{pass_.name}({', '.join(options)})" if options else pass_.name


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "|".join(_text(str(item)) for item in value) if value else "none"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    return text if PLAIN.fullmatch(text) and text.lower() != "none" else json.dumps(text, ensure_ascii=False)


# ---- reading -----------------------------------------------------------------------------------------------


def parse_spec(text: str) -> list[Pass]:
    """The passes that a spec string names. PassError, one line, names what is not known and the nearest that
    is."""
    passes: list[Pass] = []
    at = _space(text, 0)
    while at < len(text):
        match = NAME.match(text, at)
        if match is None:
            raise PassError(f"'{text[at : at + 20]}' is not the name of a pass; write for example fold-constants")
        options, at = _options(text, match.end(), match.group())
        passes.append(_build(match.group(), options))
        if at < len(text) and text[at] != ",":
            raise PassError(f"a comma is missing before '{text[at : at + 20]}'; write pass, pass(option=value), ...")
        at = _space(text, at + 1)
    return passes


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _options(text: str, at: int, name: str) -> tuple[dict[str, list[str]], int]:
    """Each option with its items, and the place after the closing bracket."""
    options: dict[str, list[str]] = {}
    at = _space(text, at)
    if at >= len(text) or text[at] != "(":
        return options, at
    at = _space(text, at + 1)
    while at < len(text) and text[at] != ")":
        match, first = NAME.match(text, at), at
        at = _space(text, match.end()) if match else at
        if match is None or at >= len(text) or text[at] != "=":
            raise PassError(f"{name}: '{text[first : first + 20]}' is not option=value")
        if match.group() in options:
            raise PassError(f"{name}: option '{match.group()}' is given twice; give it once")
        options[match.group()], at = _items(text, _space(text, at + 1), f"{name}({match.group()}=...)")
        if at < len(text) and text[at] == ",":
            at = _space(text, at + 1)
        elif at >= len(text) or text[at] != ")":
            break
    if at >= len(text) or text[at] != ")":
        raise PassError(f"{name}: the bracket is not closed; write {name}(option=value, ...)")
    return options, _space(text, at + 1)


def _items(text: str, at: int, where: str) -> tuple[list[str], int]:
    items: list[str] = []
    while True:
        quoted = QUOTED.match(text, at)
        match = quoted or PLAIN.match(text, at)
        if match is None:
            raise PassError(f"{where}: '{text[at : at + 20]}' is not a value; quote text with special characters")
        items.append(match.group())
        at = _space(text, match.end())
        if at >= len(text) or text[at] != "|":
            return items, at
        at = _space(text, at + 1)


def _build(name: str, options: Mapping[str, list[str]]) -> Pass:
    known = registry(name)
    if name not in known:
        raise PassError(f"there is no pass '{name}'{_nearest(name, known)}")
    fields = {field.name: str(field.type) for field in dataclasses.fields(known[name])}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise PassError(f"{name} has no option '{option}'{_nearest(option, fields)}")
    values = {option: _value(items, fields[option], f"{name}({option}=...)") for option, items in options.items()}
    required = [f.name for f in dataclasses.fields(known[name])  # type: ignore[arg-type]
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    for option in required:
        if option not in values:
            raise PassError(f"{name} needs the option '{option}'; write {name}({option}=...)")
    return known[name](**values)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(names)}" if names else "; it has none"


def _value(items: list[str], kind: str, where: str) -> Any:
    """The items as a value of the annotated type."""
    optional = kind.endswith("| None")
    kind = kind.removesuffix("| None").strip()
    if kind == TUPLE:
        return () if items == ["none"] else tuple(_unquoted(item, where) for item in items)
    if len(items) != 1:
        raise PassError(f"{where}: one value is wanted, not {len(items)}")
    item = items[0]
    if optional and item == "none":
        return None
    if kind == "str":
        return _unquoted(item, where)
    try:
        if kind == "bool":
            return {"true": True, "false": False}[item.lower()]
        number = {"int": int, "float": float}[kind](item)
        if math.isfinite(number):
            return number
    except (KeyError, ValueError):
        pass
    wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind)
    if wanted is None:
        raise TypeError(f"{where}: fields of type {kind} have no spelling; use str, int, float, bool or {TUPLE}")
    raise PassError(f"{where}: '{item}' is not {wanted}")


def _unquoted(item: str, where: str) -> str:
    if not item.startswith('"'):
        return item
    try:
        return str(json.loads(item))
    except json.JSONDecodeError:
        raise PassError(f"{where}: {item} is not a quoted text; escape as in JSON") from None


def registry(name: str | None = None) -> dict[str, type[Pass]]:
    """Passes by name: the built-in ones, then those that other packages register as entry points.

    With a `name` that is built in, the other packages are not imported.
    """
    found: dict[str, type[Pass]] = {item.name: item for item in BUILTIN}
    if name is not None and name in found:
        return found
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:  # code of others: anything may happen
            raise PassError(f"the passes of '{entry.value}' cannot be imported: {error}; mend or remove it") from None
        found.setdefault(loaded.name, loaded)
    return found
