"""Graphs as torch modules; needs torch (pip install 'nmcompile[train]')."""

from __future__ import annotations

from nmcompile.errors import UnsupportedError

try:
    import torch as _torch  # noqa: F401
except ImportError:
    raise UnsupportedError("training needs torch, which is not installed: pip install 'nmcompile[train]'") from None

from nmcompile.torch.module import Module

__all__ = ["Module"]
