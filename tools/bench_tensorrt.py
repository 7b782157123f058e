"""BERT on an NVIDIA GPU: FP16, dense INT8 and sparse INT8 engines side by side, and what TensorRT made of each layer.

    python -m tools.bench_tensorrt --output docs            # bert-base, 128 and 384 tokens, batch 1 to 128
    python -m tools.bench_tensorrt --model bert-mini --tokens 128 --batch 8 --trt-python /opt/trt/bin/python

Random weights, half of them zero in 2:4; one graph of each kind, one engine per shape. Errors are those of the engine
that was kept against its graph in onnxruntime. Exit status 3 where there is no GPU or no TensorRT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.tensorrt.build import build, probe, read_description
from nmcompile.backends.tensorrt.engine import choose_profile
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.calibrate import Calibration, open_data
from nmcompile.cli import guarded
from nmcompile.compare import Comparison
from nmcompile.files import write
from nmcompile.passes import LowerOpset, NarrowFloats, ScaleQueries
from nmcompile.pipeline import Pipeline
from nmcompile.recipes import canonical_passes
from tools.bench.encoder import INPUTS, MODELS, OUTPUT, VOCABULARY, encoder

LEAST_COSINE = 0.99  # of an engine against its graph in onnxruntime: sums in another order, values over rounding edges


@dataclass(frozen=True)
class Row:
    """One shape: medians in milliseconds, layers that were eligible for sparse products and ran on them, and the
    cosine of the kept engine against its graph."""

    tokens: int
    batch: int
    fp16: float
    dense: float
    sparse: float
    eligible: int
    chosen: int
    kept: str
    cosine: float


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="bert-base", show_default=True)
@click.option("--tokens", multiple=True, type=int, default=(128, 384), show_default=True)
@click.option("--batch", multiple=True, type=int, default=(1, 8, 32, 128), show_default=True)
@click.option("--trt-python", metavar="PYTHON", help="The Python that has TensorRT. Default: this one.")
@click.option("--trt-version", type=click.Choice(["8.6", "10", "11"]), help="Default: what that Python has.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Write tensorrt-MODEL.md and .json.")
def main(
    model: str, tokens: tuple[int, ...], batch: tuple[int, ...], trt_python: str | None, trt_version: str | None,
    output: Path | None,
) -> None:  # fmt: skip
    """Print a table of times, and write it with everything that was found."""
    guarded(lambda: table(model, tokens, batch, EngineOptions(version=trt_version, python=trt_python), output))


def table(name: str, tokens: tuple[int, ...], batches: tuple[int, ...], options: EngineOptions,
          output: Path | None) -> None:  # fmt: skip
    """NoDeviceError where there is no GPU or no TensorRT."""
    facts = probe(options.python)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipes = prepare(name, options, folder)
        rows = [one(recipes, folder, options, length, batch) for length in tokens for batch in batches]
    head = (f"{name}, random weights with 2:4 zeros; {facts['gpu']['name']}, driver {facts['gpu']['driver']}, TensorRT "
            f"{facts['tensorrt']}")  # fmt: skip
    text = f"{head}\n\n{markdown(rows)}"
    click.echo(text)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(output / f"tensorrt-{name}.md", text)
        content = {"machine": facts, "rows": [vars(row) for row in rows]}
        write(output / f"tensorrt-{name}.json", json.dumps(content, indent=1) + "\n")


def feeds(batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random token ids, no padding."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (batch, tokens))
    return dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


def prepare(name: str, options: EngineOptions, folder: Path) -> dict[str, dict[str, Any]]:
    """Recipes to fill shapes into: int8 (sparse and dense) and fp16, with their graphs in the folder."""
    model, samples = encoder(MODELS[name]), [feeds(2, 128, seed) for seed in range(4)]
    version = choose_profile(options).name
    given = EngineOptions(version=version, shapes=("1x8,1x128,1x128",), build=False)
    nmcompile.compile(model, folder / "int8.plan", target="tensorrt", calibration=samples, solver="magnitude",
                      engine=given, measure=False)  # fmt: skip
    profile, source = choose_profile(given), g.load(model)
    calibration = Calibration(open_data(samples, g.inputs(source)))
    passes = [*canonical_passes(), ScaleQueries(), LowerOpset(version=profile.opset),
              *([NarrowFloats()] if profile.strong else [])]  # fmt: skip
    g.save(Pipeline(passes, calibration=calibration).run(source)[0], folder / "fp16.dense.onnx")
    int8 = json.loads((folder / "int8.recipe.json").read_text())
    return {"int8": int8, "fp16": {**int8, "models": {"dense": "fp16.dense.onnx"}, "plan": "fp16.plan"}}


def one(recipes: dict[str, dict[str, Any]], folder: Path, options: EngineOptions, tokens: int, batch: int) -> Row:
    """Build and time the engines of one shape."""
    shapes = {name: {key: [batch, tokens] for key in ("min", "opt", "max")} for name in INPUTS}
    found = {}
    for kind, recipe in recipes.items():
        path = folder / f"{kind}.recipe.json"
        path.write_text(json.dumps({**recipe, "shapes": shapes}))
        click.echo(f"building {kind} engines for {batch}x{tokens}", err=True)
        found[kind] = read_description(build(path, options.python))
    int8, fp16 = found["int8"], found["fp16"]
    assert int8 is not None and fp16 is not None
    sparse, dense = int8["variants"]["sparse"], int8["variants"]["dense"]
    return Row(tokens, batch, fp16["variants"]["dense"]["ms"]["median"], dense["ms"]["median"],
               sparse["ms"]["median"], len(sparse["eligible"]), len(sparse["chosen"]), int8["kept"],
               _cosine(folder, int8["kept"], options, batch, tokens))  # fmt: skip


def _cosine(folder: Path, kept: str, options: EngineOptions, batch: int, tokens: int) -> float:
    """NaN where TensorRT is in another Python, which sessions do not reach."""
    if options.python is not None:
        return float("nan")
    graph = g.load(folder / f"int8.{kept}.onnx")
    inputs, comparison = feeds(batch, tokens, 9), Comparison(g.outputs(graph))
    comparison.add(g.run(graph, inputs), nmcompile.load(folder / "int8.plan").run(inputs))
    return comparison.differences()[OUTPUT].cosine


def markdown(rows: list[Row]) -> str:
    """The rows, with ratios."""
    lines = ["| tokens | batch | FP16 ms | dense INT8 ms | sparse INT8 ms | dense / sparse | FP16 / best INT8 "
             "| eligible | run sparse | kept | cosine to onnxruntime |", "|" + " --- |" * 11]  # fmt: skip
    for row in rows:
        cosine = "-" if np.isnan(row.cosine) else f"{row.cosine:.5f}" + " !" * (row.cosine < LEAST_COSINE)
        cells = [row.tokens, row.batch, f"{row.fp16:.3g}", f"{row.dense:.3g}", f"{row.sparse:.3g}",
                 f"{row.dense / row.sparse:.2f}", f"{row.fp16 / min(row.dense, row.sparse):.2f}", row.eligible,
                 row.chosen, row.kept, cosine]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
