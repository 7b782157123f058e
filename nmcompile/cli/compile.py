"""nmcompile MODEL -o PLAN"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmcompile.cli import NO_DEVICE, engine, nearest_command, recipe, terminal
from nmcompile.errors import NmcompileError

if TYPE_CHECKING:
    from nmcompile.compiler import Result
    from nmcompile.fallback import Held
    from nmcompile.lengths import Look

NOTES = 10  # that the summary shows
KINDS = {
    "fuse-layer-norm": "normalizations",
    "fuse-gelu": "GELU",
    "fuse-attention": "attention",
    "canonicalise-embeddings": "embeddings",
}

HELP = """Compile an ONNX model to a plan.

\b
  nmcompile model.onnx -o model.plan --calibration samples.npz
  nmcompile model.onnx -o model.plan --calibration texts.jsonl --tokenizer tokenizer.json
  nmcompile model.onnx -o model.plan --sparsity 0.8 --pattern 2x4 --calibration samples.npz
  nmcompile model.onnx -o model.plan --sparsity 0.6 --pattern 1x4 --max-drop cosine=0.05 --calibration samples.npz
  nmcompile model.onnx -o model.plan --passes "block-prune(block=4x4, sparsity=0.9, exclude=*pooler*)"
  nmcompile model.onnx -o model.plan --recipe recipe.toml --report report.json
  nmcompile model.onnx -o model.plan --target tensorrt --shapes 1x8,8x128,32x384 --calibration samples.npz

Without --sparsity, --pattern, --size and --passes nothing is pruned; zeros that the model has already are used all the
same. With calibration data, what is left of the weights is fitted to what the dense model computes (some 25 minutes
for BERT-base on two cores; --fast: less). It costs accuracy all the same: the summary says how much, --max-drop bounds
it. Calibration data are samples of the model's real inputs: .npz with one array per input, a folder of such, or
.jsonl with {"input_ids": [...]} or {"text": "..."} per line.
For TensorRT,
2:4 zeros are the default; a sparse and a dense engine are timed and the faster is kept (--pattern dense: no zeros).
Without a GPU, graphs and a recipe are written for `nmcompile build-engine` elsewhere, and the exit status is 3.
A recipe holds these options by their long names:

\b
  sparsity = 0.8
  pattern = "2x4"
  calibration = "samples.npz"      # relative to the recipe
