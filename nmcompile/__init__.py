"""nmcompile: prune, quantize and run exported Transformers.

>>> import nmcompile
>>> nmcompile.compile("model.onnx", "model.plan", calibration="samples.npz")      # doctest: +SKIP
>>> nmcompile.load("model.plan").run({"input_ids": ids, "attention_mask": mask})  # doctest: +SKIP

Names are imported when first used, so that a process that only runs plans loads neither onnx nor the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmcompile.backends.cpu.session import Session as Session
    from nmcompile.compiler import Result as Result
    from nmcompile.compiler import compile as compile
    from nmcompile.contract import Context as Context
    from nmcompile.contract import Pass as Pass
    from nmcompile.contract import Report as Report
    from nmcompile.errors import NmcompileError as NmcompileError
    from nmcompile.pipeline import Pipeline as Pipeline
    from nmcompile.session import load as load
    from nmcompile.tensorinfo import TensorInfo as TensorInfo
    from nmcompile.trainer import torch_module as torch_module
    from nmcompile.trainer import train as train

__version__ = "0.1.0"

_HOMES = {
    "Context": "contract",
    "compile": "compiler",
    "NmcompileError": "errors",
    "Pass": "contract",
    "Pipeline": "pipeline",
    "Report": "contract",
    "Result": "compiler",
    "Session": "backends.cpu.session",
    "TensorInfo": "tensorinfo",
    "load": "session",
    "torch_module": "trainer",
    "train": "trainer",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"nmcompile.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nmcompile' has no attribute {name!r}")
