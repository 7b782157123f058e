"""Several processes that train one model together, as torchrun starts them: each takes its part of the batches, the
gradients are averaged, and what the first says of time and weights holds for all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nmcompile.errors import UnsupportedError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ranks:
    """rank: this process's number; count: of all; device: where its tensors are."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @classmethod
    def joined(cls, device: str) -> Ranks:
        """Those of the environment that torchrun sets, connected; one where it sets none. `device` cuda becomes the
        GPU of this process's own."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count < 2:
            return cls(device=device)
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            except (ValueError, RuntimeError) as error:
                line = " ".join(str(error).split())[:200]
                raise UnsupportedError(f"WORLD_SIZE={count}, but the processes cannot be connected: {line}; start them "
                                       "by torchrun, or unset it") from None  # fmt: skip
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def agreed(self, number: float) -> float:
        """The first process's number."""
        if self.count == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        return float(value)

    def mean(self, number: Tensor) -> float:
        """Over the processes; not finite where it is not in one of them."""
        value = number.detach().to(torch.float64)
        if self.count > 1:
            dist.all_reduce(value)
        return float(value) / self.count

    def average(self, weights: Iterable[Tensor]) -> None:
        """Gradients, in place; a weight that one process has not reached counts as zero there."""
        if self.count == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
            weight.grad.div_(self.count)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Take the first process's values, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)


ALONE = Ranks()
