"""The worker of PyTorch: eager float32, or torch's dynamic INT8 of every linear layer."""

# mypy: ignore-errors
# torch is typed where it is installed and unknown where it is not: no annotation suits both.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from tools.bench.peers.serve import Feeds, Run, serve

HEAD = 64


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(hidden, hidden) for _ in range(4))
        self.inner, self.outer = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm, self.last_norm = (nn.LayerNorm(hidden, eps=1e-12) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm(self.mixed(mixed) + x)
        out: torch.Tensor = self.last_norm(self.outer(F.gelu(self.inner(x))) + x)
        return out


PARTS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "mixed": "attention.output.dense", "inner": "intermediate.dense", "outer": "output.dense",
    "norm": "attention.output.LayerNorm", "last_norm": "output.LayerNorm",
}  # fmt: skip


class Encoder(nn.Module):
    def __init__(self, weights: dict[str, NDArray[Any]]) -> None:
        super().__init__()
        table = "embeddings.{}_embeddings.weight"
        self.words, self.kinds, self.positions = (
            nn.Embedding.from_pretrained(torch.from_numpy(weights[table.format(part)]))
            for part in ("word", "token_type", "position")
        )
        hidden = self.words.embedding_dim
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        count = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder."))
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(count))
        self.fill(self.norm, weights, "embeddings.LayerNorm")
        for index, layer in enumerate(self.layers):
            for part, name in PARTS.items():
                self.fill(getattr(layer, part), weights, f"encoder.layer.{index}.{name}")

    @staticmethod
    def fill(module: nn.Module, weights: dict[str, NDArray[Any]], name: str) -> None:
        weight = torch.from_numpy(weights[f"{name}.weight"])
        state = {"weight": weight.T if weight.ndim == 2 else weight, "bias": torch.from_numpy(weights[f"{name}.bias"])}
        module.load_state_dict(state)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.kinds(kinds) + self.positions.weight[: ids.shape[1]]
        x = self.norm(x)
        added = (1.0 - mask[:, None, None, :].float()) * -10000.0
        for layer in self.layers:
            x = layer(x, added)
        return x


class Pytorch:
    version = str(torch.__version__)

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        torch.set_num_threads(threads)
        with np.load(Path(model) / "weights.npz") as file:
            encoder: nn.Module = Encoder({name: file[name] for name in file.files}).eval()
        if form == "int8":
            encoder = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, torch.qint8)
        inputs = [torch.from_numpy(array) for array in feeds.values()]

        def run() -> torch.Tensor:
            with torch.inference_mode():
                out: torch.Tensor = encoder(*inputs)
                return out

        return run

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result.numpy()
        return array


if __name__ == "__main__":
    serve(Pytorch())
