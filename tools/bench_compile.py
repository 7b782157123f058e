"""How long compiles take: this checkout beside another one, in turns, each in a process of its own.

    python -m tools.bench_compile model.onnx -- --sparsity 0.5 --pattern 2x4
    python -m tools.bench_compile model.onnx --against ../old/.venv/bin/nmcompile --rounds 3 --calibration samples.npz

What stands behind -- goes to every compile as it is; kernels are chosen by the cost model, which times nothing. The
other checkout needs an environment of its own in which it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = str(Path(sys.executable).with_name("nmcompile"))


def seconds(command: Sequence[str]) -> float:
    """Of one run, the start of the interpreter included; RuntimeError with what it said where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ends with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", metavar="NMCOMPILE", help="the command of the other checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calibration", type=Path, help="samples; without them they are made up")
    own, given = (sys.argv[1:], []) if "--" not in sys.argv else (
        sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :])  # fmt: skip
    options = parser.parse_args(own)
    commands = [HERE, *([] if options.against is None else [options.against])]
    samples = [] if options.calibration is None else ["--calibration", str(options.calibration)]
    times: dict[str, list[float]] = {command: [] for command in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for command in commands:
                plan = str(Path(folder) / "m.plan")
                words = [str(options.model), "-o", plan, "--no-tune", *samples, *given]
                times[command].append(seconds([command, *words]))
    for command, found in times.items():
        print(f"{statistics.median(found):8.2f} s  ({min(found):.2f} to {max(found):.2f})  {command}")
    if options.against is not None:
        ratios = [one / other for one, other in zip(times[HERE], times[options.against], strict=True)]
        print(f"{statistics.median(ratios):8.2f} x  this one over the other, median of {len(ratios)} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
