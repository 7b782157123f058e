"""What the outputs of a model are, by their shapes beside its stream of tokens: so is measured what they lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.training.losses import Kind, Output


def outputs_of(graph: gs.Graph, width: int | None) -> tuple[Output, ...]:
    """The outputs of floats of a graph whose stream of tokens has `width` features (None: not known).

    [batch, tokens, width]: embeddings; [batch, width]: an embedding; [batch, tokens, other]: scores per token;
    [batch, tokens]: scores of positions; anything else: scores of classes.
    """
    sizes = {size for tensor in graph.inputs for size in (tensor.shape or ())[1:2]}
    found = []
    for tensor in graph.outputs:
        if tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iub":
            continue
        shape = list(tensor.shape or ())
        found.append(Output(tensor.name, _kind(shape, width, sizes)))
    return tuple(found)


def width_of(graph: gs.Graph, layers: Sequence[str]) -> int | None:
    """Features of the stream of tokens: of what the first of some layers reads."""
    return next((layer.shape[1] for layer in g.linear_layers(graph) if layer.name in layers), None)


def _kind(shape: Sequence[object], width: int | None, token_sizes: set[object]) -> Kind:
    if len(shape) == 3:
        return "embeddings" if shape[-1] == width else "tokens"
    if len(shape) == 2 and shape[-1] == width:
        return "embedding"
    if len(shape) == 2 and isinstance(shape[-1], str) and shape[-1] in token_sizes:
        return "spans"
    return "logits"
