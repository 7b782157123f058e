"""Fuzz one reader, or all of them, for some minutes.

    python -m tools.fuzz plans --minutes 60
    python -m tools.fuzz all --minutes 10 --folder findings
    python -m tools.fuzz plans --seed 1234            # one input again, in this process
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

from tools.fuzz.runner import fuzz
from tools.fuzz.targets import TARGETS


def main() -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TARGETS, "all"]
    parser.add_argument("target", choices=names, help="; ".join(f"{t.name}: {t.about}" for t in TARGETS.values()))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--first", type=int, default=None, help="the first seed (default: the time)")
    parser.add_argument("--seed", type=int, default=None, help="try this one alone, without a process around it")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="for inputs that found something")
    options = parser.parse_args()
    chosen = list(TARGETS.values()) if options.target == "all" else [TARGETS[options.target]]
    if options.seed is not None:
        now = options.folder / f"{chosen[0].name}-now"
        now.mkdir(parents=True, exist_ok=True)
        print(chosen[0].prepare(options.folder / f"{chosen[0].name}-made")(options.seed, now))
        return 0
    first = int(time.time()) * 1000 if options.first is None else options.first
    total = 0
    for target in chosen:
        findings = fuzz(target, itertools.count(first), options.folder, time.monotonic() + 60 * options.minutes)
        shown = ", ".join(f"{count} {outcome}" for outcome, count in findings.outcomes.most_common())
        print(f"{target.name}: {findings.runs} runs from seed {first} on: {shown}; {findings.megabytes} MB at most; "
              f"{len(findings.found)} findings")
        for seed, what in findings.found:
            print(f"  {target.name} --seed {seed}: {what}")
        total += len(findings.found)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
