"""The command line. `nmcompile MODEL -o PLAN` compiles; every other command is a file beside this one.

Commands import what they need when they run, so that --help and `run` start without onnx.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

import nmcompile
from nmcompile.errors import NmcompileError, NoDeviceError

COMMANDS = ("compile", "train", "inspect", "run", "bench", "profile", "compare", "check", "passes", "doctor",
            "build-engine")  # fmt: skip
DEFAULT = "compile"
NO_DEVICE = 3  # exit status where this machine lacks the GPU or TensorRT

HELP = """Prune, quantize and run exported Transformers.

Compile a model, with samples of its real inputs to take activation ranges from:

\b
  nmcompile model.onnx -o model.plan --calibration samples.npz

See what came out of it, how fast and how exact it is, and run it:

\b
  nmcompile inspect model.plan
  nmcompile bench model.plan --against model.onnx
  nmcompile profile model.plan --plot roofline.svg
  nmcompile compare model.onnx model.plan --data samples.npz
  nmcompile run model.plan --input x.npz --output y.npz

Let a model get used to its zeros, by unlabelled samples and the time that you have:

\b
  nmcompile train model.onnx -o sparse.onnx --data texts.jsonl --tokenizer tokenizer.json --sparsity 0.8 --budget 60m

The first line is short for `nmcompile compile MODEL`; its options are in `nmcompile compile --help`. In a program:
nmcompile.compile("model.onnx", "model.plan") and nmcompile.load("model.plan").run(feeds).
"""


class Group(click.Group):
    """Commands by name, loaded when used; a first word that is none is a model to compile."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"nmcompile.cli.{cmd_name.replace('-', '_')}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in own and args[0] not in COMMANDS:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        return guarded(lambda: super(Group, self).invoke(ctx))


def guarded(action: Callable[[], Any]) -> Any:
    """Run an action; what the user can mend becomes one line and exit status 1, or 3 where a device is lacking; Ctrl-C
    becomes one line and 130."""
    try:
        return action()
    except NmcompileError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(NO_DEVICE if isinstance(error, NoDeviceError) else 1)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)


def nearest_command(word: str) -> str | None:
    """The command that a word may have been meant as."""
    return next(iter(get_close_matches(word, COMMANDS, n=1)), None)


@click.group(cls=Group, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(nmcompile.__version__, prog_name="nmcompile")
def cli() -> None:
    pass


def main() -> None:
    """The entry point of the `nmcompile` command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes, and builders end
    cli(prog_name="nmcompile")
