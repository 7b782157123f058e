"""Runs a graph on calibration data and keeps the statistics its passes ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile import ir as graphs
from nmcompile.calibrate.data import Data
from nmcompile.calibrate.statistics import Statistics
from nmcompile.errors import CalibrationError, EndlessError, GraphError, NmcompileError
from nmcompile.roles import kind_of, real_tokens
from nmcompile.tensorinfo import TensorInfo

Array = npt.NDArray[Any]

SHORT = 8  # tokens that every model is taken to read


@dataclass(frozen=True)
class Calibration:
    """A run over `data`; `progress(what, done, total)` is called after each batch and each stage.

    checkpoints: folder for what long passes have done so far, so that an interrupted run goes on from there.
    training: more samples, for what trains weights; None: `data`.
    """

    data: Data
    progress: Callable[[str, int, int], None] | None = None
    checkpoints: Path | None = None
    training: Data | None = None

    def collect(self, graph: gs.Graph, needs: Mapping[str, Sequence[str]]) -> Statistics:
        """Statistics of the tensors in `needs` (name -> "range", "histogram", "squares"), in memory that no
        data size changes.

        Padding (attention_mask 0) is left out of tensors [batch, tokens, ...] and [batch * tokens, K]: the
        model computes something there, but nobody reads it. CalibrationError names a tensor that is not
        finite or was never seen.
        """
        statistics = Statistics()
        if not needs:
            return statistics
        inputs = {info.name for info in graphs.inputs(graph)}
        wanted = [name for name in needs if name not in inputs]
        plain = any(node.op == "QuantizeLinear" for node in graph.nodes)  # its fusions of pairs change values, or fail
        run = graphs.runner(graph, wanted, optimise=not plain) if wanted else None
        total = self.data.samples
        for feed in self.data:
            try:
                values = {**feed, **(run(feed) if run else {})}
            except GraphError as error:
                raise CalibrationError(
                    f"the model does not run on the calibration data: {error}; are they this model's inputs?"
                ) from None
            real = real_tokens(feed, self.data.inputs)
            for name, kinds in needs.items():
                statistics.add(name, without_padding(values[name], real), kinds)
            statistics.count += next((array.shape[0] for array in feed.values() if array.ndim), 1)
            if self.progress is not None:
                self.progress("calibrating", statistics.count, total)
        return statistics


def check_ids(data: Data) -> None:
    """CalibrationError where an input is looked up, as its role says, in a table that has no such row."""
    tables = {info.name: info.role.rows for info in data.inputs if info.role is not None and info.role.rows is not None}
    for feed in data:
        for name in tables.keys() & feed.keys():
            low, high = int(feed[name].min(initial=0)), int(feed[name].max(initial=0))
            if high >= tables[name] or low < -tables[name]:
                raise CalibrationError(
                    f"input '{name}' holds {high if high >= tables[name] else low}, the model's table has "
                    f"{tables[name]} rows; are the data, and their tokenizer, this model's?"
                )


def without_padding(values: Array, real: Array | None) -> Array:
    """The rows of [batch, tokens, ...] or [batch * tokens, K] where `real` [batch, tokens] holds."""
    if real is None:
        return values
    if values.shape[:2] == real.shape:
        return np.asarray(values[real])  # [tokens, ...]
    if values.ndim == 2 and values.shape[0] == real.size:
        return np.asarray(values[real.ravel()])
    return values


def longest(graph: gs.Graph, length: int, infos: Sequence[TensorInfo] = ()) -> int:
    """The greatest number of tokens up to `length` that the model takes (its position table may hold fewer).

    infos: its inputs, with their roles."""
    infos = infos or graphs.inputs(graph)
    ids = {info.name for info in infos if kind_of(info) == "ids"}
    if not any(len(info.shape) > 1 and isinstance(info.shape[1], str) for info in infos):
        return length
    while length > SHORT:
        dims = {dim: length for info in infos for dim in info.shape[1:] if isinstance(dim, str)}
        feeds = graphs.random_feeds(infos, dims=dims)
        for name, values in feeds.items():
            if name in ids and values.ndim == 2 and values.max() > 1:
                feeds[name] = np.full_like(values, 2)  # no padding token, which RoBERTa's positions do not count
        try:
            graphs.run(graph, feeds)
            return length
        except EndlessError:
            raise
        except NmcompileError:
            length //= 2
    return length
