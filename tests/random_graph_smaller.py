"""A graph that fails, cut down to what makes it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from random_graphs import (
    COUNTED,
    Both,
    Causal,
    Decoder,
    Either,
    Factor,
    Ids,
    Keep,
    Mask,
    Padding,
    Positions,
    Recipe,
    Segments,
    Style,
    parts,
)


def shrunk(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The smallest recipe found by leaving out or making usual one thing after the other that still `fails`."""
    while True:
        found = next((item for item in smaller(recipe) if fails(item)), None)
        if found is None:
            return recipe
        recipe = found


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with one thing less, the largest steps first."""
    found = [
        replace(recipe, decoder=None, outputs=recipe.outputs),
        replace(recipe, past=False),
        replace(recipe, masks=recipe.masks[:1]),
        replace(recipe, masks=recipe.masks[1:] or recipe.masks),
        replace(recipe, masks=tuple(None for _ in recipe.masks)),
        replace(recipe, positions=None),
        replace(recipe, types=""),
        replace(recipe, constant=None),
        replace(recipe, static=0 if recipe.constant is None else recipe.static),
        replace(recipe, ids=Ids()),
        replace(recipe, outputs=("tokens",)),
        replace(recipe, outputs=recipe.outputs[:1]),
        replace(recipe, factor=Factor()),
        replace(recipe, style=Style()),
        replace(recipe, style=Style(opset=recipe.style.opset, fused=recipe.style.fused, embed=recipe.style.embed)),
        replace(recipe, share=1),
        replace(recipe, heads=2 * recipe.share, size=16, hidden=recipe.hidden if recipe.static else 32, feed=64),
        replace(recipe, decoder=recipe.decoder and Decoder(masked=recipe.decoder.masked)),
        replace(recipe, positions=recipe.positions and Positions(recipe.positions.kind, recipe.positions.at)),
    ]
    for index, mask in enumerate(recipe.masks):
        for less in _smaller_masks(mask):
            found.append(replace(recipe, masks=(*recipe.masks[:index], less, *recipe.masks[index + 1 :])))
    for index, given in enumerate(recipe.inputs):
        found.append(replace(recipe, inputs=(*recipe.inputs[:index], *recipe.inputs[index + 1 :])))
        usual = replace(given, dtype="int64", shape="bs")
        found.append(replace(recipe, inputs=(*recipe.inputs[:index], usual, *recipe.inputs[index + 1 :])))
    found += [replace(recipe, style=replace(recipe.style, **{name: value})) for name, value in vars(Style()).items()]
    seen = {recipe}
    for item in found:
        if item not in seen and _whole(item):
            seen.add(item)
            yield item


def _smaller_masks(mask: Mask | None) -> Iterator[Mask | None]:
    if mask is None:
        return
    if isinstance(mask.keep, Both | Either):
        yield from (replace(mask, keep=side, put=_put(mask, side)) for side in (mask.keep.left, mask.keep.right))
    if mask.soft:
        yield replace(mask, keep=None)
        yield replace(mask, soft="", put="add") if mask.keep is not None else None
    yield replace(mask, early=False, spread=False)
    yield replace(mask, value=-1e4)
    if mask.put not in ("add", "soft"):
        yield replace(mask, put="add")
    yield from (replace(mask, keep=keep, put=_put(mask, keep)) for keep in _smaller_keeps(mask.keep))


def _put(mask: Mask, keep: Keep) -> str:
    return "add" if mask.put == "apart" and not isinstance(keep, Both) else mask.put


def _smaller_keeps(keep: Keep | None) -> Iterator[Keep]:
    if isinstance(keep, Both | Either):
        yield keep.left
        yield keep.right
        yield from (replace(keep, left=side) for side in _smaller_keeps(keep.left))
        yield from (replace(keep, right=side) for side in _smaller_keeps(keep.right))
    if isinstance(keep, Causal) and keep.form != "range":
        yield Causal()
    if isinstance(keep, Padding) and keep != Padding(keep.source):
        yield Padding(keep.source)


def _whole(recipe: Recipe) -> bool:
    """Everything that is read is an input, and no less than one layer is left."""
    names = {item.name for item in recipe.inputs}
    read = {part.source for part in parts(recipe) if isinstance(part, Padding | Segments)}
    read |= {part.soft for part in parts(recipe) if isinstance(part, Mask) and part.soft}
    places = recipe.positions.kind if recipe.positions is not None else ""
    read |= {"position_ids"} if places == "given" else set()
    first = next(iter(recipe.inputs), None)
    hides = first is not None and first.shape == "bs" and "mask" in first.name
    needs = places in COUNTED or bool({"masked mean", "last"} & set(recipe.outputs))
    letters = recipe.constant.shape if recipe.constant is not None else ""
    embeds = recipe.positions is not None and recipe.positions.kind in ("range", "given") and not recipe.positions.first
    if recipe.style.embed and not (embeds and recipe.ids.dtype == "int32" and recipe.style.fused):
        return False
    if recipe.style.fused == "onnx" and recipe.style.opset < 23:
        return False
    return bool(recipe.masks) and read <= names and (hides or not needs) and (recipe.static > 0 or "s" not in letters)
