"""How large a function and a module may be; what grows beyond it is to be split."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for folder in ("nmcompile", "passes", "tools") for file in (ROOT / folder).rglob("*.py")
               if "nmcompile/passes" not in str(file))  # the same files by a link  # fmt: skip
MOST_PARAMETERS, MOST_LINES, LONGEST = 8, 60, 400
WHOLE = {"worker.py"}  # runs alone in another Python


def too_large(text: str) -> Iterator[str]:
    """Functions with too many parameters or lines; commands of click have a parameter for each option."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(item.arg not in ("self", "cls") for item in parameters)
        command = any("click" in ast.unparse(item) for item in node.decorator_list)
        lines = (node.end_lineno or 0) - node.lineno + 1
        if (count > MOST_PARAMETERS and not command) or lines > MOST_LINES:
            yield f"{node.name} has {count} parameters and {lines} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_and_modules_stay_small(file: Path) -> None:
    text = file.read_text("utf-8")
    assert list(too_large(text)) == []
    assert len(text.splitlines()) <= LONGEST or file.name in WHOLE


def test_what_is_too_large_is_found() -> None:
    parameters = ", ".join(f"p{i}" for i in range(9))
    assert list(too_large(f"def f({parameters}):\n  pass")) == ["f has 9 parameters and 2 lines"]
    assert list(too_large("def f():\n" + "  a = 1\n" * 60)) == ["f has 0 parameters and 61 lines"]