"""


@click.command("compile", help=HELP, short_help="Compile an ONNX model to a plan (the default command).")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PLAN", help="The plan to write.")
@click.option("--target", type=click.Choice(["cpu", "tensorrt"]), default="cpu", show_default=True,
              help="What the plan runs on.")  # fmt: skip
@click.option("--preset", type=click.Choice(["default", "fast"]), default="default", show_default=True,
              help="fast: fewer samples, a quicker solver, ranges without search.")  # fmt: skip
@click.option("--passes", metavar="SPEC", help="Passes between canonical form and quantization; see passes.")
@click.option("--sparsity", type=float, metavar="S", help="Share of weights to zero, for example 0.8.")
@click.option("--pattern", metavar="PATTERN",
              help="Shape of the zeros: 2x4 (outputs x inputs), 2:4, unstructured; dense: none.")
@click.option("--size", metavar="SHARE", help="Size of the plan, 0.25x the model's, instead of --sparsity.")
@click.option("--solver", type=click.Choice(["magnitude", "wanda", "obs", "admm"]),
              help="Which weights go, and what the others become. Default: admm with data, else magnitude.")
@click.option("--fast", is_flag=True, help="The same as --preset fast.")
@click.option("--train", metavar="TIME", help="After pruning train on all of --calibration, in 10m or 1.5h altogether.")
@click.option("--max-drop", metavar="METRIC=VALUE", help="Let layers go back to dense and float, worst first, until "
              "cosine=0.01, kl=0.05, top1=0.02 or score.py:function=0.5 holds on held-out samples.")  # fmt: skip
@click.option("--checkpoints", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep finished stages of pruning here; run again, it goes on from them.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="DATA", help="Samples: .npz, .jsonl, folder.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="PATH", help="tokenizer.json, for texts.")
@click.option("--max-length", type=int, metavar="N",
              help="Tokens of a sample at most; arrays are not cut.  [default: 128]")  # fmt: skip
@click.option("--attention", type=click.Choice(["int8", "float"]),
              help="Whether queries, keys and values are quantized. Default: int8, for TensorRT float.")  # fmt: skip
@click.option("--reduce-range", is_flag=True,
              help="Weights of 7 bits: onnxruntime runs the ONNX of --emit-onnx right on CPUs without VNNI too.")
@click.option("--tuning", type=click.Path(path_type=Path), metavar="FILE",
              help="Kernel times to choose by, of any machine; measured and written if there is none.")  # fmt: skip
@click.option("--no-tune", is_flag=True, help="Time nothing; choose kernels by the shipped cost model.")
@click.option("--recipe", "recipe_", type=click.Path(path_type=Path), metavar="FILE", is_eager=True,
              callback=recipe.as_defaults, help="Options from a .toml file; the command line wins.")  # fmt: skip
@click.option("--emit-onnx", type=click.Path(path_type=Path), metavar="OUT", help="Write the quantized model as ONNX.")
@click.option("--verify", is_flag=True, help="Run the model before and after each pass that must not change it.")
@click.option("--require", type=click.Choice(["native"]), help="Fail unless all of the model runs on the engine.")
@click.option("--report", type=click.Path(path_type=Path), metavar="OUT", help="Write everything known as JSON.")
@click.option("--dump-text", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph as text by pass.")
@engine.options
@click.option("--measure/--no-measure", default=True, help="Compare the plan with the model (on by default).")
def command(model: Path, output: Path | None, emit_onnx: Path | None, report: Path | None, dump_text: Path | None,
            calibration: Path | None, tuning: Path | None, no_tune: bool, fast: bool,
            **options: Any) -> None:  # fmt: skip
    check_model(model)
    if no_tune and tuning is not None:
        raise click.UsageError("give either --tuning or --no-tune, not both")
    if output is None and emit_onnx is None and report is None and dump_text is None:
        raise click.UsageError("say what to write: -o PLAN (or --emit-onnx, --report, --dump-text)")
    with terminal.Progress() as progress:
        progress("starting", 0, 1)
        import nmcompile
        from nmcompile.observers import dump_text as dumper

        del options["recipe_"]
        for_engine = engine.taken(options, options["target"])
        if fast:
            options["preset"] = "fast"
        result = nmcompile.compile(
            model, output, emit_onnx=emit_onnx, report=report, progress=progress, calibration=calibration,
            tuning="off" if no_tune else tuning, engine=for_engine,
            observers=[] if dump_text is None else [dumper(dump_text)], **options)  # fmt: skip
    if result.synthetic:
        terminal.warn(
            "NO CALIBRATION DATA: activation ranges come from made-up inputs and are not to be trusted; "
            "give samples of the model's real inputs with --calibration"
        )
    click.echo("\n".join(summary(model, result)))
    if for_engine is not None and for_engine.build and result.engine is not None and not result.engine.built:
        sys.exit(NO_DEVICE)


def check_model(model: Path) -> None:
    if not _exists(model):
        near = nearest_command(str(model))
        hint = f"; for the command: nmcompile {near}" if near else "; see nmcompile --help"
        raise NmcompileError(f"there is no model {model}{hint}")
    if model.is_file() and model.open("rb").read(2) == b"PK":
        raise NmcompileError(f"{model} is a plan or another zip archive, not an ONNX model; "
                             f"to look into a plan: nmcompile inspect {model}")  # fmt: skip


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than any file's
        return False


def summary(model: Path, result: Result) -> Iterator[str]:
    """What the compiler did, for people."""
    yield f"{model} -> {result.plan or 'no plan'}, {result.seconds:.1f} s"
    matched = {KINDS.get(name, name): report.detail["matched"]
               for name, report, _ in result.passes if "matched" in report.detail}  # fmt: skip
    if matched:
        yield f"  matched   {', '.join(f'{kind} {share}' for kind, share in matched.items())}"
    if result.segments == () and any("verdict" in layer for layer in result.layers):
        yield from _titled("layers", engine.layers(result))
    else:
        yield from _titled("layers", _layers(result))
        yield from _titled("segments", _segments(result))
        yield from _titled("native", _native(result))
    for title, lines in engine.summary(result):
        yield from _titled(title, lines)
    if "plan" in result.sizes:
        from nmcompile.compiler import model_bytes

        before, after = model_bytes(model), result.sizes["plan"]
        yield f"  size      {terminal.size(after)}, {after / before:.0%} of the model's {terminal.size(before)}"
    if "qdq_onnx" in result.sizes:
        yield f"  onnx      {terminal.size(result.sizes['qdq_onnx'])}, quantized"
    if result.loss:
        samples = "samples that calibration did not see" if result.held_out else result.measured_on
        samples += ", those that the limit was held by" if result.held_out and result.chosen_by else ""
        samples = "MADE-UP SAMPLES, not real ones" if result.synthetic else samples
        what = "plan" if result.engine is None else "graph in onnxruntime"
        yield f"  loss      {what} against model, on {samples}"
        yield from (f"            {line}" for line in terminal.differences(result.loss).splitlines())
    if result.held is not None:
        yield from _titled("held", _held(result.held))
    if result.lengths is not None:
        yield from _titled("lengths", _lengths(result.lengths))
    told = () if result.lengths is None else result.lengths.notes
    notes = [note for note in result.notes if not note.startswith("no calibration data") and note not in told]
    shown = [note if len(note) <= 160 else f"{note[:157]}..." for note in notes[:NOTES]]
    if len(notes) > NOTES:
        shown.append(f"... and {len(notes) - NOTES} more; --report writes all of them")
    yield from _titled("notes", shown)


def _titled(title: str, lines: list[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        yield f"  {title if index == 0 else '':10}{line}"


def _layers(result: Result) -> list[str]:
    """How many layers run on which kernel, and why sparse ones run dense or quantized ones in float."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for layer in result.layers:
        sparse, by = layer["pattern"] != "dense", layer.get("chosen_by", "")
        why = ""
        if layer["precision"] == "int8" and layer["kernel"] == "dense" and sparse:
            why = "; dense is faster here than its sparse kernels"
        elif layer["precision"] != "int8" and by:
            why = "; float is faster here than INT8"
        why += " (by the cost model)" if why and by != "measured" else ""
        key = (str(layer["precision"]), str(layer["kernel"]), str(layer["pattern"]), why)
        groups.setdefault(key, []).append(float(layer["density"]))
    lines = []
    for (precision, kernel, pattern, why), shares in groups.items():
        density = terminal.percent(sum(shares) / len(shares))
        zeros = "dense weights" if pattern == "dense" else f"pattern {pattern}, density {density}"
        lines.append(f"{len(shares)} x {precision}, kernel {kernel}, {zeros}{why}")
    return lines or ["none on the engine"]


