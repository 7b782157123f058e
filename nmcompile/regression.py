"""Regression of what the compiler makes of a model: graph texts and facts, recorded once and compared ever after.

DIR/NAME/canonical.txt, pruned.txt, quantized.txt    nmcompile.ir.to_text after each stage; pruned.txt only if pruned
DIR/NAME/facts.json                                  `Facts`, and the tolerances that comparing uses

Nothing depends on the machine but the plan's hash, which is compared only on a machine like the one that recorded it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import nmcompile
from nmcompile import ir as g
from nmcompile.compare import Difference
from nmcompile.errors import NmcompileError
from nmcompile.files import write
from nmcompile.made_up import made_up
from nmcompile.pipeline import Pass, Report
from nmcompile.recipes import canonical_passes

FACTS = "facts.json"
STAGES = ("canonical", "pruned", "quantized")
# what is kept of each layer: of plans for the CPU, and of graphs for TensorRT
LAYER = ("outputs", "inputs", "density", "pattern", "precision", "kernel", "int8", "epilogue", "verdict")
QUANTIZING = ("smooth-activations", "insert-qdq", "quantize-outputs", "scale-queries", "store-weights", "lower-opset",
              "narrow-floats")  # fmt: skip
TOLERANCE: Mapping[str, float] = {
    "text": 0.02,  # of a float in the texts, relative; integers below 8 bits and densities may differ by one
    "density": 0.005,
    "cosine": 0.005,
    "sqnr": 1.5,  # dB
    "outputs": 0.05,  # of the output's root mean square
}
CLEAR = 60.0  # dB above which a signal-to-noise ratio is as good as exact
SHAPE = (2, 8)  # sequences, tokens of the seeded inputs
VALUES = 8  # of each output that are recorded
LINES = 24  # of a diff that are shown

Json = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known of a compiled model: passes as written, matches, layers, segments, loss and outputs by name."""

    passes: list[str]
    matched: dict[str, str]
    layers: dict[str, Json]
    segments: list[str]
    loss: dict[str, Json]
    outputs: dict[str, Json]
    plan: dict[str, str]  # sha256, and the machine that it holds for


