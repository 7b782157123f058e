"""BERT of any size with random weights, dense INT8 and block-sparse, next to onnxruntime: the figures of the README.

    python tools/bench_bert.py                            BERT-base, dense and 90 % of 2x4 blocks, 1x128
    python tools/bench_bert.py --layers 6 --shape 32x128

Speed does not depend on the weights' values, accuracy does: this measures speed only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx

import nmcompile
from nmcompile.bench import bench, ratios

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.bert import build


@click.command()
@click.option("--layers", default=12, show_default=True)
@click.option("--hidden", default=768, show_default=True)
@click.option("--sparsity", default=0.9, show_default=True, help="share of zeros of the sparse plan")
@click.option("--pattern", default="2x4", show_default=True)
@click.option("--shape", default="1x128", show_default=True, help="sequences x tokens")
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="per model")
def main(layers: int, hidden: int, sparsity: float, pattern: str, shape: str, threads: int, seconds: float) -> None:
    """Write the model, compile it twice, measure each plan against it in alternation."""
    batch, tokens = (int(size) for size in shape.split("x"))
    with TemporaryDirectory() as folder:
        model = Path(folder) / "bert.onnx"
        onnx.save(random_bert(layers, hidden), model)
        for label, pruning in (("dense INT8", {}), (f"{pattern} at {sparsity:.0%}", {"sparsity": sparsity})):
            plan = Path(folder) / "bert.plan"
            chosen = {"pattern": pattern} if pruning else {}
            nmcompile.compile(model, plan, preset="fast", measure=False, require="native", **pruning, **chosen)  # type: ignore[arg-type]
            ours, theirs = bench([plan, model], threads=threads, shapes=[(batch, tokens)], seconds=seconds)
            (ratio, least, most), *_ = ratios(ours, theirs)
            click.echo(
                f"{label}: {ours.latencies[0].p50:.2f} ms, {theirs.runtime} fp32 "
                f"{theirs.latencies[0].p50:.1f} ms, {ratio:.1f}x ({least:.1f} to {most:.1f}), "
                f"plan {plan.stat().st_size / 1e6:.0f} MB of {model.stat().st_size / 1e6:.0f} MB"
            )


def random_bert(layers: int, hidden: int) -> onnx.ModelProto:
    """A BERT encoder with seeded random weights: heads of 64, feed-forward of 4 x hidden."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"] = (rng.standard_normal((outputs, inputs)) * 0.04).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)
        weights[f"{name}.bias"] = np.zeros(hidden, np.float32)

    for table, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        values = rng.standard_normal((rows, hidden)) * 0.04
        weights[f"embeddings.{table}_embeddings.weight"] = values.astype(np.float32)
    norm("embeddings.LayerNorm")
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 4 * hidden, hidden)
        linear(f"{layer}.output.dense", hidden, 4 * hidden)
        norm(f"{layer}.output.LayerNorm")
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
    }
    return build(config, weights)


if __name__ == "__main__":
    main()
