"""The dense model and the compressed one as modules, and what is trained of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch

from nmcompile import ir as g
from nmcompile.calibrate import Data
from nmcompile.torch import Module
from nmcompile.training.batches import Feeds, token_mask
from nmcompile.training.blocks import Block, blocks

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pair:
    """teacher: dense, not trained. student: compressed. blocks: of both, whose tensors have the same names. weights: by
    layer, the initializer of its weight. trained: the initializers that training changes. data: the inputs' infos."""

    teacher: Module
    student: Module
    blocks: tuple[Block, ...]
    weights: Mapping[str, str]
    trained: tuple[str, ...]
    data: Data
    half: bool

    @classmethod
    def of(
        cls, dense: gs.Graph, graph: gs.Graph, layers: Sequence[str], data: Data, device: str = "cpu",
        half: bool | None = None, embeddings: bool = True,
    ) -> Pair:  # fmt: skip
        """Of a canonical graph before and after pruning, and the names of the layers that were pruned. half: products
        in bfloat16; None where the device has them. embeddings: their tables are trained as well."""
        parts = blocks(graph, layers)
        ends = [block.end for block in parts]
        weights = {layer.name: g.weight_of(layer).name for layer in g.linear_layers(graph) if layer.name in layers}
        teacher, student = Module(dense, ends).to(device), Module(graph, ends, set(weights.values())).to(device)
        teacher.requires_grad_(False)
        student.requires_grad_(False)
        trained = tuple(dict.fromkeys(_trained(graph, student, embeddings)))
        for name in trained:
            student.initializers[name].requires_grad_(True)
        return cls(teacher, student, parts, weights, trained, data, has_half(device) if half is None else half)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def ends(self) -> list[str]:
        """The tensors at which blocks end: the feature maps that are compared."""
        return [block.end for block in self.blocks]

    def mask(self, feeds: Feeds) -> Tensor | None:
        """Which tokens are real, [batch, tokens, 1]."""
        return token_mask(self.data, feeds, self.device)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Products in bfloat16 where the device is faster at them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            yield


def has_half(device: str) -> bool:
    """Whether products of bfloat16 are faster: CUDA from 8.0 on, CPUs with avx512_bf16 or AMX."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tell = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch tells it nowhere else
    return tell is not None and "AVX512" in torch.backends.cpu.get_cpu_capability() and bool(tell())


READERS = ("MatMul", "Add", "Mul", "LayerNormalization", "RMSNormalization", "QuantizeLinear")


def _trained(graph: gs.Graph, student: Module, embeddings: bool) -> Iterator[str]:
    """Weights of linear layers, biases and normalisations, and tables of embeddings [rows, features] where these are
    wanted."""
    readers, known = (*READERS, *(("Gather",) if embeddings else ())), student.initializers
    for node in graph.nodes:
        for tensor in node.inputs if node.op in readers else ():
            small = isinstance(tensor, gs.Constant) and tensor.name in known and known[tensor.name].ndim <= 2
            if small and all(user.op in readers for user in g.consumers(tensor)):
                yield tensor.name
