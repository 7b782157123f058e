"""nmcompile profile PLAN"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from nmcompile.cli import terminal
from nmcompile.cli.bench import Shape
from nmcompile.errors import InputError
from nmcompile.files import write

if TYPE_CHECKING:
    from nmcompile.backends.cpu.session import Session
    from nmcompile.profile import Machine, Profile, Row, WhatIf

Arrays = dict[str, np.ndarray]
STDOUT = Path("-")
DISTURBED = 0.5  # preemptions per run that are worth a word

HELP = """Show where the time of a plan goes, step by step, and how near each step is to what this machine can do.

\b
  nmcompile profile model.plan                                     # one sequence of 128 tokens, made up
  nmcompile profile model.plan --shape 1x128 --shape 8x384 --threads 4
  nmcompile profile model.plan --data samples.npz --steps          # real inputs, every step with its layer
  nmcompile profile model.plan --what-if 0.9 --pattern 4x4         # were every linear layer that sparse
  nmcompile profile model.plan --trace run.json --plot roof.svg    # for https://ui.perfetto.dev, for people

\b
Columns:
  G MAC/s   products computed (those of zero blocks and of padding are not) per second
  peak      its share of the int8 peak, measured now with a product that stays in the caches;
            of float steps, of the float peak
  GB/s      activations, weights and table rows that the step must touch once, per second
  memory    its share of the memory's bandwidth, measured now; above 100 % the caches had the data
  bound     what the step is near (half or more): compute, memory, or cache where it is faster than memory;
            overhead when it is near none: too little work, or arithmetic other than products (softmax, GELU)