def _held(held: Held) -> list[str]:
    """What it took to stay within --max-drop."""
    apart = f" ({held.drop_apart:.4g} on samples kept from the search)" if held.drop_apart is not None else ""
    lines = [f"{held.metric} drops by {held.drop:.4g}{apart}, {held.limit:g} is allowed"]
    for kind, names in (("dense again", held.dense), ("left in float", held.floating)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"{len(names)} layers {kind}, those that add most noise: {', '.join(names[:4])}{more}")
    return lines if len(lines) > 1 else [f"{lines[0]}: no layer had to go back"]


def _native(result: Result) -> list[str]:
    """What share of the model's work the engine does."""
    found = result.coverage
    if found is None or not found.layers + found.multiply_adds:
        return []
    line = f"{found.native_layers} of {found.layers} linear layers"
    if not found.multiply_adds:
        return [line]
    share = terminal.percent(found.native_multiply_adds / found.multiply_adds)
    return [f"{line}, {share} of the multiply-adds of a sample"]


def _lengths(look: Look) -> list[str]:
    """Whether more is lost where inputs are longer or shorter than calibration's."""
    if look.skipped:
        return [f"at no others than calibration's: {look.skipped}"]
    if look.notes:
        more = [f"... and {len(look.notes) - NOTES} more; --report writes all of them"]
        return [*look.notes[:NOTES], *(more if len(look.notes) > NOTES else [])]
    at = ", ".join(str(item.length) for item in look.seen)
    least, most = look.calibrated
    usual = least if least == most else f"{least} to {most}"
    return [f"at {at} tokens no more is lost than at the {usual} of the data"]


def _segments(result: Result) -> list[str]:
    if result.native:
        return ["1 native: the whole model runs on the engine"]
    kinds = Counter(str(segment["kind"]) for segment in result.segments)
    lines = [", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"]
    for segment in result.segments:
        if segment["kind"] != "native":
            time = f"{segment['milliseconds']:.3g} ms for a batch of samples, " if "milliseconds" in segment else ""
            lines.append(f"onnxruntime: {time}{segment['nodes']} nodes ({', '.join(segment['operators'])})")
    return [*lines[: NOTES + 1], *([f"... and {len(lines) - NOTES - 1} more"] if len(lines) > NOTES + 1 else [])]
