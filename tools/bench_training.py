"""Tokens per second of end-to-end distillation, beside a BERT written by hand in torch with the same loss.

    python -m tools.bench_training                       # shapes of all-MiniLM-L6-v2
    python -m tools.bench_training --shape bert-base --rounds 2

Both take turns on the same batches in one process: teacher forward, student forward and backward, masks, clipping,
AdamW on all there is, tables of embeddings included. The memory is the process's peak before the other began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import click
import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import nn

from nmcompile import input_roles
from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.bench import peak_memory
from nmcompile.calibrate import Data
from nmcompile.pipeline import Pipeline
from nmcompile.prune import Goal
from nmcompile.recipes import canonical_passes
from nmcompile.training.batches import Batches, Feeds
from nmcompile.training.distil import EndToEnd, Trainer
from nmcompile.training.losses import Distillation, Output, of_features, of_output
from nmcompile.training.outputs import outputs_of, width_of
from nmcompile.training.pair import Pair
from nmcompile.training.policies import Layer, Policy, make
from tools.bench.encoder import HEAD, POSITIONS, VOCABULARY, Shape, encoder

SHAPES = {"minilm": Shape(6, 384), "bert-base": Shape(12, 768)}
LENGTHS = (12, 96)  # of samples, evenly between


class Block(nn.Module):
    """One Transformer layer after Vaswani et al. 2017, in two halves."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden
        self.heads = width // HEAD
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, width = x.shape
        q, k, v = (part(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2).reshape(batch, tokens, width)
        half = self.first(x + self.out(mixed))
        return half, self.second(half + self.down(F.gelu(self.up(half))))


class Encoder(nn.Module):
    """BERT without its pooler; gives the stream behind each half layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, shape.hidden), nn.Embedding(POSITIONS, shape.hidden)
        self.kinds, self.norm = nn.Embedding(2, shape.hidden), nn.LayerNorm(shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, feeds: Feeds) -> list[torch.Tensor]:
        ids, mask = (torch.from_numpy(feeds[name]) for name in ("input_ids", "attention_mask"))
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds(torch.zeros_like(ids)))
        bias = (1.0 - mask[:, None, None, :].float()) * -1e4
        found = []
        for layer in self.layers:
            half, x = layer(x, bias)
            found += [half, x]
        return found


class ByHand:
    """The loop that one would write for one model."""

    def __init__(self, shape: Shape, how: EndToEnd, half: bool) -> None:
        self.teacher, self.student = Encoder(shape), Encoder(shape)
        self.student.load_state_dict(self.teacher.state_dict())
        self.how, self.half = how, half
        self.masks = [(layer.weight, (torch.rand_like(layer.weight) > 0.8).float())
                      for layer in self.student.layers.modules() if isinstance(layer, nn.Linear)]  # fmt: skip
        self.trained = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, how.lr, how.betas, weight_decay=0.0, fused=True)

    def step(self, feeds: Feeds) -> None:
        mask = torch.from_numpy(feeds["attention_mask"]).float().unsqueeze(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                wanted = self.teacher(feeds)
            given = self.student(feeds)
        names = list(map(str, range(len(given))))
        loss = of_features(dict(zip(names, given, strict=True)), dict(zip(names, wanted, strict=True)), names, mask)
        loss = loss + of_output(OUTPUT, given[-1], wanted[-1], mask, self.how.loss)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, kept in self.masks:
            if weight.grad is not None:
                weight.grad.mul_(kept)
        nn.utils.clip_grad_norm_(self.trained, self.how.clip)
        self.optimizer.step()
        with torch.no_grad():
            for weight, kept in self.masks:
                weight.mul_(kept)


OUTPUT = Output("last_hidden_state", "embeddings")


def samples(graph: gs.Graph, count: int) -> Data:
    """Random tokens of the lengths that sentences have."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(1, VOCABULARY, int(rng.integers(*LENGTHS)))
        rows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    infos = input_roles.inputs(graph)
    return Data(infos, tuple({info.name: row[info.name] for info in infos} for row in rows), 32)


def trainer(graph: gs.Graph, data: Data, how: EndToEnd) -> Trainer:
    """Ours, at masks of 80 % zeros in 2x4 blocks by magnitude."""
    goal = Goal(sp.parse_pattern("2x4"), 0.8)
    layers = [layer.name for layer in g.linear_layers(graph)]
    masks = {layer.name: sp.keep_mask(layer.weight, goal.pattern, goal.sparsity) for layer in g.linear_layers(graph)}
    pair = Pair.of(graph, graph, layers, data)

    def policy(steps: int) -> Policy[Any]:
        return make("fixed", {name: Layer(pair.student.initializers[pair.weights[name]], goal,
                                          torch.from_numpy(np.ascontiguousarray(masks[name].T)))
                              for name in layers}, steps, {})  # fmt: skip

    return Trainer(pair, Batches(data, how.tokens), [], outputs_of(graph, width_of(graph, layers)), how, policy)


def turns(steps: list[Callable[[Feeds], None]], batches: Iterator[Feeds], rounds: int, each: int) -> list[list[float]]:
    """Tokens per second of each, by round; the first round warms up."""
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        some = list(islice(batches, each))
        tokens = sum(feeds["input_ids"].size for feeds in some)
        for step, rates in zip(steps, found, strict=True):
            start = time.perf_counter()
            for feeds in some:
                step(feeds)
            if turn:
                rates.append(tokens / (time.perf_counter() - start))
    return found


@click.command(context_settings={"max_content_width": 120})
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), default="minilm", show_default=True)
@click.option("--tokens", default=1024, show_default=True, help="Of a step.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=4, show_default=True, help="Of each in a round.")
@click.option("--threads", default=2, show_default=True)
def main(name: str, tokens: int, rounds: int, steps: int, threads: int) -> None:
    """Tokens per second of training, beside a model and a loop written by hand."""
    torch.set_num_threads(threads)
    shape, how = SHAPES[name], EndToEnd(tokens=tokens, steps=1 << 20, loss=Distillation())
    graph, _ = Pipeline(canonical_passes()).run(g.admit(encoder(shape)))
    data = samples(graph, 4096)
    ours = trainer(graph, data, how)
    ours.begin(how.steps)
    for feeds in islice(ours.batches, 2):
        ours._step(feeds)
    peak = peak_memory()
    other = ByHand(shape, how, ours.pair.half)
    mine, theirs = turns([ours._step, other.step], iter(Batches(data, tokens)), rounds, steps)
    ratios = sorted(a / b for a, b in zip(mine, theirs, strict=True))
    click.echo(f"{name}, {tokens} tokens a step, {threads} threads, {'bfloat16' if ours.pair.half else 'float32'}")
    click.echo(f"  ours       {np.median(mine):8.0f} tokens/s, {peak / 2**30:.2f} GiB at most")
    click.echo(f"  by hand    {np.median(theirs):8.0f} tokens/s")
    click.echo(f"  ours / by hand  {np.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
