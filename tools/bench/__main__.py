"""nmcompile next to the runtimes that people use, at their best forms of the same models.

    \b
    python -m tools.bench --output results                                    bert-base, 1x128, dense, 80 % and 90 %
    python -m tools.bench --output results --model bert-mini --shape 1x128 --shape 1x384 --peer deepsparse

Each peer is installed by pip into a virtual environment of its own (about 3 GB for all) under --environments, on first
use. Every contender runs in a process that stays alive and is stopped while others run; all are fed the same inputs.
Peers that cannot be installed or do not run are left out, and the results say why. Run it from the repository's root,
with Python 3.11 for all peers: DeepSparse has no newer wheels. Writes results.json, results.md, results.png.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from nmcompile import sparsity
from nmcompile.errors import NmcompileError

from . import report
from .encoder import MODELS, POSITIONS
from .environments import environment
from .models import Models
from .peers import OURS, PEERS, Form, Peer
from .protocol import PeerError
from .rounds import Contender, Measurement, Say, Settings, label, measure


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder of the results")
@click.option("--environments", type=click.Path(path_type=Path, file_okay=False), show_default=True,
              default=Path.home() / ".cache" / "nmcompile-bench", help="where peers are installed")  # fmt: skip
@click.option("--peer", "names", multiple=True, type=click.Choice([peer.name for peer in PEERS if peer.name != OURS]),
              help="repeat to choose; default all")  # fmt: skip
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=["bert-base"],
              show_default=True)  # fmt: skip
@click.option("--shape", "shapes", multiple=True, default=["1x128"], show_default=True, help="sequences x tokens")
@click.option("--sparsity", "shares", multiple=True, type=click.FloatRange(0, 1, max_open=True),
              default=[0.0, 0.8, 0.9], show_default=True, help="shares of zeros in linear layers")  # fmt: skip
@click.option("--pattern", default="2x4", show_default=True, help="blocks of our sparse plans, outputs x inputs")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="of each turn; three runs at least")  # fmt: skip
def main(
    output: Path, environments: Path, names: tuple[str, ...], models: tuple[str, ...], shapes: tuple[str, ...],
    shares: tuple[float, ...], pattern: str, threads: int, rounds: int, seconds: float,
) -> None:  # fmt: skip
    try:
        sparsity.parse_pattern(pattern)
        sizes = [parse_shape(text) for text in shapes]
        output.mkdir(parents=True, exist_ok=True)
        chosen = [with_pattern(peer, pattern) for peer in PEERS if peer.name == OURS or not names or peer.name in names]
        run(output, environments, chosen, models, sizes, sorted(set(shares)), Settings(threads, rounds, seconds))
    except (NmcompileError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def run(
    output: Path, environments: Path, peers: list[Peer], models: tuple[str, ...], shapes: list[tuple[int, int]],
    shares: list[float], settings: Settings,
) -> None:  # fmt: skip
    """Measure everything; the results so far are written after each model and shape."""
    start = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - start:6.0f} s] {text}", err=True)

    machine = {**report.machine(), "threads": settings.threads, "rounds": settings.rounds, "seconds": settings.seconds}
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        say(f"environment of {peer.name}")
        try:
            pythons[peer.name] = environment(peer, environments)
        except PeerError as error:
            missing[peer.name] = str(error)
    done: list[Measurement] = []
    for name in models:
        with TemporaryDirectory(prefix="nmcompile-bench-") as folder:
            files = Models(name, Path(folder))
            contenders, failed = prepare(name, files, peers, pythons, shares, say)
            for shape in shapes:
                found = measure(name, files, contenders, shape, settings, say)
                done.append(replace(found, left_out={**missing, **failed, **found.left_out}))
                table = report.write(output, done, shares, machine)
    why = report.plot(output, table)
    click.echo((output / "results.md").read_text())
    if why:
        click.echo(why, err=True)


def prepare(
    name: str, files: Models, peers: list[Peer], pythons: dict[str, Path], shares: list[float], say: Say
) -> tuple[list[Contender], dict[str, str]]:
    """Contenders whose files could be written, and why the others could not."""
    contenders: list[Contender] = []
    failed: dict[str, str] = {}
    for peer in peers:
        for form in peer.forms if peer.name in pythons else ():
            for share in shares if form.pattern else [0.0]:
                say(f"{name}: writing {label(peer.name, form.name, share)}")
                python = pythons[peer.name]
                try:
                    paths = files.files(peer, form, share, python)
                except PeerError as error:
                    failed[label(peer.name, form.name, share)] = str(error)
                    continue
                contenders.append(Contender(peer, form, share, python, paths, files.float_model(form.pattern, share)))
    return contenders, failed


def with_pattern(peer: Peer, pattern: str) -> Peer:
    """Ours with the pattern that was asked for; a peer keeps the one that it is best at."""
    if peer.name != OURS:
        return peer
    return replace(peer, forms=tuple(Form(form.name, pattern, form.candidates) for form in peer.forms))


def parse_shape(text: str) -> tuple[int, int]:
    """ "32x128" -> (32, 128). NmcompileError."""
    batch, _, tokens = text.partition("x")
    if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and 0 < int(tokens) <= POSITIONS):
        raise NmcompileError(f"--shape {text!r} is not of the form 1x128, with at most {POSITIONS} tokens")
    return int(batch), int(tokens)


if __name__ == "__main__":
    main()
