"""The worker of onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nmcompile.ort_options import open_foreign
from tools.bench.peers.serve import Feeds, Json, Run, serve


class Onnxruntime:
    version = str(ort.__version__)

    def open(self, model: str, form: str, feeds: Feeds, threads: int) -> Run:
        session = open_foreign(model, threads)
        return lambda: session.run(None, feeds)

    def output(self, result: Any) -> NDArray[Any]:
        array: NDArray[Any] = result[0]
        return array


def prepare(job: Json) -> None:
    """Static INT8 of every MatMul, u8 by s8 per channel, in both notations; attention's own products in Q/DQ only."""
    from onnxruntime.quantization import (  # it needs onnx, which a process that measures should not load
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            with np.load(job["calibration"]) as file:
                arrays = {name: file[name] for name in file.files}
            self.rows = iter([{name: a[i : i + 1] for name, a in arrays.items()} for i in range(job["samples"])])

        def get_next(self) -> Feeds | None:
            return next(self.rows, None)

    target = Path(job["target"])
    quant_pre_process(job["source"], target / "prepared", skip_symbolic_shape=True)
    for name, notation in (("qdq", QuantFormat.QDQ), ("qoperator", QuantFormat.QOperator)):
        quantize_static(
            target / "prepared", target / name, Reader(), quant_format=notation, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        )  # fmt: skip
    (target / "prepared").unlink()


if __name__ == "__main__":
    serve(Onnxruntime(), prepare)