Time is wall-clock time: what all threads spent in a step, divided by their number. "waiting" is what they spent in no
step: for each other, or between steps. The rows add up to the total. --what-if times the kernels of sparser layers
alone and scales the layers by the ratio; accuracy is another matter.
"""


@click.command("profile", help=HELP, short_help="Show where a plan's time goes, and what sparser layers would take.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="BxS", help="Sequences x tokens, repeatable.")
@click.option("--threads", type=int, metavar="N", help="Threads to use (default: every core).")
@click.option("--data", type=click.Path(path_type=Path), metavar="DATA", help="Real inputs: .npz, .jsonl or a folder.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="PATH", help="tokenizer.json, for texts.")
@click.option("--runs", type=click.IntRange(min=1), metavar="N", help="Runs per shape (default: 1.5 s of them).")
@click.option("--steps", is_flag=True, help="Every step, not groups of equal ones.")
@click.option("--what-if", "sparsities", type=float, multiple=True, metavar="X",
              help="Estimate all linear layers at this share of zeros, repeatable (default: 0.8 and 0.9).")  # fmt: skip
@click.option("--no-what-if", is_flag=True, help="Leave the estimates out.")
@click.option("--pattern", default="2x4", show_default=True, metavar="RxC", help="Pattern of the estimates.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="All of it; - prints it.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="A run as a Chrome trace.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Roofline and time, .svg or .png.")
def command(
    plan: Path,
    shapes: tuple[tuple[int, int | None], ...],
    threads: int | None,
    data: Path | None,
    tokenizer: Path | None,
    runs: int | None,
    steps: bool,
    sparsities: tuple[float, ...],
    no_what_if: bool,
    pattern: str,
    json_file: Path | None,
    trace: Path | None,
    plot: Path | None,
) -> None:
    wanted = () if no_what_if else sparsities or (0.8, 0.9)
    for value in wanted:
        if not 0 < value < 1:
            raise InputError(f"--what-if {value:g} is not a share of zeros between 0 and 1; write for example 0.8")
    if no_what_if and sparsities:
        raise InputError("--what-if and --no-what-if contradict each other; leave one out")
    _check_outputs(plan, data, {"--json": json_file, "--trace": trace, "--plot": plot})
    from nmcompile.profile import kind_of, machine, profile, what_if

    if wanted:
        kind_of(pattern)
    with terminal.Progress() as progress:
        progress("loading", 0, 1)
        session = open_session(plan, threads)
        feeds = [inputs(session, shape, data, tokenizer) for shape in shapes or (None,)]
        for feed in feeds:
            session.run(feed)  # what does not fit is told before anything is measured
        progress("measuring the machine", 0, 2)
        limits = machine(session)
        profiles = [profile(session, feed, runs=runs, progress=progress) for feed in feeds]
        progress("measuring the machine", 1, 2)
        limits = limits.or_better(machine(session))
        estimates = [what_if(item, limits, wanted, pattern, progress=progress) if wanted else [] for item in profiles]
    titles = [title(item, data) for item in profiles]
    content = to_json(plan, limits, profiles, estimates)
    if json_file == STDOUT:
        terminal.say_json(content)
    else:
        show(plan, limits, profiles, titles, estimates, steps)
    for path, text in ((json_file, _json_bytes(content)), (trace, _trace(trace, profiles, titles, limits)),
                       (plot, _plot(plot, profiles, titles, limits))):  # fmt: skip
        if path is not None and path != STDOUT:
            write(path, text)
            click.echo(f"wrote {path}", err=True)


def _check_outputs(plan: Path, data: Path | None, outputs: dict[str, Path | None]) -> None:
    """Everything that could keep the results from being written, before there are any."""
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None or (option == "--json" and path == STDOUT):
            continue
        if option == "--plot":
            from nmcompile.profile import plot

            plot.check(path)
        terminal.check_writable(path, plan, data)
        if other := seen.get(path.absolute()):
            raise InputError(f"{other} and {option} would both write {path}; give them different names")
        seen[path.absolute()] = option


def open_session(plan: Path, threads: int | None) -> Session:
    """The session of a CPU plan."""
    from nmcompile.session import load_cpu

    return load_cpu(plan, threads=threads)


def inputs(
    session: Session, shape: tuple[int, int | None] | None, data: Path | None = None, tokenizer: Path | None = None
) -> Arrays:
    """A batch of so many sequences and tokens, made up or the first of the data.

    shape None: one sequence, or what the model is fixed to. Without tokens: 128, or what its positions allow.
    InputError for sizes that the model does not take.
    """
    from nmcompile.bench import TOKENS
    from nmcompile.made_up import made_up

    for info in session.inputs:
        for axis, size in enumerate(shape or ()):
            fixed = info.shape[axis] if axis == 0 < len(info.shape) or len(info.shape) == 2 else None
            if isinstance(fixed, int) and size is not None and size != fixed:
                raise InputError(f"--shape asks for {size}, but the model takes {info}; that size is fixed")
    firsts = (info.shape[0] for info in session.inputs if info.shape)
    batch, tokens = shape or (next((size for size in firsts if isinstance(size, int)), 1), None)
    vocabulary, longest = session.limits()
    length = tokens or min([TOKENS, *([] if longest is None else [longest])])
    if data is None:
        return made_up(session.inputs, batch, length, vocabulary=vocabulary)
    from nmcompile.calibrate import open_data

    opened = open_data(data, session.inputs, tokenizer=tokenizer, max_length=length, batch=batch, limit=batch)
    return dict(next(iter(opened)))


def title(profile: Profile, data: Path | None) -> str:
    """What was run, in one line."""
    what = "made-up inputs" if data is None else data.name
    if not profile.padded:  # nothing on the engine
        return f"batch {profile.batch}, {what}"
    real = "" if profile.tokens == profile.padded else f" ({profile.tokens} of {profile.padded} are real)"
    return f"{profile.batch}x{profile.padded // max(1, profile.batch)} tokens{real}, {what}"


# ---- for people --------------------------------------------------------------------------------------------


def show(
    plan: Path, machine: Machine, profiles: Sequence[Profile], titles: Sequence[str],
    estimates: Sequence[Sequence[WhatIf]], steps: bool,
) -> None:  # fmt: skip
    """The tables on the terminal."""
    many = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    click.echo(f"{plan}: {machine.isa}, {many}; int8 peak {machine.int8_peak / 1e9:.0f} G MAC/s, "
               f"memory {machine.bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    for profile, head, items in zip(profiles, titles, estimates, strict=True):
        click.echo(f"\n{head}: {profile.seconds * 1e3:.3f} ms per run "
                   f"({profile.plain * 1e3:.3f} ms untraced; the faster half of {profile.runs})")  # fmt: skip
        if profile.workers < machine.threads:
            click.echo(f"the engine used {profile.workers} of {machine.threads} threads: there is little to share")
        if profile.preempted >= DISTURBED:
            click.echo(f"other processes took a core {profile.preempted:.1f} times per run; a quiet machine is faster")
        click.echo()
        _show_steps(profile, machine, steps)
        if items:
            click.echo()
            click.echo(_what_if_table(items))


def _show_steps(profile: Profile, machine: Machine, steps: bool) -> None:
    from nmcompile.profile import grouped

    rows = []
    for row in profile.rows if steps else grouped(profile.rows):
        what = [row.label, row.layers[0] if row.layers else ""] if steps else [row.label, f"x{row.count}"]
        rate = [f"{row.macs / row.seconds / 1e9:.1f}", terminal.percent(round(row.compute_share(machine), 2))]
        moved = [f"{row.bytes / row.seconds / 1e9:.1f}", terminal.percent(round(row.memory_share(machine), 2))]
        rows.append([*what, f"{row.seconds * 1e3:.3f}", terminal.percent(row.seconds / profile.seconds),
                     *(rate if row.macs and row.seconds > 0 else ["", ""]),
                     *(moved if row.bytes and row.seconds > 0 else ["", ""]), row.bound(machine)])  # fmt: skip
    idle = "waiting for other threads" if profile.workers > 1 else "between steps"
    for name, spent in ((idle, profile.waiting), ("outside the steps", profile.outside), ("total", profile.seconds)):
        rows.append([name, "", f"{spent * 1e3:.3f}", terminal.percent(spent / profile.seconds), *[""] * 5])
    header = ["step", "layer" if steps else "", "ms", "time", "G MAC/s", "peak", "GB/s", "memory", "bound"]
    click.echo(terminal.table(header, rows, right="234567" if steps else "1234567"))


def _what_if_table(items: Sequence[WhatIf]) -> str:
    rows = []
    full = {item.sparsity for item in items} - {item.sparsity for item in items if item.gains}  # nothing to gain
    for item in items:
        if item.sparsity in full:
            continue
        layers = f"linear {item.inputs} -> {item.outputs}" if item.inputs else "all linear layers"
        then = [f"{item.then * 1e3:.3f}", f"{item.model_then * 1e3:.3f}", f"{item.model_now / item.model_then:.2f}x"]
        rows.append([layers, f"x{item.count}", f"{item.pattern} {terminal.percent(item.sparsity)}",
                     f"{item.now * 1e3:.3f}", *(then if item.gains else ["", "", "as sparse already"])])  # fmt: skip
    header = ["what if", "", "zeros", "now ms", "then ms", "model ms", "speed-up"]
    lines = [terminal.table(header, rows, right="13456")] if rows else []
    lines += [
        f"what if {terminal.percent(value)} zeros: every linear layer is that sparse already" for value in sorted(full)
    ]
    return "\n".join(lines)


# ---- files ----------------------------------------------------------------------------------------------------


def to_json(
    plan: Path, machine: Machine, profiles: Sequence[Profile], estimates: Sequence[Sequence[WhatIf]]
) -> dict[str, Any]:
    """All figures: times in milliseconds, rates per second."""
    return {
        "plan": str(plan), "isa": machine.isa, "threads": machine.threads,
        "int8_peak_macs_per_second": round(machine.int8_peak), "memory_bytes_per_second": round(machine.bandwidth),
        "profiles": [
            {
                "batch": item.batch, "tokens": item.tokens, "padded_tokens": item.padded, "runs": item.runs,
                "threads_used": item.workers, "ms": _ms(item.seconds), "untraced_ms": _ms(item.plain),
                "waiting_ms": _ms(item.waiting), "outside_ms": _ms(item.outside),
                "preempted_per_run": round(item.preempted, 2),
                "steps": [_row_json(row, machine) for row in item.rows],
                "what_if": [
                    {"outputs": one.outputs or None, "inputs": one.inputs or None, "count": one.count,
                     "sparsity": one.sparsity, "pattern": one.pattern, "now_ms": _ms(one.now), "then_ms": _ms(one.then),
                     "model_ms": _ms(one.model_then), "gains": one.gains}
                    for one in found
                ],
            }
            for item, found in zip(profiles, estimates, strict=True)
        ],
    }  # fmt: skip


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _row_json(row: Row, machine: Machine) -> dict[str, Any]:
    return {
        "step": row.label, "kind": row.step.kind, "layer": row.step.layer or None, "ms": _ms(row.seconds),
        "tokens": row.tokens, "macs": row.macs, "bytes": row.bytes, "peak": round(row.compute_share(machine), 4),
        "memory": round(row.memory_share(machine), 4), "bound": row.bound(machine),
    }  # fmt: skip


def _json_bytes(content: object) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _trace(path: Path | None, profiles: Sequence[Profile], titles: Sequence[str], machine: Machine) -> bytes:
    from nmcompile.profile.chrome import trace_events

    return b"" if path is None else _json_bytes(trace_events(profiles, titles, machine))


def _plot(path: Path | None, profiles: Sequence[Profile], titles: Sequence[str], machine: Machine) -> bytes:
    from nmcompile.profile.plot import draw

    return b"" if path is None else draw(profiles, titles, machine, path.suffix.lower().lstrip("."))


