"""ONNX operators that move, cut and copy elements, in torch; shapes and axes come as integers on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from nmcompile.torch.types import tensor_of

Tensor = torch.Tensor


def ints(values: Tensor | Sequence[int]) -> list[int]:
    """Of a tensor of one axis."""
    return [int(value) for value in (values.reshape(-1).tolist() if isinstance(values, Tensor) else values)]


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0, **_: Any) -> Tensor:
    sizes = ints(shape)
    if not allowzero:
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(x: Tensor, *, axis: int = 1, **_: Any) -> Tensor:
    at = axis if axis >= 0 else x.ndim + axis
    first = 1
    for size in x.shape[:at]:
        first *= size
    return x.reshape(first, -1)


def _transpose(x: Tensor, *, perm: Sequence[int] = (), **_: Any) -> Tensor:
    return x.permute(*(perm or range(x.ndim - 1, -1, -1)))


def _squeeze(x: Tensor, axes: Tensor | None = None, **attributes: Any) -> Tensor:
    given = ints(axes) if axes is not None else list(attributes.get("axes", ()))
    return x.squeeze(tuple(given)) if given else x.squeeze()


def _unsqueeze(x: Tensor, axes: Tensor | None = None, **attributes: Any) -> Tensor:
    given = ints(axes) if axes is not None else list(attributes["axes"])
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _shape(x: Tensor, *, start: int = 0, end: int | None = None, **_: Any) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0, **_: Any) -> Tensor:
    axis = axis % x.ndim
    size = x.shape[axis]
    flat = indices.to(x.device, torch.int64)
    flat = torch.where(flat < 0, flat + size, flat)
    if axis == 0 and x.ndim == 2 and x.dtype.is_floating_point:
        return F.embedding(flat, x)
    if flat.ndim == 0:
        return x.index_select(axis, flat.reshape(1)).squeeze(axis)
    found = x.index_select(axis, flat.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0, **_: Any) -> Tensor:
    at = indices.to(x.device, torch.int64)
    return torch.gather(x, axis, torch.where(at < 0, at + x.shape[axis], at))


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0, **_: Any) -> Tensor:
    at = indices.to(x.device, torch.int64)
    places = [index.squeeze(-1) for index in at.split(1, dim=-1)]
    for axis in range(batch_dims):
        rows = torch.arange(x.shape[axis], device=x.device)
        places.insert(axis, rows.reshape([-1 if i == axis else 1 for i in range(at.ndim - 1)]))
    places = [torch.where(place < 0, place + x.shape[axis], place) for axis, place in enumerate(places)]
    return x[tuple(places)]


def _scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str | bytes = "none", **_: Any) -> Tensor:
    kind = reduction.decode() if isinstance(reduction, bytes) else reduction
    if kind not in ("none", "add"):
        raise ValueError(f"reduction {kind}")
    places = tuple(index.squeeze(-1) for index in indices.to(x.device, torch.int64).split(1, dim=-1))
    return x.index_put(places, updates.to(x.dtype), accumulate=kind == "add")


def _slice(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None, **_: Any
) -> Tensor:
    first, last = ints(starts), ints(ends)
    for i, axis in enumerate(range(len(first)) if axes is None else ints(axes)):
        step, size = 1 if steps is None else ints(steps)[i], x.shape[axis]
        places = range(size)[slice(first[i], None if step < 0 and last[i] < -size else last[i], step)]
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(places.start, max(places.stop, places.start), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _split(
    x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, **attributes: Any
) -> tuple[Tensor, ...]:
    total = x.shape[axis]
    if sizes is not None:
        return torch.split(x, ints(sizes), axis)
    if "split" in attributes:
        return torch.split(x, list(attributes["split"]), axis)
    parts = num_outputs or int(attributes["outputs"])
    size = -(-total // parts)
    return torch.split(x, [min(size, total - size * i) for i in range(parts)], axis)


def _concat(*parts: Tensor, axis: int, **_: Any) -> Tensor:
    return torch.cat(parts, axis)


def _expand(x: Tensor, shape: Tensor, **_: Any) -> Tensor:
    sizes = torch.broadcast_shapes(x.shape, ints(shape))
    return x.expand(sizes)


def _tile(x: Tensor, repeats: Tensor, **_: Any) -> Tensor:
    return x.repeat(ints(repeats))


def _range(start: Tensor, limit: Tensor, delta: Tensor, **_: Any) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant_of_shape(shape: Tensor, *, value: Any = None, **_: Any) -> Tensor:
    if value is None:
        return torch.zeros(ints(shape))
    filling = tensor_of(getattr(value, "values", value)).reshape(())
    return torch.full(ints(shape), filling.item(), dtype=filling.dtype)


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1, **_: Any) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str | bytes = "constant",
    **_: Any,
) -> Tensor:  # fmt: skip
    kind = mode.decode() if isinstance(mode, bytes) else mode
    if kind != "constant":
        raise ValueError(f"mode {kind}")
    ends, places = ints(pads), list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in ints(axes)]
    each = {axis: (ends[i], ends[len(places) + i]) for i, axis in enumerate(places)}
    flat = [end for axis in range(x.ndim - 1, -1, -1) for end in each.get(axis, (0, 0))]
    return F.pad(x, flat, value=0.0 if value is None else value.item())


MOVEMENT: Mapping[str, Callable[..., Any]] = {
    "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Shape": _shape, "Size": lambda x, **_: torch.tensor(x.numel(), dtype=torch.int64), "Gather": _gather,
    "GatherElements": _gather_elements, "GatherND": _gather_nd, "ScatterND": _scatter_nd, "Slice": _slice,
    "Split": _split, "Concat": _concat, "Expand": _expand, "Tile": _tile, "Range": _range,
    "ConstantOfShape": _constant_of_shape, "Trilu": _trilu, "Pad": _pad,
}  # fmt: skip
