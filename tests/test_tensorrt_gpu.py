"""On a machine with an NVIDIA GPU and TensorRT: engines are built, run, and agree with their graphs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nmcompile
from nmcompile import ir as g
from nmcompile.backends.tensorrt.build import probe, read_description
from nmcompile.backends.tensorrt.recipe import EngineOptions
from nmcompile.compare import Comparison
from nmcompile.errors import NmcompileError
from tools.bench.encoder import OUTPUT, Shape, encoder
from tools.bench_tensorrt import LEAST_COSINE, feeds

WIDE = Shape(2, 768)  # large enough for sparse products to pay


@cache
def lacking() -> str:
    """Why there is no engine to build here, "" if there is."""
    try:
        facts = probe(None)
    except NmcompileError as error:
        return str(error)
    return "" if facts["tensorrt"] else str(facts["tensorrt_error"])


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(lacking()), reason=lacking())]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The engine, its graphs beside it, and its description."""
    folder = tmp_path_factory.mktemp("engine")
    nmcompile.compile(
        encoder(WIDE), folder / "m.plan", target="tensorrt", calibration=[feeds(2, 128, seed) for seed in range(4)],
        solver="magnitude", emit_onnx=folder / "kept.onnx", engine=EngineOptions(shapes=("1x8,32x128,32x384",)),
    )  # fmt: skip
    facts = read_description(folder / "m.plan")
    assert facts is not None
    return folder, facts


def test_the_engine_agrees_with_its_graph(built: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built
    session, graph = nmcompile.load(folder / "m.plan"), g.load(folder / "kept.onnx")
    reference, comparison = g.runner(graph), Comparison(g.outputs(graph))
    for batch, tokens in ((1, 8), (3, 77), (32, 128), (2, 384)):
        inputs = feeds(batch, tokens, 9)
        comparison.add(reference(inputs), session.run(inputs))
    assert comparison.differences()[OUTPUT].cosine > LEAST_COSINE


def test_all_pruned_layers_are_eligible_and_some_run_sparse(built: tuple[Path, dict[str, Any]]) -> None:
    sparse = built[1]["variants"]["sparse"]
    assert len(sparse["eligible"]) > 0 and len(sparse["chosen"]) > 0


def test_a_session_refuses_what_the_engine_was_not_built_for(built: tuple[Path, dict[str, Any]]) -> None:
    session = nmcompile.load(built[0] / "m.plan")
    with pytest.raises(NmcompileError, match="build it with other --shapes"):
        session.run(feeds(33, 8))
    with pytest.raises(NmcompileError, match="the model takes"):
        session.run({"input_ids": np.zeros((1, 8), np.int64)})
