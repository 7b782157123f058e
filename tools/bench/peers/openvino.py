"""The worker of OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from tools.bench.peers.serve import Feeds, Json, Run, serve


class Openvino:
    version = str(ov.__version__).split("-")[0]

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        core = ov.Core()
        read = core.read_model(Path(model) / "model.xml" if form == "int8" else model)
        read.reshape({name: list(array.shape) for name, array in feeds.items()})
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
        if form == "fp32":  # fp32 means fp32: by itself it takes bf16 where the CPU has it
            config["INFERENCE_PRECISION_HINT"] = "f32"
        request = core.compile_model(read, "CPU", config).create_infer_request()
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result[0]
        return array


def prepare(job: Json) -> None:
    """Post-training INT8 by NNCF with its settings for Transformers."""
    import nncf  # type: ignore[import-not-found]

    with np.load(job["calibration"]) as file:
        arrays = {name: file[name] for name in file.files}
    rows = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(job["samples"])]
    model = nncf.quantize(
        ov.Core().read_model(job["source"]), nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
    )  # fmt: skip
    folder = Path(job["target"]) / "model"
    folder.mkdir()
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    serve(Openvino(), prepare)