def place(model: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Where a model's baseline lies in a folder of baselines."""
    return Path(folder) / Path(model).stem


def record(model: str | os.PathLike[str], folder: str | os.PathLike[str], **compile_options: Any) -> Facts:
    """Compile a model and write its baseline to folder/NAME; options are those of nmcompile.compile."""
    texts, facts = _compiled(model, compile_options)
    target = place(model, folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for stage in STAGES:
            if stage in texts:
                write(target / f"{stage}.txt", texts[stage])
            else:
                (target / f"{stage}.txt").unlink(missing_ok=True)
        write(target / FACTS, json.dumps({"tolerance": dict(TOLERANCE), **asdict(facts)}, indent=1) + "\n")
    except OSError as error:
        why = error.strerror or error
        raise NmcompileError(f"cannot write the baseline {target}: {why}; give another folder") from None
    return facts


def compare(model: str | os.PathLike[str], folder: str | os.PathLike[str], **compile_options: Any) -> list[str]:
    """Compile a model and tell, one text each, where it departs from its baseline; empty when it does not.

    Raises NmcompileError when there is no baseline or it cannot be read.
    """
    target = place(model, folder)
    old_texts, old, tolerance = _read(target)
    texts, facts = _compiled(model, compile_options)
    found = _pass_difference(old.passes, facts.passes)
    for stage in STAGES:
        difference = _stage_difference(stage, old_texts.get(stage), texts.get(stage), tolerance["text"])
        if difference:
            found.append(difference)
    return found + list(_fact_differences(old, facts, tolerance))


# ---- what is recorded ----------------------------------------------------------------------------------------


def _compiled(model: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[dict[str, str], Facts]:
    canonical, seen = len(canonical_passes()), 0
    texts: dict[str, str] = {}

    def watch(pass_: Pass, graph: gs.Graph, report: Report, seconds: float) -> None:
        nonlocal seen
        seen += 1
        if seen == canonical:
            texts["canonical"] = g.to_text(graph)
        elif seen > canonical:
            texts["quantized" if pass_.name in QUANTIZING else "pruned"] = g.to_text(graph)

    with tempfile.TemporaryDirectory(prefix="nmcompile-") as folder:
        plan = Path(folder) / "model.plan"
        given = {"tuning": "off", **options, "observers": [watch]}
        if options.get("target") == "tensorrt":  # engines are of one GPU; what is recorded is the graph they come from
            result = nmcompile.compile(model, None, emit_onnx=plan, **given)
            graph = g.load(plan)
            outputs, ran_on = g.run(graph, made_up(g.inputs(graph), *SHAPE, ragged=True)), ("onnxruntime", 0)
        else:
            result = nmcompile.compile(model, plan, **given)
            session = nmcompile.load(plan)
            outputs, ran_on = session.run(made_up(session.inputs, *SHAPE, ragged=True)), (session.isa, session.threads)
        _check_measured(result.loss, outputs)
        digest = hashlib.sha256(plan.read_bytes()).hexdigest()
        facts = Facts(
            passes=[name for name, _, _ in result.passes],
            matched={name: str(item.detail["matched"]) for name, item, _ in result.passes if "matched" in item.detail},
            layers={str(layer["name"]): {key: layer[key] for key in LAYER if key in layer} for layer in result.layers},
            segments=[" ".join([str(item["kind"]), *item.get("operators", ())]) for item in result.segments],
            loss={name: {"cosine": _short(item.cosine), "sqnr": _short(min(item.sqnr, CLEAR))}
                  for name, item in result.loss.items()},
            outputs={name: _sketch(values) for name, values in outputs.items()},
            plan={"sha256": digest, "machine": machine(*ran_on)},
        )  # fmt: skip
    return texts, facts


def _check_measured(loss: Mapping[str, Difference], outputs: Mapping[str, np.ndarray]) -> None:
    """NmcompileError for an output that no figure says anything of: a baseline of it would agree with anything."""
    for name, values in outputs.items():
        if values.dtype.kind in "fiub" and (name not in loss or np.isnan(loss[name].sqnr)):
            why = "it holds values that are not numbers" if name in loss else "no sample fills a batch of the model"
            raise NmcompileError(f"nothing can be measured of output {name!r}: {why}; give other --calibration")


def _sketch(values: np.ndarray) -> Json:
    """Enough of an output to tell it from another: shape, type, root mean square and a few values spread over it."""
    flat = values.astype(np.float64).ravel()
    places = np.linspace(0, max(flat.size - 1, 0), min(VALUES, flat.size))
    at = sorted({int(place) for place in places})
    power = float(np.sqrt((flat**2).mean())) if flat.size else 0.0
    return {"shape": list(values.shape), "dtype": values.dtype.name, "rms": _short(power),
            "values": [_short(float(flat[index])) for index in at]}  # fmt: skip


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def machine(isa: str, threads: int) -> str:
    """What the last bits of floats may depend on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "onnx", "onnxruntime"))
    return f"nmcompile {nmcompile.__version__}, {packages}, {platform.machine()} {isa}, {threads} threads"


def _read(target: Path) -> tuple[dict[str, str], Facts, Mapping[str, float]]:
    try:
        content = json.loads((target / FACTS).read_text("utf-8"))
        texts = {s: (target / f"{s}.txt").read_text("utf-8") for s in STAGES if (target / f"{s}.txt").exists()}
        tolerance = {key: float(content["tolerance"][key]) for key in TOLERANCE}
        return texts, Facts(**{field.name: content[field.name] for field in fields(Facts)}), tolerance
    except FileNotFoundError:
        raise NmcompileError(f"there is no baseline {target}; make it with: nmcompile check MODEL --record") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise NmcompileError(f"the baseline {target} cannot be read ({why}); record it anew") from None


# ---- comparing texts -----------------------------------------------------------------------------------------

SCALARS = re.compile(r"(\w+)(\[[^\]]*\]) \{([^}]*)\}")  # f32[] {0.0278}
SHARE = re.compile(r"(?<= )\d+%")  # density of a constant
HASH = re.compile(r" #[0-9a-f]{8}")


def _stage_difference(stage: str, old: str | None, new: str | None, tolerance: float) -> str:
    """A unified diff of the lines that differ beyond the tolerance, "" when none does."""
    if old == new:
        return ""
    if old is None or new is None:
        return f"stage {stage}: {'recorded, but not there now' if new is None else 'there now, but not recorded'}"
    before, after = old.splitlines(), new.splitlines()
    loose = stage == "quantized"  # its weights were scaled by activations, which another machine rounds otherwise
    matcher = difflib.SequenceMatcher(
        None, [_skeleton(line, loose) for line in before], [_skeleton(line, loose) for line in after], autojunk=False
    )
    for tag, start, _, other, end in matcher.get_opcodes():
        if tag == "equal":
            for index in range(other, end):
                line = before[start + index - other]
                if _agree(line, after[index], tolerance):
                    after[index] = line
    diff = list(difflib.unified_diff(before, after, f"{stage} (recorded)", f"{stage} (now)", lineterm="", n=1))
    if len(diff) > LINES:
        diff = [*diff[:LINES], f"... and {len(diff) - LINES} more lines"]
    return "\n".join(diff)


def _skeleton(line: str, loose: bool) -> str:
    """The line without what is compared by value."""
    line = SHARE.sub("%", SCALARS.sub(r"\1\2 {}", line))
    return HASH.sub(" #", line) if loose else line


def _agree(old: str, new: str, tolerance: float) -> bool:
    for one, other in zip(SCALARS.finditer(old), SCALARS.finditer(new), strict=True):
        kind, values, others = one[1], one[3].split(", "), other[3].split(", ")
        if values != others and (len(values) != len(others) or not all(map(_close(kind, tolerance), values, others))):
            return False
    shares = zip(SHARE.findall(old), SHARE.findall(new), strict=True)
    return all(abs(int(one[:-1]) - int(other[:-1])) <= 1 for one, other in shares)


def _close(kind: str, tolerance: float) -> Any:
    def close(one: str, other: str) -> bool:
        try:
            a, b = float(one), float(other)
        except ValueError:
            return one == other
        if kind in ("u8", "i8"):  # a zero point
            return abs(a - b) <= 1
        return a == b if kind[0] not in "fb" else abs(a - b) <= tolerance * max(abs(a), abs(b))

    return close


# ---- comparing facts -----------------------------------------------------------------------------------------


def _pass_difference(old: Sequence[str], new: Sequence[str]) -> list[str]:
    if old == new:
        return []
    changes = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    return ["\n".join(["passes (- recorded, + now)", *changes])]


def _fact_differences(old: Facts, new: Facts, tolerance: Mapping[str, float]) -> Iterator[str]:
    yield from _changes("matched", old.matched, new.matched)
    if old.segments != new.segments:
        yield f"segments: recorded {'; '.join(old.segments)}, now {'; '.join(new.segments)}"
    yield from _names("layer", old.layers, new.layers)
    for name in _common(old.layers, new.layers):
        was, now = dict(old.layers[name]), dict(new.layers[name])
        if "density" in was and abs(was["density"] - now.get("density", 0.0)) <= tolerance["density"]:
            del was["density"], now["density"]
        changes = [f"{key} {was[key]}, now {now.get(key)}" for key in was if was[key] != now.get(key)]
        if changes:
            yield f"layer {name}: {'; '.join(changes)}"
    yield from _names("loss of output", old.loss, new.loss)
    for name in _common(old.loss, new.loss):
        for figure in ("cosine", "sqnr"):
            if not _near(old.loss[name][figure], new.loss[name][figure], tolerance[figure]):
                yield (f"loss of {name}: {figure} {old.loss[name][figure]}, now {new.loss[name][figure]} "
                       f"(tolerance {tolerance[figure]:g})")  # fmt: skip
    yield from _names("output", old.outputs, new.outputs)
    for name in _common(old.outputs, new.outputs):
        yield from _output(name, old.outputs[name], new.outputs[name], tolerance["outputs"])
    if old.plan["machine"] == new.plan["machine"] and old.plan["sha256"] != new.plan["sha256"]:
        yield f"plan: sha256 {old.plan['sha256'][:12]}, now {new.plan['sha256'][:12]}, with the same versions and CPU"


def _output(name: str, old: Json, new: Json, tolerance: float) -> Iterator[str]:
    yield from _changes(f"output {name}", *({key: item[key] for key in ("shape", "dtype")} for item in (old, new)))
    if old["shape"] != new["shape"]:
        return
    allowed = tolerance * (old["rms"] or 0.0) + 1e-6
    pairs = [(old["rms"], new["rms"]), *zip(old["values"], new["values"], strict=True)]
    far = [(a, b) for a, b in pairs if not _near(a, b, allowed)]
    if far:
        one, other = far[0]
        yield f"output {name}: {len(far)} values on seeded inputs: {one}, now {other} (tolerance {allowed:.3g})"


def _near(one: float | None, other: float | None, allowed: float) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= allowed


def _common(old: Mapping[str, Json], new: Mapping[str, Json]) -> list[str]:
    return [name for name in old if name in new]


def _names(what: str, old: Mapping[str, Json], new: Mapping[str, Json]) -> list[str]:
    return [f"{what} {name}: recorded, but not there now" for name in old if name not in new] + [
        f"{what} {name}: there now, but not recorded" for name in new if name not in old
    ]


def _changes(what: str, old: Mapping[str, object], new: Mapping[str, object]) -> Sequence[str]:
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{what}: {key} {old.get(key, 'none')}, now {new.get(key, 'none')}" for key in keys]
