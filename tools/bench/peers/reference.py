"""A worker that multiplies matrices in numpy: how fast the machine is at this moment, whatever is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.peers.serve import Feeds, Run, serve


class Reference:
    version = np.__version__

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        """float32, 768 x 768 by 768 x 128; numpy's threads are set by the parent."""
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((768, 768)).astype(np.float32)
        x = rng.standard_normal((768, 128)).astype(np.float32)
        return lambda: weight @ x

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result
        return array


if __name__ == "__main__":
    serve(Reference())
