"""What the README shows of the pass API runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from compiled import MODELS

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_pass_of_the_readme_runs() -> None:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    block = next(text for text in blocks if "class DropIdentity" in text)
    scope: dict[str, object] = {"__name__": "readme"}
    exec(block.replace("model.onnx", str(MODELS / "bert-torchscript.onnx")), scope)
    assert scope["changed"] is not None and len(scope["reports"]) == 1  # type: ignore[arg-type]
