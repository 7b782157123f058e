"""What is asked of a compile: in groups or by name, the same."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from compiled import MODELS, feeds, held_of

import nmcompile
from nmcompile import ir as g
from nmcompile.accuracy import Reference
from nmcompile.calibrate import Calibration, open_data
from nmcompile.contract import Pass, Report
from nmcompile.errors import PassError
from nmcompile.options import ControlOptions, DataOptions, Named, Options, PruneOptions
from nmcompile.plan import read_plan
from nmcompile.recipes import PRESETS
from nmcompile.sizes import sparsity_for
from nmcompile.spec import parse_spec
from nmcompile.stages import Keep, PrunePasses, Runner, canonicalise, prune, quantize
from nmcompile.targets import CpuTarget

BERT = MODELS / "bert-torchscript.onnx"
T5 = MODELS / "t5-torchscript.onnx"  # a part of it runs on onnxruntime


# ---- options -------------------------------------------------------------------------------------------------------


def test_every_option_has_one_name_and_one_group() -> None:
    groups = fields(Options)[1:]
    named = [item.name for group in groups for item in fields(getattr(Options(), group.name))]
    assert sorted([*named, "preset"]) == sorted(Named.__annotations__)


def test_options_by_name_go_into_their_groups() -> None:
    asked = Options(prune=PruneOptions(pattern="2x4")).having(
        {"sparsity": 0.5, "preset": "fast", "max_drop": "cosine=0.1"})  # fmt: skip
    assert asked.prune == PruneOptions(pattern="2x4", sparsity=0.5) and asked.preset == "fast"
    assert asked.control == ControlOptions(max_drop="cosine=0.1") and asked.data == DataOptions()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        nmcompile.compile(BERT, None, sparsty=0.5)  # type: ignore[call-arg]
    with pytest.raises(PassError, match="give either a size or a sparsity"):
        Options().having({"sparsity": 0.5, "size": "0.5x"})


def test_passes_given_once_are_kept() -> None:
    asked = PruneOptions(passes=iter(parse_spec("block-prune, smooth-activations")))
    assert isinstance(asked.passes, tuple) and len(asked.passes) == 2


def test_groups_and_names_give_the_same_plan(tmp_path: Path) -> None:
    nmcompile.compile(BERT, tmp_path / "a.plan", sparsity=0.5, preset="fast", measure=False)
    nmcompile.compile(BERT, tmp_path / "b.plan", Options("fast", PruneOptions(sparsity=0.5)), measure=False)
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


# ---- stages and products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [BERT, T5])
def test_a_plan_in_memory_is_what_its_file_would_be(model: Path, tmp_path: Path) -> None:
    source, target = g.load(model), CpuTarget()
    runner = Runner(Calibration(open_data(feeds(model), g.inputs(source))))
    pruned = prune(canonicalise(source, runner), PrunePasses(), runner)
    scheme = target.scheme(PRESETS["fast"])
    product = target.lower(quantize(pruned, scheme, runner), runner)
    product.write(tmp_path / "m.plan")
    written, held = read_plan(tmp_path / "m.plan"), product.plan
    assert held.header == written.header and held.blob_names == written.blob_names
    assert held.size == (tmp_path / "m.plan").stat().st_size
    assert set(held.arrays) == set(written.arrays)
    assert all(held.arrays[name].tobytes() == array.tobytes() for name, array in written.arrays.items())
    assert all(held.blobs(name) == written.blobs(name) for name in written.blob_names)
    batch = next(feeds(model))
    first, second = product.run(batch), nmcompile.load(tmp_path / "m.plan").run(batch)
    assert all(first[name].tobytes() == values.tobytes() for name, values in second.items())


def test_a_stage_changes_nothing_of_those_before_it() -> None:
    source, target = g.load(BERT), CpuTarget()
    runner = Runner(Calibration(open_data(feeds(BERT), g.inputs(source))))
    texts = [g.to_text(source)]
    canonical = canonicalise(source, runner)
    texts.append(g.to_text(canonical.graph))
    pruned = prune(canonical, PrunePasses.of(parse_spec("block-prune, smooth-activations")), runner)
    texts += [g.to_text(graph) for graph in (pruned.dense, pruned.sparse, pruned.graph)]
    scheme = target.scheme(PRESETS["fast"])
    once = quantize(pruned, scheme, runner, Keep(dense=pruned.changed[:2]))
    texts.append(g.to_text(once.graph))
    target.lower(once, runner)
    again = quantize(pruned, scheme, runner, Keep(dense=pruned.changed[:2]))
    assert texts == [g.to_text(graph) for graph in (source, canonical.graph, pruned.dense, pruned.sparse, pruned.graph,
                                                    once.graph)]  # fmt: skip
    assert g.to_text(again.graph) == texts[-1]  # what goes back does not depend on what was tried before


def test_observers_see_the_graph_of_the_plan_and_no_other(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def watch(pass_: Pass, graph: object, report: Report, seconds: float) -> None:
        seen.append((pass_.name, [layer.name for layer in g.linear_layers(graph) if layer.quantized]))

    result = nmcompile.compile(BERT, tmp_path / "m.plan", calibration=feeds(BERT), preset="fast", observers=[watch],
                               max_drop="cosine=0.000001")  # fmt: skip
    names = [name for name, _, _ in result.passes]
    assert [name for name, _ in seen] == [name.split("(")[0] for name in names]  # each once, though many were tried
    assert held_of(result).floating and not set(held_of(result).floating) & set(seen[-1][1])


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_the_model_itself_runs_each_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count, real = 0, g.runner

    def counting(*args: object, **options: object) -> object:
        run = real(*args, **options)  # type: ignore[arg-type]

        def call(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal count
            count += 1
            return run(given)

        return call

    monkeypatch.setattr(g, "runner", counting)
    run = Reference(g.load(BERT)).run
    first, second = list(feeds(BERT))[2:4]
    results = [run(first), run(second), run({name: values.copy() for name, values in first.items()}), run(second)]
    assert count == 2
    assert results[0]["last_hidden_state"].tobytes() == results[2]["last_hidden_state"].tobytes()
    assert results[1]["last_hidden_state"].shape[:2] == (3, 33)


def test_a_size_is_met_where_sizes_are_not_linear() -> None:
    tried: list[float] = []

    def size_at(sparsity: float) -> int:
        tried.append(sparsity)
        return int(1000 * (0.2 + 0.8 * (1 - sparsity) ** 1.5))

    found = sparsity_for("0.35x", "2x4", 1000, size_at)
    assert abs(size_at(found) / 1000 - 0.35) < 0.003 and len(tried) <= 6
    assert sparsity_for("1x", "2x4", 1000, size_at) == 0.0
    with pytest.raises(PassError, match="with 90 % zeros the plan still has"):
        sparsity_for("0.1x", "2x4", 1000, size_at)
