"""Commands that make data: python -m tools.accuracy corpus."""

from __future__ import annotations

from pathlib import Path

import click

from nmcompile.cli import guarded
from tools.accuracy import corpus as collected


@click.command(context_settings={"max_content_width": 120})
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="JSON lines to write.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only N paragraphs.")
@click.option("--packages", metavar="A,B,...", help="Only these sources.")
@click.option("--exclude", default=",".join(collected.EVALUATED), show_default=True, help="Packages to leave out.")
@click.option(
    "--folder",
    "folders",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Another site-packages folder to read; may be repeated.",
)
@click.option(
    "--most", type=click.IntRange(1), default=collected.MOST_OF_ONE, show_default=True, help="Paragraphs of one source."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="tokenizer.json: count tokens too.")
def corpus(
    output: Path, limit: int | None, packages: str | None, exclude: str, folders: tuple[Path, ...], most: int,
    seed: int, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Collect English paragraphs without labels to train on, none of which the evaluations ask for."""

    def collect() -> None:
        names = [word for word in packages.split(",") if word] if packages else None
        left_out = [word for word in exclude.split(",") if word]
        found = collected.gather(names, left_out, limit, seed, collected.Roots(folders), most)
        collected.write(output, found)
        click.echo(collected.sources(found))
        if tokenizer is not None:
            click.echo(f"{collected.tokens(found, tokenizer):,} tokens")

    guarded(collect)
