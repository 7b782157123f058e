"""Lower a Q/DQ graph to a CPU plan: native segments as steps over buffers, the rest as onnxruntime segments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.backends.cpu import budget
from nmcompile.backends.cpu.fuse import Chain, Fusion
from nmcompile.backends.cpu.kernels import choose_kernels
from nmcompile.backends.cpu.ops import FLOAT, Form, Op
from nmcompile.backends.cpu.pack import halved, pack_as
from nmcompile.backends.cpu.partition import Segment, partition
from nmcompile.backends.cpu.session import NativeSegment
from nmcompile.backends.cpu.tuning import Choose, by_cost_model
from nmcompile.plan import DTYPES

Json = dict[str, object]

REPORTED = ("chosen_by", "microseconds")  # of a layer, and not in the plan: its bytes follow from the choices alone


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
    layers: list[Json] = []
    for index, segment in enumerate(parts.segments):
        if segment.native:
            emitter = Emitter(segment, f"segment{index}", arrays, choose)
            segments.append(emitter.emit())
            layers += emitter.layers
        else:
            segments.append(_onnx_segment(graph, segment, f"segment{index}", arrays, blobs))
    header: Json = {
        "inputs": [_info(info) for info in g.inputs(graph)],
        "outputs": [_info(info) for info in g.outputs(graph)],
        **({"assumes": [guard.to_json() for guard in parts.guards]} if parts.guards else {}),
        "segments": segments,
        "layers": [{k: v for k, v in layer.items() if k not in REPORTED} for layer in layers],
    }
    natives = [NativeSegment(item, arrays, "", 1).program for item in segments if item["kind"] == "native"]
    header |= {"memory": budget.stated(natives)} if natives else {}
    shown = tuple({k: v for k, v in item.items() if k not in ("steps", "buffers", "weights")} for item in segments)
    return Lowered(header, arrays, blobs, shown, tuple(layers), parts.reasons)


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


@dataclass
class Emitter:
    """Writes one native segment: buffers by id, steps as the engine's calls, arrays by reference."""

    segment: Segment
    stem: str
    arrays: dict[str, np.ndarray]
    choose: Choose = by_cost_model
    buffers: list[list[object]] = field(default_factory=list)
    steps: list[Json] = field(default_factory=list)
    layers: list[Json] = field(default_factory=list)
    values: dict[tuple[str, Form], int] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    stored: dict[int, str] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)

    def emit(self) -> Json:
        ops, self.choices = choose_kernels(self.segment, self.choose)
        self.geometry = "tokens1" if any(op.kind == "patch_embed" for op in ops) else "tokens"
        self.fusion = Fusion(ops, self.segment.outputs)
        for op in self.fusion.ops:
            for read in op.reads:
                if read.tensor not in self.fusion.makers and (read.tensor, FLOAT) not in self.values:
                    self._enter(read.tensor, op)
            chain = self.fusion.chains.get(id(op))
            if chain is not None:
                self._linear(chain)
            elif id(op) not in self.fusion.absorbed:
                getattr(self, f"_{op.kind}")(op)
        outputs = list(self.segment.outputs)
        for slot, name in enumerate(outputs):
            self.step("leave", x=self.values[(name, FLOAT)], slot=slot)
        return {"kind": "native", "inputs": list(self.slots), "mask": self.segment.mask, "outputs": outputs,
                "views": self.views, "buffers": self.buffers, "steps": self.steps}  # fmt: skip

    # ---- values ----

    def buffer(self, rows: int, layout: str, op: Op) -> int:
        self.buffers.append([rows, layout, "first" if op.space.first else self.geometry])
        return len(self.buffers) - 1

    def step(self, step: str, **arguments: object) -> None:
        self.steps.append({"step": step, **arguments})

    def array(self, values: np.ndarray | None, stem: str) -> Json | None:
        """A reference to an array of the plan; the same array is stored once."""
        if values is None:
            return None
        key = id(values)
        if key not in self.stored:
            self.stored[key] = f"{self.stem}/{len(self.arrays):04d}.{stem}"
            self.arrays[self.stored[key]] = np.ascontiguousarray(values)
            self._kept = [*getattr(self, "_kept", []), values]  # keeps the id from being used again
        return {"array": self.stored[key]}

    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def _enter(self, name: str, op: Op) -> None:
        rows = op.rows if op.kind not in ("linear", "linear_float") else np.asarray(op.data["weight"]).shape[1]
        whole = replace(op, space=replace(op.space, first=False))  # what enters has all its tokens
        target = self.buffer(rows, "f32", whole)
        self.step("enter", y=target, slot=self.slot(name))
        self.values[(name, FLOAT)] = target
        for form in self.fusion.forms(name) - {FLOAT}:
            self._quantize(name, rows, form, whole)

    def _quantize(self, name: str, rows: int, form: Form, op: Op) -> None:
        y = self.buffer(rows, form.layout, op)
        self.step("quantize", x=self.values[(name, FLOAT)], y=y, scale=form.scale, zero_point=form.zero_point)
        self.values[(name, form)] = y

    def _store(self, op: Op, name: str, fused: bool) -> tuple[int, Form, list[Form]]:
        """The buffer an operation writes, in the only form wanted if it can write that, and the forms to add after."""
        forms = self.fusion.forms(name)
        if fused and len(forms) == 1:
            form = next(iter(forms))
            rest: list[Form] = []
        else:
            form, rest = FLOAT, sorted(forms - {FLOAT}, key=lambda f: (f.layout, f.scale, f.zero_point))
        y = self.buffer(op.rows, form.layout, op)
        self.values[(name, form)] = y
        return y, form, rest

    def _finish(self, op: Op, rest: list[Form]) -> None:
        for form in rest:
            self._quantize(op.y, op.rows, form, op)

    def _x(self, op: Op, index: int = 0) -> int:
        read = op.reads[index]
        return self.values[(read.tensor, read.form)]

    # ---- one method per kind of operation ----

    def _linear(self, chain: Chain) -> None:
        root, last = chain.root, chain.last
        x = self._x(root)
        residual = -1 if chain.residual is None else self._residual(chain.residual, root)
        quantized = root.kind == "linear"
        wanted = self.fusion.forms(last.y) if quantized else set()
        by_linear = sorted((f for f in wanted if f.layout in ("keys", "values")), key=lambda f: (f.layout, f.scale))
        y, form, rest = self._store(last, last.y, fused=quantized)
        weight = np.asarray(root.data["weight"])
        bias = root.data["bias"]
        common: Json = {"x": x, "y": y, "activation": chain.activation, "residual": residual,
                        "bias": self.array(bias if isinstance(bias, np.ndarray) else None, "bias")}  # fmt: skip
        facts: Json = {"name": root.name, "outputs": weight.shape[0], "inputs": weight.shape[1],
                       "density": round(float(sp.density(weight)), 4)}  # fmt: skip
        if quantized:
            packed = pack_as(weight, self.choices[root.y].kind)
            read = root.reads[0].form
            stored: Json = {"format": packed.format, **({"rows": packed.rows} if packed.rows else {})}
            stored |= {name: self.array(values, name) for name, values in packed.arrays.items()}
            common |= {"weight": stored, "w_scale": self.array(np.asarray(root.data["scale"]), "scale"),
                       "x_scale": read.scale, "x_zero_point": read.zero_point}  # fmt: skip
            self.step("linear", **common, y_scale=form.scale, y_zero_point=form.zero_point)
            # keys and values that something else reads too are computed once more, in the form only this step writes
            for other in [item for item in by_linear if item != form]:
                again = self.values[(last.y, other)] = self.buffer(last.rows, other.layout, last)
                self.step("linear", **{**common, "y": again}, y_scale=other.scale, y_zero_point=other.zero_point)
                rest.remove(other)
            facts |= {"precision": "int8", "kernel": str(packed.kind), "computed": round(packed.share, 4)}
        else:
            self.step("linear_float", **common, weight=self.array(np.ascontiguousarray(weight, np.float32), "weight"))
            facts |= {"precision": "float32", "kernel": "dense", "computed": 1.0}
        found = sp.detect(weight)
        facts["pattern"] = "dense" if found is None else str(found.pattern)
        choice = self.choices.get(root.y)
        if choice is not None:
            facts |= {"reordered": True} if choice.reordered else {}
            facts |= {"chosen_by": choice.by, "microseconds": {str(k): time for k, time in choice.microseconds.items()}}
        self.layers.append(facts)
        self._finish(last, rest)

    def _residual(self, name: str, op: Op) -> int:
        if (name, FLOAT) not in self.values:
            self._enter(name, Op("binary", (), name, op.rows, op.space, ()))
        return self.values[(name, FLOAT)]

    def _attention(self, op: Op) -> None:
        q, k, v = (read.form for read in op.reads)
        y, form, rest = self._store(op, op.y, fused=True)
        self.step("attention", q=self._x(op, 0), k=self._x(op, 1), v=self._x(op, 2), y=y, heads=op.data["heads"],
                  scale=op.data["scale"], q_scale=q.scale, q_zero_point=q.zero_point, k_scale=k.scale, v_scale=v.scale,
                  causal=op.data["causal"], y_scale=form.scale, y_zero_point=form.zero_point)  # fmt: skip
        self._finish(op, rest)

    def _attention_float(self, op: Op) -> None:
        y, form, rest = self._store(op, op.y, fused=True)
        self.step("attention_float", q=self._x(op, 0), k=self._x(op, 1), v=self._x(op, 2), y=y, heads=op.data["heads"],
                  scale=op.data["scale"], causal=op.data["causal"], y_scale=form.scale,
                  y_zero_point=form.zero_point)  # fmt: skip
        self._finish(op, rest)

    def _layer_norm(self, op: Op) -> None:
        factor = next((item for item in self.fusion.smoothed.values() if item.reads[0].tensor == op.y), None)
        forms = {form for user, form in self.fusion.users[op.y] if user is not factor} | (
            {FLOAT} if op.y in self.fusion.leaving else set()
        )
        small = sorted((f for f in forms if f.layout == "u8"), key=lambda f: (f.scale, f.zero_point))
        fused = small[0] if small else None
        name = op.y
        if factor is not None:
            name, fused = factor.y, self.fusion.users[factor.y][0][1]
        rest = sorted(forms - {FLOAT, fused}, key=lambda f: (f.layout, f.scale, f.zero_point))
        y = q = -1
        if FLOAT in forms or rest:
            y = self.values[(op.y, FLOAT)] = self.buffer(op.rows, "f32", op)
        if fused is not None:
            q = self.values[(name, fused)] = self.buffer(op.rows, "u8", op)
        gamma, beta = op.data["gamma"], op.data["beta"]
        folded = {} if factor is None else {"q_mul": self._row(factor, "mul"), "q_add": self._row(factor, "add")}
        self.step("layer_norm", x=self._x(op), y=y, q=q, gamma=self.array(np.asarray(gamma), "gamma"),
                  beta=self.array(beta if isinstance(beta, np.ndarray) else None, "beta"), eps=op.data["eps"],
                  rms=op.data["rms"], scale=fused.scale if fused else 1.0,
                  zero_point=fused.zero_point if fused else 0, **folded)  # fmt: skip
        self._finish(op, rest)

    def _row(self, op: Op, key: str) -> Json | None:
        value = op.data[key]
        return self.array(value if isinstance(value, np.ndarray) else None, key)

    def _float_step(self, source: Op, step: str, **arguments: object) -> None:
        y, _, rest = self._store(source, source.y, fused=False)
        self.step(step, **arguments, y=y)
        self._finish(source, rest)

    def _unary(self, op: Op) -> None:
        self._float_step(op, "unary", x=self._x(op), op=op.data["op"])

    def _binary(self, op: Op) -> None:
        self._float_step(op, "binary", a=self._x(op, 0), b=self._x(op, 1), op=op.data["op"])

    def _affine(self, op: Op) -> None:
        self._float_step(op, "affine", x=self._x(op), mul=self._row(op, "mul"), add=self._row(op, "add"))

    def _add_positions(self, op: Op) -> None:
        self._float_step(
            op, "add_positions", x=self._x(op), table=self.array(np.asarray(op.data["table"]), "positions")
        )

    def _first(self, op: Op) -> None:
        self._float_step(op, "first", x=self._x(op))

    def _view(self, op: Op) -> None:
        """The same values under the output's name; the session changes shape or type on the way out."""
        self.values[(op.y, FLOAT)] = self._x(op)
        self.views[op.y] = str(op.data["view"])

    def _embed(self, op: Op) -> None:
        sources, tables = op.data["sources"], op.data["tables"]
        assert isinstance(sources, list) and isinstance(tables, list)
        written = []
        for source in sources:
            kind, *rest = source
            if kind in ("input", "cumulative"):
                written.append([kind, self.slot(str(rest[0])), *rest[1:]])
            else:
                written.append(["constant" if kind == "row" else kind, *rest])
        stored = [self.array(halved(table), "table") for table in tables]
        self._float_step(op, "embed", sources=written, tables=stored)

    def _patch_embed(self, op: Op) -> None:
        data = op.data
        weight, bias = np.asarray(data["weight"]), data["bias"]
        patch = data["patch"]
        assert isinstance(patch, tuple)
        for rows in (weight.shape[1], op.rows):
            self.buffers.append([rows, "f32", "tokens"])
        pixels, patches = len(self.buffers) - 2, len(self.buffers) - 1
        self.step("patches", y=pixels, slot=self.slot(str(data["input"])), channels=data["channels"], patch_h=patch[0],
                  patch_w=patch[1])  # fmt: skip
        self.step("linear_float", x=pixels, y=patches, weight=self.array(weight, "weight"), activation="none",
                  residual=-1, bias=self.array(bias if isinstance(bias, np.ndarray) else None, "bias"))  # fmt: skip
        self._float_step(op, "prepend", x=patches, row=self.array(np.asarray(data["row"]), "row"))
