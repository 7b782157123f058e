"""Module: any canonical graph as a torch module, for training here and for loops of one's own.

module = nmcompile.torch_module("model.onnx")                         # or Module(graph) of a canonical graph
outputs = module({"input_ids": ids, "attention_mask": mask})          # tensors by name
module.initializers["encoder.layer.0.attention.self.query.weight"]    # a Parameter each, by the initializer's name
module.graph()                                                        # with the weights as they are now
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch

from nmcompile import ir as g
from nmcompile.errors import GraphError
from nmcompile.torch.steps import Step, parameters, pruned, reached, steps, tied
from nmcompile.torch.types import tensor_of

Tensor = torch.Tensor
Feeds = Mapping[str, Any]
Effective = Callable[[Tensor], Tensor]


class Module(torch.nn.Module):
    """A graph in canonical form (nmcompile.stages.canonicalise) as a torch module.

    Each initializer of floats is one Parameter by its name, however often it is read; linear weights are [K inputs,
    N outputs], as in the graph. keep: tensors to be had beside the outputs. `effective[name]` may stand between a
    Parameter and what the forward pass reads of it (masks, straight-through estimators). tied: constants that are
    another one transposed, whose Parameter both read, but for those of `apart`. UnsupportedError names an operator that
    has no gradient.
    """

    def __init__(self, graph: gs.Graph, keep: Iterable[str] = (), apart: Collection[str] = ()) -> None:
        super().__init__()
        self._graph = g.copy(graph)
        self.effective: dict[str, Effective] = {}
        held = dict(parameters(self._graph))
        inner = reached(self._graph, held)
        self.tied = tied(held, apart)
        for name in self.tied:
            del held[name]
        self._keys = {name: f"p{index}" for index, name in enumerate(held)}  # torch allows no dots in names
        for name, constant in held.items():
            self.register_parameter(self._keys[name], torch.nn.Parameter(tensor_of(constant.values)))
        self.keep = tuple(dict.fromkeys(keep))
        self.outputs = tuple(tensor.name for tensor in self._graph.outputs)
        self._steps = tuple(steps(self._graph, inner, {*self.keep, *self.outputs}))
        self._sizes: dict[str, Tensor] = {}  # integers: shapes, axes, which steps read as numbers
        self._held: dict[str, str] = {}  # other constants: names of buffers, which move with the module
        self._front = self._split(inner)

    def _split(self, inner: set[int]) -> Callable[[Feeds], dict[str, np.ndarray]]:
        """What computes the front: tensors that steps read and that no parameter reaches."""
        made = {tensor.name for node in self._graph.nodes if id(node) in inner for tensor in node.outputs}
        read = dict.fromkeys([name for step in self._steps for name in step.inputs if name] + list(self.outputs))
        for node in self._graph.nodes:
            for tensor in node.inputs:
                values = g.constant(tensor)
                told = tensor.name in {**self._keys, **self._held, **self.tied}
                if values is None or tensor.name not in read or told:
                    continue
                if values.dtype.kind in "iu":
                    self._sizes[tensor.name] = tensor_of(values)
                    continue
                self._held[tensor.name] = f"c{len(self._held)}"
                self.register_buffer(self._held[tensor.name], tensor_of(values), persistent=False)
        known = {*made, *self._keys, *self._held, *self._sizes, *self.tied}
        wanted = [name for name in read if name not in known]
        return g.runner(self._graph, wanted) if wanted else lambda feeds: {}

    # ---- parameters ------------------------------------------------------------------------------------------------

    @property
    def initializers(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by the names of the initializers."""
        return {name: getattr(self, key) for name, key in self._keys.items()}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters()), torch.empty(0)).device

    def graph(self) -> gs.Graph:
        """A copy of the graph with the weights as they are now."""
        graph = g.copy(self._graph)
        now: dict[str, Tensor] = {**self.initializers}
        now |= {name: now[other].t() for name, other in self.tied.items()}
        for node in graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name in now:
                    before = np.asarray(tensor.values)
                    values = now[tensor.name].detach().float().cpu().numpy().astype(before.dtype)
                    if not np.array_equal(values, before):
                        tensor.values = values
                        g.changed(tensor, tensor)
        return graph

    # ---- running ---------------------------------------------------------------------------------------------------

    def forward(self, feeds: Feeds) -> dict[str, Tensor]:
        """Outputs, and the tensors of `keep`, by name; `feeds` are arrays or tensors by the names of the inputs."""
        values = self.start(feeds)
        self.run(self._steps, values, (*self.outputs, *self.keep))
        return {name: values[name] for name in (*self.outputs, *self.keep)}

    def start(self, feeds: Feeds) -> dict[str, Tensor]:
        """The front of the graph for some inputs, constants and weights, to be run on."""
        plain = {name: value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
                 for name, value in feeds.items()}  # fmt: skip
        values = {name: self._placed(tensor_of(value)) for name, value in self._front(plain).items()}
        return self.weights(values)

    def weights(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put constants and weights, as the forward pass reads them, beside some values."""
        values |= self._sizes
        values |= {name: getattr(self, key) for name, key in self._held.items()}
        for name, key in self._keys.items():
            weight = getattr(self, key)
            values[name] = self.effective[name](weight) if name in self.effective else weight
        values |= {name: values[other].t() for name, other in self.tied.items()}
        return values

    def part(self, outputs: Sequence[str], given: Iterable[str] = ()) -> tuple[Step, ...]:
        """The steps from what is given (with what `start` gives) to some tensors. GraphError for tensors that are not
        there."""
        made = {name for step in self._steps for name in step.outputs}
        for name in outputs:
            if name not in made:
                raise GraphError(f"tensor '{name}' is not computed by the module; name it in keep")
        return pruned(self._steps, outputs, set(given))

    def run(self, part: Sequence[Step], values: dict[str, Tensor], wanted: Sequence[str]) -> None:
        """Run some steps on values by name, in place; what no later step reads and is not wanted is let go."""
        last: dict[str, int] = {}
        for index, step in enumerate(part):
            for name in (*step.inputs, *step.outputs):
                last[name] = index
        kept = set(wanted)
        for index, step in enumerate(part):
            step.run(values)
            for name in (*step.inputs, *step.outputs):
                if last[name] == index and name not in kept and name in values:
                    del values[name]

    def _placed(self, tensor: Tensor) -> Tensor:
        """On the module's device, but for integers of sizes, which steps read as numbers."""
        return tensor if tensor.ndim < 2 and not tensor.dtype.is_floating_point else tensor.to(self.device)
