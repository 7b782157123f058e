"""Runs passes one after another, gives each what it asks for, and checks what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature

import onnx_graphsurgeon as gs

from nmcompile import ir as g
from nmcompile.calibrate import Calibration
from nmcompile.canonical import check_canonical
from nmcompile.contract import CANONICAL, DERIVATION, NEEDS_DATA, SHAPES, Context, Pass, Report
from nmcompile.errors import CalibrationError, NmcompileError, PassError
from nmcompile.spec import parse_spec, spec
from nmcompile.verification import Check

__all__ = ["CANONICAL", "DERIVATION", "SHAPES", "Context", "Observer", "Pass", "Pipeline", "Report", "parse_spec",
           "spec"]  # fmt: skip

Observer = Callable[[Pass, gs.Graph, Report, float], None]  # (pass, graph after it, its report, seconds)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, and what goes on around them.

    observers: called after each pass. verify: run the graph in onnxruntime before and after each pass that
    preserves what it computes. calibration: the samples that passes run the graph on.
    """

    passes: Sequence[Pass]
    observers: Sequence[Observer] = field(default=(), kw_only=True)
    verify: bool = field(default=False, kw_only=True)
    calibration: Calibration | None = field(default=None, kw_only=True)

    def run(self, graph: gs.Graph) -> tuple[gs.Graph, tuple[Report, ...]]:
        """(the graph after all passes, each pass's report); the graph given stays as it is.

        PassError, one line: the pass, what is wrong, and the passes that ran before it.
        """
        for pass_ in self.passes:
            _check_contract(pass_)
        graph = g.copy(graph)
        reports: list[Report] = []
        done: list[str] = []
        check = Check(None if self.calibration is None else self.calibration.data) if self.verify else None
        context = Context(self.calibration)
        for pass_ in self.passes:
            try:
                start = time.perf_counter()
                if check is not None:
                    check.before(pass_, graph)
                report = _run(pass_, graph, context)
                seconds = time.perf_counter() - start
                g.verify(graph, pass_.name)
                if check is not None:
                    check.after(pass_, graph)
            except CalibrationError:
                raise  # the data's fault, not the pass's
            except NmcompileError as error:
                raise PassError(_told(pass_, error, done)) from error
            except Exception as error:
                error.add_note(f"in pass {spec(pass_)}{_after(done)}")
                raise
            reports.append(report)
            done.append(spec(pass_))
            for observer in self.observers:
                observer(pass_, graph, report, seconds)
        return graph, tuple(reports)


def _check_contract(pass_: Pass) -> None:
    """PassError for a pass of an older contract, whose run took the graph alone, or statistics or calibration data
    beside it."""
    try:
        parameters = signature(pass_.run).parameters.values()
    except (TypeError, ValueError):
        return  # code that Python cannot look into
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes = len(places) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    older = any(p.name in ("statistics", "calibration") for p in places[1:2])
    if not takes or older or any(p not in places[:2] for p in needed):
        names = ", ".join(p.name for p in parameters)
        raise PassError(f"{pass_.name}: its run({names}) is of an older contract; write run(self, graph, context): "
                        "context.statistics holds what needs() asked for, context.data the samples")  # fmt: skip


def _run(pass_: Pass, graph: gs.Graph, context: Context) -> Report:
    """One pass with what it requires and needs."""
    if CANONICAL in pass_.requires:
        check_canonical(graph)
    if SHAPES in pass_.requires:
        context.infer(graph)
    needs = pass_.needs(graph)
    if needs and context.calibration is None:
        raise PassError(NEEDS_DATA)
    statistics = context.collect(graph, needs) if needs else None
    return pass_.run(graph, context.given(statistics, graph if DERIVATION in pass_.requires else None))


def _told(pass_: Pass, error: NmcompileError, done: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    for prefix in (f"{pass_.name}: ", f"{pass_.name}, ", f"{pass_.name} "):
        text = text.removeprefix(prefix)
    return f"{spec(pass_)}: {text}{_after(done)}"


def _after(done: Sequence[str]) -> str:
    return f" (after {', '.join(done)})" if done else ""
