"""The worker of nmcompile itself."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

import nmcompile
from tools.bench.peers.serve import Feeds, Json, Run, serve


class Nmcompile:
    version = nmcompile.__version__

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        session = nmcompile.load(model, threads=threads)
        return lambda: session.run(feeds)

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result["last_hidden_state"]
        return array


def prepare(job: Json) -> None:
    pruning = {"sparsity": job["share"], "pattern": job["pattern"], "solver": "magnitude"} if job["share"] else {}
    nmcompile.compile(job["source"], f"{job['target']}/model", preset="fast", measure=False, require="native",
                      calibration=job["calibration"], **pruning)  # fmt: skip


if __name__ == "__main__":
    serve(Nmcompile(), prepare)
