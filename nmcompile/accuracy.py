"""What a compile measures against the model it came from: the loss, and a limit on it that layers give way to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from nmcompile import graph as g
from nmcompile.calibrate import Data
from nmcompile.compare import Comparison, Difference
from nmcompile.control import hold, layer_noise, worst_first
from nmcompile.errors import PassError
from nmcompile.holdout import Holdout
from nmcompile.job import Job
from nmcompile.lengths import Look, lengths_of, look
from nmcompile.metrics import METRICS, Limit, parse_limit
from nmcompile.roles import real_tokens
from nmcompile.targets import Run

Progress = Callable[[str, int, int], None]


def reference(source: gs.Graph) -> Run:
    """The model itself in onnxruntime."""
    return g.runner(source, [info.name for info in g.outputs(source)], optimise=True)


def limit_for(asked: str | Limit | None, source: gs.Graph, data: Data, can_run: bool) -> Limit | None:
    """The limit that was asked for. PassError where nothing runs that it could be measured on; InputError where its
    metric has nothing to measure on these outputs, or is not known."""
    if asked is None:
        return None
    if not can_run:
        raise PassError("a limit on the loss needs a plan to measure; give an output")
    if not isinstance(asked, str):
        return asked
    limit = parse_limit(asked, list(data), data.inputs)
    if limit.name in METRICS:  # before the long part
        limit.score(model := reference(source), model)
    return limit


def measured_loss(source: gs.Graph, run: Run, data: Data, tell: Progress) -> Mapping[str, Difference]:
    """What runs against the model it came from, by output."""
    comparison, model = Comparison(g.outputs(source)), reference(source)
    done = 0
    for feeds in data:
        comparison.add(model(feeds), run(feeds), real_tokens(feeds, data.inputs))
        done += len(next(iter(feeds.values())))
        tell("measuring the loss", done, data.samples)
    return comparison.differences()


def look_beyond(
    source: gs.Graph, run: Run, data: Data, parts: Holdout, loss: Mapping[str, Difference], tell: Progress
) -> Look:
    """What runs against the model at lengths that none of the samples has."""
    tell("looking at other lengths", 0, 1)
    return look(reference(source), run, parts.measured, lengths_of(data), g.outputs(source), loss)


def hold_limit(
    job: Job, limit: Limit, asked: str | Limit, parts: Holdout, scratch: Path
) -> tuple[dict[str, Any], Holdout, list[str]]:
    """Quantize so that what runs stays within the limit: (what it took, the samples that it was held by, notes).

    The outcome is measured on samples that the search did not choose by as well; where it does not hold there, the
    search begins again on all of them. `scratch`: where plans may be tried.
    """
    held = _search(job, limit, parts.chosen, scratch)
    if not parts.apart or not isinstance(asked, str) or limit.name not in METRICS:
        return held, parts, []
    apart = parse_limit(asked, list(parts.measured), parts.measured.inputs)
    drop = apart.score(reference(job.source), job.target.opened(scratch, job.header))
    if drop <= limit.value:
        return {**held, "drop_apart": drop}, parts, []
    every = parts.together()
    note = (f"{limit.name} dropped by {drop:.4g} on samples that the search had not chosen by: the limit is held by "
            "all held-out samples, and none was left to measure on")  # fmt: skip
    limit = parse_limit(asked, list(every.chosen), every.chosen.inputs)
    return _search(job, limit, every.chosen, scratch), every, [note]


def _search(job: Job, limit: Limit, data: Data, scratch: Path) -> dict[str, Any]:
    model = reference(job.source)

    def attempt(dense: Sequence[str], floating: Sequence[str]) -> float:
        job.quantize(dense, floating)
        return limit.score(model, job.target.opened(scratch, job.header))

    def candidates() -> tuple[list[str], list[str]]:
        noise = layer_noise(job.dense, job.graph, data)
        quantized = [layer.name for layer in g.linear_layers(job.graph) if layer.quantized]
        return worst_first(noise, job.changed), worst_first(noise, quantized)

    found = hold(limit, attempt, candidates, job.tell)
    return {"metric": limit.name, "limit": limit.value, "drop": found.drop,
            "dense": job.closed(found.dense), "float": list(found.floating)}  # fmt: skip
