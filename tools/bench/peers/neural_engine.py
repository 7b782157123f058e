"""The worker of Intel's Neural Engine, the sparse runtime in intel-extension-for-transformers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import intel_extension_for_transformers.neural_engine_py as engine  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

from tools.bench.peers.serve import Feeds, Run, serve


class NeuralEngine:
    """Its threads are OpenMP's: the parent sets OMP_NUM_THREADS."""

    version = version("intel-extension-for-transformers")

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        loaded = engine.Model(f"{model}/conf.yaml", f"{model}/model.bin")
        inputs = [array.astype(np.int32) for array in feeds.values()]
        self.shape = (*inputs[0].shape, -1)
        return lambda: loaded.forward(inputs)

    def output(self, result: Any) -> NDArray[Any]:
        flat: NDArray[Any] = np.array(result[0])
        return flat.reshape(self.shape)


if __name__ == "__main__":
    serve(NeuralEngine())
