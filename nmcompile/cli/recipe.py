"""Recipes: the options of `nmcompile compile` in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import click

from nmcompile.errors import NmcompileError


def options(command: click.Command) -> dict[str, tuple[click.Option, bool]]:
    """Options of a command by long name without its dashes, and whether that name switches a flag on."""
    found: dict[str, tuple[click.Option, bool]] = {}
    for param in command.params:
        if isinstance(param, click.Option) and "--recipe" not in param.opts and param.name != "help":
            found |= {name[2:]: (param, True) for name in param.opts if name.startswith("--")}
            found |= {name[2:]: (param, False) for name in param.secondary_opts if name.startswith("--")}
    return found


def read(path: Path, command: click.Command) -> dict[str, object]:
    """The options that a recipe sets, by parameter name; paths are relative to the recipe's folder.

    NmcompileError, one line, for what is not TOML, not an option, or not of the option's type.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise NmcompileError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NmcompileError(f"the recipe {path} is not TOML: {error}") from None
    known = options(command)
    values: dict[str, object] = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise NmcompileError(f"the recipe {path} has no option {key!r}; {hint}")
        option, on = known[name]
        assert option.name is not None
        if option.name in values:
            raise NmcompileError(f"the recipe {path} sets {key!r} twice; set it once")
        values[option.name] = _value(path, key, value, option, on)
    return values


def _value(path: Path, key: str, value: object, option: click.Option, on: bool) -> object:
    if option.is_flag:
        if not isinstance(value, bool):
            raise NmcompileError(f"the recipe {path}: {key} is true or false, not {value!r}")
        return value is on
    if option.name == "passes" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if option.multiple:
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, str) for item in values):
            raise NmcompileError(f"the recipe {path}: {key} is a text in quotes or a list of them, not {value!r}")
        return tuple(values)
    number = isinstance(option.type, (click.types.FloatParamType, click.types.IntParamType))
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) if number else isinstance(value, str)
    try:
        converted = option.type.convert(value, option, None) if plain else None
    except click.BadParameter as error:
        raise NmcompileError(f"the recipe {path}: {key}: {error.message}") from None
    if converted is None or (isinstance(option.type, click.types.IntParamType) and isinstance(value, float)):
        wanted = f"a {option.type.name}" if number else "a text in quotes"
        raise NmcompileError(f"the recipe {path}: {key} is {wanted}, not {value!r}")
    if isinstance(converted, Path) and not converted.is_absolute():
        return path.parent / converted
    return converted


def as_defaults(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """The callback of --recipe: what the recipe sets stands unless the command line says otherwise."""
    if value is not None:
        ctx.default_map = {**_given(ctx.default_map), **read(value, ctx.command)}
    return value


def _given(default_map: Mapping[str, object] | None) -> Mapping[str, object]:
    return default_map or {}
