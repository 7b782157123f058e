"""Flags and fixtures of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from onnx_text import read_golden

if TYPE_CHECKING:
    from fake_tensorrt import Script
    from tensorrt_work import Work

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what is found")
    parser.addoption("--big", action="store_true", help="run tests marked big: gigabytes of disk, a minute or more")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch: tests run side by side
    config.addinivalue_line("markers", "big: needs gigabytes of disk or memory; runs with --big only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--big"):
        return
    for item in items:
        if "big" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="runs with --big only"))


@pytest.fixture(autouse=True, scope="session")
def untimed() -> Iterator[None]:
    """Tests compile with the cost model unless they say otherwise: none depends on how fast the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmcompile.compiler.DEFAULT_TUNING", "off")
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """`assert text == golden("fuse_gelu/exact")` compares with tests/golden/fuse_gelu/exact.txt."""
    update = bool(request.config.getoption("--update-golden"))
    return lambda name: read_golden(GOLDEN / f"{name}.txt", update)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """tokenizer.json of the small vocabulary in accuracy_cases."""
    from accuracy_cases import words_tokenizer

    words_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


# ---- TensorRT's builder, with fakes ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fake CUDA driver, compiled."""
    from fake_tensorrt import cuda_driver

    return cuda_driver(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def work(driver: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Work]:
    """`work(script, *options, **changes of the recipe)`."""
    from tensorrt_work import Work, write_recipe

    def run(script: Script, *options: str, **changes: Any) -> Work:
        recipe = write_recipe(tmp_path, **{"version": script.profile, **changes})
        return Work(recipe, script, driver, monkeypatch, *options)

    return run
