"""The command line as a whole: routing, light starts, errors as one line."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from nmcompile.cli import COMMANDS, cli

MODEL = Path(__file__).parents[1] / "models" / "distilbert-dynamo.onnx"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "small.plan"
    result = invoke(MODEL, "-o", path, "--preset", "fast", "--no-measure")
    assert result.exit_code == 0, result.output
    return path


def test_help_lists_every_command_and_says_how_to_start() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert "nmcompile model.onnx -o model.plan --calibration" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"nmcompile {name if name != 'compile' else 'model.onnx'}" in result.stdout


def loaded_by(*words: object) -> set[str]:
    code = (
        "import sys\nfrom nmcompile.cli import main\nsys.argv = ['nmcompile', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('MODULES', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    return set(done.stderr.partition("MODULES")[2].split())


def test_help_starts_light() -> None:
    assert not loaded_by("--help") & {"onnx", "onnx_graphsurgeon", "onnxruntime", "numpy.testing", "rich"}


def test_run_needs_no_onnx(plan: Path, tmp_path: Path) -> None:
    import numpy as np

    ids = np.ones((1, 4), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=ids)
    modules = loaded_by("run", plan, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz")
    assert "nmcompile.session" in modules
    assert not modules & {"onnx", "onnx_graphsurgeon", "onnxruntime", "rich", "nmcompile.compiler"}


def test_options_may_come_before_the_model(tmp_path: Path) -> None:
    result = invoke("--preset", "fast", "--no-measure", "-o", tmp_path / "m.plan", MODEL)
    assert result.exit_code == 0 and (tmp_path / "m.plan").exists()


def test_the_command_may_be_named(tmp_path: Path) -> None:
    assert invoke("compile", MODEL, "-o", tmp_path / "m.plan", "--preset", "fast", "--no-measure").exit_code == 0


def test_usage_errors_exit_2() -> None:
    for words in (("run",), (MODEL, "--nonsense"), (MODEL,), ("bench", "x.plan", "--shape", "1y2")):
        assert invoke(*words).exit_code == 2


NOT_ONNX = b"this is no model at all\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nosuch.onnx", "-o", "x.plan"), "there is no model nosuch.onnx"),
        (("bnech", "-o", "x.plan"), "nmcompile bench"),
        (("bnech",), "nmcompile bench"),
        (("junk.onnx", "-o", "x.plan"), "junk.onnx is not an ONNX model"),
        (("PLAN", "-o", "x.plan"), "nmcompile inspect"),
        (("MODEL", "-o", "nosuch/x.plan"), "no folder"),
        (("MODEL", "-o", "."), "is a folder"),
        (("copy.onnx", "-o", "copy.onnx"), "are the same file"),
        (("MODEL", "-o", "x.plan", "--emit-onnx", "x.plan"), "are the same file"),
        (("MODEL", "-o", "x.plan", "--report", "nosuch/r.json"), "no folder"),
        (("MODEL", "-o", "x.plan", "--passes", "blok-prune"), "did you mean 'block-prune'"),
        (("MODEL", "-o", "x.plan", "--passes", "block-prune(sparsty=0.5)"), "did you mean 'sparsity'"),
        (("MODEL", "-o", "x.plan", "--sparsity", "1.5"), "not a share of zeros"),
        (("MODEL", "-o", "x.plan", "--pattern", "2by4"), "2by4"),
        (("MODEL", "-o", "x.plan", "--calibration", "nosuch.npz"), "do not exist"),
        (("MODEL", "-o", "x.plan", "--target", "tensorrt", "--shapes", "1x8,2x8,4x8"),
         "target tensorrt needs calibration data; give samples"),
        (("MODEL", "-o", "x.plan", "--target", "tensorrt"), "has free sizes, for which an engine is made: give --s"),
        (("MODEL", "-o", "x.plan", "--target", "tensorrt", "--shapes", "8x128"), "are not min,opt,max; write for"),
        (("MODEL", "-o", "x.plan", "--target", "tensorrt", "--workspace", "much"), "'much' is not a size; write for"),
        (("MODEL", "-o", "x.plan", "--recipe", "nosuch.toml"), "cannot read the recipe"),
        (("inspect", "nosuch.plan"), "cannot read nosuch.plan"),
        (("inspect", "junk.onnx"), "not an ONNX model"),
        (("inspect", "cut.plan"), "cut.plan"),
        (("run", "MODEL", "--input", "x.npz"), "is not a plan"),
        (("run", "PLAN", "--input", "nosuch.npz"), "cannot read nosuch.npz"),
        (("run", "PLAN", "--input", "junk.onnx"), "numpy.savez"),
        (("run", "PLAN", "--input", "empty.npz"), "input 'input_ids' is missing"),
        (("run", "PLAN", "--input", "empty.npz", "--output", "nosuch/y.npz"), "no folder"),
        (("run", "PLAN", "--input", "empty.npz", "--threads", "0"), "threads=0"),
        (("compare", "MODEL", "nosuch.plan"), "cannot read nosuch.plan"),
        (("compare", "MODEL", "CNN"), "takes"),
        (("compare", "MODEL", "PLAN", "--data", "nosuch.npz"), "do not exist"),
        (("bench", "nosuch.plan"), "cannot read nosuch.plan"),
        (("bench", "junk.onnx", "--seconds", "0.1"), "onnxruntime cannot open"),
        (("bench", "PLAN", "--against", "CNN", "--seconds", "0.1"), "not the same model"),
        (("bench", "PLAN", "--shape", "1x1000", "--seconds", "0.1"), "63"),
        (("bench", "PLAN", "--threads", "0"), "threads"),
        (("passes", "fuse-gleu"), "did you mean fuse-gelu?"),
        (("check", "nosuch.onnx"), "there is no model"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    words: tuple[str, ...], said: str, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    for name in ("PATIENCE", "PLAIN_EVERY"):  # a busy machine would be told how far it is
        monkeypatch.setattr(f"nmcompile.cli.terminal.{name}", 3600.0)
    Path("junk.onnx").write_bytes(NOT_ONNX)
    Path("copy.onnx").write_bytes(MODEL.read_bytes())
    Path("cut.plan").write_bytes(plan.read_bytes()[:5000])
    np.savez("empty.npz")
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    named = {"MODEL": MODEL, "PLAN": plan, "CNN": MODEL.with_name("cnn.onnx")}
    result = invoke(*(named.get(word, word) for word in words))
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.exit_code == 1, result.output
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], result.stderr
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == before


def raising(error: BaseException) -> click.Command:
    def act() -> None:
        raise error

    return click.Command("doctor", callback=act)


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("nmcompile.cli.doctor"), "command", raising(KeyboardInterrupt()))
    result = invoke("doctor")
    assert result.exit_code == 130 and result.stderr == "interrupted\n"


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("nmcompile.cli.doctor"), "command", raising(ZeroDivisionError("ours")))
    assert isinstance(invoke("doctor").exception, ZeroDivisionError)
