"""The worker of DeepSparse."""

from __future__ import annotations

import os
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "1"  # read on import

import deepsparse  # type: ignore[import-not-found]
from numpy.typing import NDArray

from tools.bench.peers.serve import Feeds, Run, serve


class Deepsparse:
    """The model has fixed sizes: told other ones, the engine's Python writes them into the model's file."""

    version = str(deepsparse.__version__)

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        inputs = list(feeds.values())
        engine = deepsparse.Engine(model, batch_size=len(inputs[0]), num_cores=threads, scheduler="single_stream")
        return lambda: engine.run(inputs)

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result[0]
        return array


if __name__ == "__main__":
    serve(Deepsparse())
