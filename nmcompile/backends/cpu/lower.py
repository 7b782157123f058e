"""Lower a Q/DQ graph to a CPU plan: native segments as steps over buffers, the rest as onnxruntime segments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import _native
from nmcompile import ir as g
from nmcompile.backends.cpu import budget
from nmcompile.backends.cpu.emit import emit
from nmcompile.backends.cpu.emit_linear import LayerFacts
from nmcompile.backends.cpu.partition import Segment, partition
from nmcompile.backends.cpu.steps import Json
from nmcompile.backends.cpu.tuning import Choose, by_cost_model
from nmcompile.plan import DTYPES


@dataclass
class Lowered:
    """What goes into the plan file, and what the report says about it."""

    header: Json
    arrays: dict[str, np.ndarray]
    blobs: dict[str, bytes]
    segments: tuple[Json, ...]  # each without its steps, buffers and weights
    layers: tuple[Json, ...]
    notes: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """One native segment and nothing else."""
        return [segment["kind"] for segment in self.segments] == ["native"]


def lower(graph: gs.Graph, choose: Choose = by_cost_model) -> Lowered:
    """Segments, arrays and blobs for a sorted Q/DQ graph with inferred shapes; `choose` picks each layer's kernel."""
    parts = partition(graph)
    arrays: dict[str, np.ndarray] = {}
    blobs: dict[str, bytes] = {}
    segments: list[Json] = []
    layers: list[LayerFacts] = []
    engines: list[_native.Program] = []
    for index, segment in enumerate(parts.segments):
        if not segment.native:
            segments.append(_onnx_segment(graph, segment, f"segment{index}", arrays, blobs))
            continue
        program, found = emit(segment, f"segment{index}", arrays, choose)
        engines.append(_native.Program(threads=1))
        program.build(engines[-1], arrays)
        segments.append(program.to_json())
        layers += found
    header: Json = {
        "inputs": [_info(info) for info in g.inputs(graph)],
        "outputs": [_info(info) for info in g.outputs(graph)],
        **({"assumes": [guard.to_json() for guard in parts.guards]} if parts.guards else {}),
        "segments": segments,
        "layers": [layer.stated() for layer in layers],
        **({"memory": budget.stated(engines)} if engines else {}),
    }
    shown = tuple({k: v for k, v in item.items() if k not in ("steps", "buffers", "weights")} for item in segments)
    return Lowered(header, arrays, blobs, shown, tuple(layer.reported() for layer in layers), parts.reasons)


def _onnx_segment(
    graph: gs.Graph, segment: Segment, name: str, arrays: dict[str, np.ndarray], blobs: dict[str, bytes]
) -> Json:
    """Part of the graph as ONNX; its large weights are arrays of the plan, mapped like all others."""
    part = g.extract(graph, segment.outputs, segment.inputs)
    g.exact_products(part, optimised=True)
    model, weights = g.weightless(part)
    if any(values.dtype.name not in DTYPES for values in weights.values()):  # bfloat16, which .npy does not know
        model, weights = g.to_model(part), {}
    blobs[name] = model.SerializeToString(deterministic=True)
    places: dict[int, str] = {}  # two names may stand for one array
    for values in weights.values():
        arrays[places.setdefault(id(values), f"{name}/{len(places):04d}.weight")] = values
    stored: Json = {tensor: {"array": places[id(values)]} for tensor, values in weights.items()}
    return {
        "kind": "onnxruntime",
        "model": name,
        "weights": stored,
        "inputs": segment.inputs,
        "outputs": segment.outputs,
        "nodes": len(segment.nodes),
        "operators": sorted({node.op for node in segment.nodes}),
    }


def _info(info: g.TensorInfo) -> Json:
    return {"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)}
