"""Holds what the graph computes before and after a pass against each other, in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from nmcompile import input_roles, lengths
from nmcompile import ir as g
from nmcompile.calibrate import Data
from nmcompile.calibrate.collect import without_padding
from nmcompile.contract import Pass
from nmcompile.errors import GraphError, PassError
from nmcompile.roles import real_tokens, role_of
from nmcompile.tensorinfo import TensorInfo

Array = npt.NDArray[Any]
Values = Mapping[str, Array]

RTOL, ATOL = 1e-3, 1e-4  # of a value, and of the largest value of its tensor; ten times that for 16-bit floats
BATCH = 64  # tensors fetched at once when a difference is searched for


class Check:
    """Compares what the graph computes before and after a pass: on made-up inputs of several lengths as far as the
    graph takes them, and on calibration samples, cut, repeated and with masks of other shapes."""

    def __init__(self, data: Data | None) -> None:
        self._data = data
        self._graph: gs.Graph | None = None  # a copy from before the pass
        self._known: list[tuple[Values, Values]] = []  # inputs and outputs; kept while passes preserve them
        self._infos: tuple[TensorInfo, ...] = ()

    def before(self, pass_: Pass, graph: gs.Graph) -> None:
        if not pass_.preserves:
            self._known = []
            return
        self._graph = g.copy(graph)
        self._known = self._known or self._run(graph)

    def _run(self, graph: gs.Graph) -> list[tuple[Values, Values]]:
        infos, run = input_roles.inputs(graph), g.runner(graph)
        self._infos = infos
        found: list[tuple[Values, Values]] = []
        refused: GraphError | None = None

        def runs(feeds: Values) -> bool:
            nonlocal refused
            try:
                found.append((feeds, run(feeds)))
            except GraphError as error:
                refused = refused or error
                return False
            return True

        for sizes in lengths.small_sizes(infos):
            for feeds in lengths.variants(_made_up(infos, sizes, 2), infos):
                runs(feeds)
        for feeds in lengths.of_samples(self._data) if self._data is not None and not self._data.synthetic else ():
            runs(feeds)
        any(runs(_made_up(infos, sizes, 1)) for sizes in lengths.far_sizes(infos))
        if not found and refused is not None:
            raise PassError(f"cannot be verified, as the graph before it runs on no made-up inputs: {refused}; "
                            "give samples with --calibration")  # fmt: skip
        return found

    def after(self, pass_: Pass, graph: gs.Graph) -> None:
        if not pass_.preserves or self._graph is None:
            return
        if [i.name for i in g.inputs(graph)] != [i.name for i in g.inputs(self._graph)]:
            raise PassError("changes the graph's inputs, so it does not preserve what the graph computes")
        if [i.name for i in g.outputs(graph)] != [i.name for i in g.outputs(self._graph)]:
            raise PassError("changes the graph's outputs, so it does not preserve what the graph computes")
        try:
            run = g.runner(graph)
            for number, (feeds, expected) in enumerate(self._known):
                problem = _problem(self._graph, graph, self._infos, (feeds, expected, run(feeds)))
                if problem:
                    where = f", with inputs {_shapes(feeds)}" if number else ""
                    raise PassError(f"does not preserve what the graph computes: {problem}{where}")
        except GraphError as error:
            raise PassError(f"the graph after it does not run: {error}") from error


def _problem(
    before: gs.Graph, after: gs.Graph, infos: Sequence[TensorInfo], values: tuple[Values, Values, Values]
) -> str:
    """The first difference of (inputs, outputs before, outputs after), "" for none. What stands where the mask has
    holes is nobody's to read."""
    feeds, expected, found = values
    real = None if lengths.ends_padded(feeds, infos) else real_tokens(feeds, infos)
    for name, array in expected.items():
        problem = difference(*(without_padding(item, real) for item in (array, found[name])))
        if problem:
            return (_first_difference(before, after, feeds) if real is None else "") or f"output '{name}' {problem}"
    return ""


def _shapes(feeds: Values) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())


def _made_up(infos: Sequence[TensorInfo], sizes: Mapping[str, int], batch: int) -> dict[str, Array]:
    """Seeded inputs, ids over all rows of their tables."""
    dims = {info.shape[0]: batch for info in infos if info.shape and isinstance(info.shape[0], str)} | dict(sizes)
    feeds = g.random_feeds(infos, seed=0, dims=dims)
    rng = np.random.default_rng(1)
    for info in infos:
        role = role_of(info)
        if role.kind == "ids" and role.rows is not None:
            feeds[info.name] = rng.integers(0, role.rows, feeds[info.name].shape).astype(info.dtype)
    return feeds


def difference(expected: Any, found: Any) -> str:
    """How an array departs from the expected one beyond the tolerance; "" when it does not."""
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        return ""  # sequences and maps are not compared
    if expected.shape != found.shape:
        return f"has shape {list(found.shape)} instead of {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"has type {found.dtype} instead of {expected.dtype}"
    if not expected.size or expected.dtype.kind in "OSUT":
        return ""
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    scale = float(np.abs(finite).max(initial=0.0)) or 1.0
    loose = 10 if expected.dtype.itemsize <= 2 and expected.dtype.kind in "fV" else 1
    with np.errstate(invalid="ignore"):
        error = np.abs(wide - other)
        allowed = loose * (ATOL * scale + RTOL * np.abs(wide))
        wrong = ~((np.isfinite(error) & (error <= allowed)) | (wide == other) | (np.isnan(wide) & np.isnan(other)))
    if not wrong.any():
        return ""
    worst = float(np.max(error[wrong & np.isfinite(error)], initial=0.0))
    share = f"{wrong.sum()} of {wrong.size} values"
    return f"differs in {share}, by up to {worst:.3g} where the largest is {scale:.3g}"


def _first_difference(before: gs.Graph, after: gs.Graph, feeds: Values) -> str:
    """The first node of `after` whose result, present under the same name in `before`, is another; "" for
    none."""
    old = {t.name for node in before.nodes for t in node.outputs if t.name}
    made = [(node, t.name) for node in after.nodes for t in node.outputs if t.name in old]
    for start in range(0, len(made), BATCH):
        batch = made[start : start + BATCH]
        names = [name for _, name in batch]
        try:
            expected, found = g.run(before, feeds, names), g.run(after, feeds, names)
        except GraphError:
            continue
        for node, name in batch:
            problem = difference(expected[name], found[name])
            if problem:
                return f"node '{node.name}' ({node.op}): '{name}' {problem}"
    return ""
