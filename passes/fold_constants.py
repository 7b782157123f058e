"""FoldConstants: compute once, at compile time, what depends on constants only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.contract import SHAPES, Context, Pass, Report
from nmcompile.errors import GraphError

# Their result is not a function of their inputs, or carries quantization that backends must see.
KEPT = {"DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
        "Bernoulli", "Dropout", "SequenceEmpty", "SequenceConstruct", "Optional"}  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes whose inputs are all constant by their value.

    Transpose(W), MatMul(x, .)  ->  MatMul(x, W')
    """

    preserves: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = (SHAPES,)
    max_bytes: int = 1 << 24  # a result larger than its inputs and than this stays a node (Expand, Tile)
    max_growth: int = 1 << 26  # bytes by which all results together may be larger than their inputs

    def run(self, graph: gs.Graph, context: Context) -> Report:
        foldable: set[int] = set()
        known: set[str] = set()
        for node in graph.nodes:
            if self._folds(node, known):
                foldable.add(id(node))
                known |= {y.name for y in node.outputs}
        users_elsewhere = {t.name for n in graph.nodes if id(n) not in foldable for t in n.inputs}
        users_elsewhere |= {t.name for sub in graph.subgraphs(recursive=True) for n in sub.nodes for t in n.inputs}
        outputs = {t.name for t in graph.outputs}
        wanted = [y for n in graph.nodes if id(n) in foldable for y in n.outputs
                  if y.name in users_elsewhere and y.name not in outputs]  # fmt: skip
        if not wanted:
            return Report()
        values, notes = _values(graph, [y.name for y in wanted])
        notes += self._drop(values, wanted)
        lineage = g.Lineage()
        sources = {y.name: lineage.of(y) for y in wanted if y.name in values}
        for y in wanted:
            if y.name not in values:
                continue
            for maker in list(y.inputs):
                place = next(index for index, made in enumerate(maker.outputs) if made is y)
                # the node may stay for another of its outputs, which must keep its place
                left = gs.Variable(g.fresh(graph, f"{y.name}/folded"), y.dtype, y.shape)
                maker.outputs[place] = left if len(maker.outputs) > 1 else gs.Variable.empty()
            g.with_source(y.to_constant(np.asarray(values[y.name])), sources[y.name])
        if values:
            g.cleanup(graph)
        return Report(changed=len(values), notes=notes)

    def _drop(self, values: dict[str, np.ndarray], wanted: list[gs.Tensor]) -> tuple[str, ...]:
        """Take back what would make the model much larger; a note for each."""
        notes, growth = [], 0
        for y in wanted:
            value = values.get(y.name)
            if value is None or not isinstance(value, np.ndarray):
                continue
            grown = value.nbytes - sum(_size(x) or 0 for node in y.inputs for x in node.inputs)
            if grown > self.max_bytes or growth + max(grown, 0) > self.max_growth:
                notes.append(f"{y.name}: not folded, its value takes {value.nbytes / 1e6:,.1f} MB")
                del values[y.name]
            else:
                growth += max(grown, 0)
        return tuple(notes)

    def _folds(self, node: gs.Node, known: set[str]) -> bool:
        if node.op in KEPT or node.domain not in (None, "", "ai.onnx") or list(node.subgraphs()):
            return False
        if not all(isinstance(x, gs.Constant) or x.name in known or x.is_empty() for x in node.inputs):
            return False
        if any(y.type not in (None, "tensor_type") for y in node.outputs if isinstance(y, gs.Variable)):
            return False
        given = sum(_size(x) or 0 for x in node.inputs)
        for y in node.outputs:
            size = _size(y)
            if size is None and node.op in ("Expand", "Tile", "ConstantOfShape", "Range", "Pad", "Resize", "EyeLike"):
                return False
            if size is not None and size > max(self.max_bytes, 2 * given):
                return False
        return bool(node.outputs)


def _values(graph: gs.Graph, names: list[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """All at once; one by one when that fails, so that a node onnxruntime refuses costs only itself."""
    try:
        return g.run(g.extract(graph, names), {}), ()
    except GraphError:
        values, notes = {}, []
        for name in names:
            try:
                values.update(g.run(g.extract(graph, [name]), {}))
            except GraphError as error:
                notes.append(f"{name}: not folded, {error}")
        return values, tuple(notes)


def _size(tensor: gs.Tensor) -> int | None:
    """Bytes of a tensor of known shape."""
    if tensor.shape is None or any(not isinstance(dim, (int, np.integer)) for dim in tensor.shape):
        return None
    try:
        item = np.dtype(tensor.dtype).itemsize
    except TypeError:
        item = 4
    return math.prod(int(dim) for dim in tensor.shape) * int(item)
