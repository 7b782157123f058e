"""nmcompile passes [NAME]"""

from __future__ import annotations

import dataclasses
import inspect
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from nmcompile.cli import terminal
from nmcompile.errors import PassError

if TYPE_CHECKING:
    from nmcompile.pipeline import Pass

HELP = """List the passes, or explain one: what it does, its options, how it is written.

\b
  nmcompile passes
  nmcompile passes block-prune
  nmcompile model.onnx -o model.plan --passes "block-prune(sparsity=0.9), ..."
"""


@click.command("passes", help=HELP, short_help="List the passes, or explain one.")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    from nmcompile.spec import registry

    known = registry()
    if name is None:
        firsts = {key: inspect.cleandoc(item.__doc__ or "").split("\n\n")[0] for key, item in known.items()}
        rows = [[key, " ".join(text.split())] for key, text in firsts.items()]
        click.echo(terminal.table(["pass", "what it does"], rows))
        click.echo("\nOptions and examples of one: nmcompile passes NAME")
        return
    name = name.replace("_", "-")
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "see nmcompile passes"
        raise PassError(f"there is no pass {name!r}; {hint}")
    click.echo(explain(name, known[name]))


def explain(name: str, kind: type[Pass]) -> str:
    """A pass's docstring, its options with types and defaults, and its spec with every option spelt out."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # Pass itself has no fields
    lines = [name, "", inspect.cleandoc(kind.__doc__ or ""), ""]
    if kind.preserves:
        lines += ["It keeps what the model computes; --verify checks that.", ""]
    if not fields:
        return "\n".join([*lines, "It has no options. Written:", f"  {name}"])
    rows = [[field.name, str(field.type), _default(field)] for field in fields]
    lines += [terminal.table(["option", "type", "default"], rows), "", "Written with its defaults, or with options:"]
    spelt = [f"{field.name}={_default(field)}" for field in fields if _default(field) not in ("none", "required")]
    return "\n".join([*lines, f"  {name}", f"  {name}({', '.join(spelt[:4])})"])


def _default(field: dataclasses.Field[object]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "none"
    if isinstance(value, tuple):
        return "|".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
