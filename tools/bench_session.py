"""What a CPU plan costs besides its kernels: loading, memory, threads, ragged batches.

    python tools/bench_session.py bert-base.plan

Each figure is a median; what is compared runs in alternation. Loading is measured in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import click
import numpy as np

import nmcompile
from nmcompile.session import load_cpu

FRESH = """
import json, sys, time
import numpy as np
import nmcompile
start = time.perf_counter()
session = nmcompile.load(sys.argv[1], threads=int(sys.argv[2]))
loaded = time.perf_counter()
session.run({info.name: np.ones((1, 128), info.dtype) for info in session.inputs})
done = time.perf_counter()
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([loaded - start, done - loaded, int(peak) / 1024]))
"""


@click.command()
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="per comparison")
def main(plan: Path, threads: int, seconds: float) -> None:
    """Print the figures of a plan that takes token ids and an attention mask."""
    runs = [fresh(plan, threads) for _ in range(5)]
    load, first, peak = (float(np.median([run[i] for run in runs])) for i in range(3))
    click.echo(f"load {load * 1e3:.0f} ms, first answer {first * 1e3:.0f} ms, peak memory {peak:.0f} MB")

    one, many = load_cpu(plan, threads=1), load_cpu(plan, threads=threads)
    if {info.name for info in one.inputs} > {"input_ids", "attention_mask", "token_type_ids"}:
        raise click.ClickException(f"{plan} takes other inputs than token ids and an attention mask")
    rng = np.random.default_rng(0)
    single = feeds(one, rng, np.array([128]))
    alone, shared = alternate([lambda: one.run(single), lambda: many.run(single)], seconds)
    ratio = f"{alone / shared:.2f}x"
    click.echo(f"1x128: {alone * 1e3:.2f} ms with 1 thread, {shared * 1e3:.2f} ms with {threads}: {ratio}")

    lengths = rng.integers(8, 129, 32)
    lengths[0] = 128
    full, ragged = feeds(many, rng, np.full(32, 128)), feeds(many, rng, lengths)
    whole, part = alternate([lambda: many.run(full), lambda: many.run(ragged)], seconds)
    share = lengths.sum() / (32 * 128)
    click.echo(
        f"32x128: {whole * 1e3:.1f} ms full, {part * 1e3:.1f} ms with {share:.0%} real tokens: "
        f"{part / whole / share:.2f} of their share"
    )


def fresh(plan: Path, threads: int) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(plan), str(threads)], check=True, capture_output=True, text=True
    )
    return [float(value) for value in json.loads(done.stdout)]


def feeds(session: nmcompile.Session, rng: np.random.Generator, lengths: np.ndarray) -> dict[str, np.ndarray]:
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = rng.integers(0, 1000, mask.shape)
    made = {"attention_mask": mask, "input_ids": ids, "token_type_ids": np.zeros(mask.shape)}
    return {info.name: made[info.name].astype(info.dtype) for info in session.inputs}


def alternate(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The median time of each, one call of each in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 5:
        for list_, call in zip(times, calls, strict=True):
            start = perf_counter()
            call()
            list_.append(perf_counter() - start)
    return [float(np.median(list_)) for list_ in times]


if __name__ == "__main__":
    main()
