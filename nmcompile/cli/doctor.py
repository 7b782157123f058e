"""nmcompile doctor"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

import nmcompile
from nmcompile.cli import terminal
from nmcompile.errors import NmcompileError

UNTRIED = {  # kernels that have run on no machine of their kind
    "avxvnni": "never: no machine or emulator with AVX-VNNI was at hand; NMCOMPILE_ISA=avx2 takes tried ones",
    "dotprod": "under QEMU, on no Arm machine yet",
    "i8mm": "under QEMU, on no Arm machine yet",
}
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "ml_dtypes", "tokenizers")

HELP = """Show what nmcompile finds on this machine: versions, what the CPU can do, which kernels are chosen, and
whether onnxruntime's 8-bit products saturate on it, and whether TensorRT is there. It fails when the engine cannot run;
put its output into bug reports.

\b
  nmcompile doctor
  NMCOMPILE_ISA=avx2 nmcompile doctor      # are these kernels available here?
"""


@click.command("doctor", help=HELP, short_help="Show versions, CPU features, kernels, threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    facts: dict[str, object] = {
        "nmcompile": nmcompile.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
    }
    problem = _engine(facts)
    facts["onnxruntime INT8"] = onnxruntime_products()
    facts["tensorrt"] = tensorrt()
    if as_json:
        terminal.say_json(facts)
    else:
        rows = [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in facts.items()]
        width = max(len(key) for key, _ in rows)
        click.echo("\n".join(f"{key.ljust(width)}  {value}" for key, value in rows))
    if problem is not None:
        raise NmcompileError(problem)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical" if names else platform.processor() or "unknown"


def _engine(facts: dict[str, object]) -> str | None:
    """Adds what the engine says of itself; why it cannot run, or None."""
    try:
        from nmcompile import _native
    except ImportError as error:
        facts["engine"] = "cannot be loaded"
        return f"the engine cannot be loaded ({error}); install nmcompile again"
    facts["cpu features"] = _native.cpu_features()
    facts["kernels available"] = _native.available_isas()
    facts["threads"] = _native.default_threads()
    try:
        isa = _native.Program().isa
        facts["kernels chosen"] = isa
        if isa in UNTRIED:
            facts["kernels tried"] = UNTRIED[isa]
    except ValueError as error:
        facts["kernels chosen"] = "none"
        return f"NMCOMPILE_ISA={os.environ.get('NMCOMPILE_ISA', '')} does not work here: {error}"
    if "NMCOMPILE_ISA" in os.environ:
        facts["kernels chosen"] = f"{facts['kernels chosen']} (by NMCOMPILE_ISA)"
    return None


def onnxruntime_products() -> str:
    """Whether onnxruntime computes u8 x s8 products right on this CPU, and what to do where it does not."""
    try:
        from nmcompile.saturation import saturates

        if not saturates():
            return "exact"
        if saturates(exact=True):
            return "saturates, with session.x64quantprecision too; update onnxruntime"
    except Exception as error:  # an installation that is broken in any way is what doctor is for
        return f"not known, onnxruntime does not run ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ("saturates on this CPU (no VNNI), but not in nmcompile's sessions, which set session.x64quantprecision; "
            "set it where models from --emit-onnx run, or compile them with --reduce-range")  # fmt: skip


def tensorrt() -> str:
    """Which TensorRT and GPU there are, or what is lacking for an engine."""
    from nmcompile.backends.tensorrt.build import installed_version, probe

    found = installed_version()
    try:
        facts = probe(None)  # in a process of its own: it may crash
    except NmcompileError as error:
        return f"{found or 'not installed'}; {error}"
    if facts["tensorrt"] is None:
        return f"{facts['gpu']['name']}, but {facts['tensorrt_error']}"
    return f"{facts['tensorrt']} on {facts['gpu']['name']}"
