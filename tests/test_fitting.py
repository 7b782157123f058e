"""SequentialCalibration, fitting, sensitivity and the order of features, on a small BERT and its float reference."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate import Calibration, Data, open_data
from nmcompile.errors import CalibrationError, NmcompileError, PassError
from nmcompile.passes import BlockPrune, NMPrune, PermuteFeatures
from nmcompile.pipeline import Pipeline, Report
from nmcompile.prune import Fit, Goal, sensitivity
from nmcompile.prune.features import hidden
from nmcompile.prune.fitting import fit
from nmcompile.prune.selection import select
from nmcompile.prune.sequential import SequentialCalibration
from nmcompile.prune.stages import stages
from nmcompile.recipes import canonical_passes
from nmcompile.solvers.grouping import grouped, spread

BERT = Path(__file__).parent.parent / "models" / "bert-torchscript.onnx"
LAYERS = 12  # of the encoder; the pooler stays dense


@pytest.fixture(scope="module")
def bert() -> gs.Graph:
    return Pipeline(canonical_passes()).run(g.load(BERT))[0]


def records(count: int = 64, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"input_ids": rng.integers(5, 200, rng.integers(6, 24))}


@pytest.fixture(scope="module")
def data(bert: gs.Graph) -> Data:
    return open_data(records(), g.inputs(bert))


def lost(graph: gs.Graph, reference: gs.Graph, data: Data) -> float:
    """|error|^2 / |output|^2 of the hidden states, padding left out."""
    runs = [g.runner(item, ["last_hidden_state"]) for item in (graph, reference)]
    error = power = 0.0
    for feed in data:
        a, b = (run(feed)["last_hidden_state"][feed["attention_mask"] != 0] for run in runs)
        error, power = error + float(np.sum((a - b) ** 2)), power + float(np.sum(b**2))
    return error / power


def prune(graph: gs.Graph, data: Data, how: Fit, sparsity: float = 0.5, pattern: str = "2x4",
          checkpoints: Path | None = None) -> gs.Graph:  # fmt: skip
    changed = g.copy(graph)
    layers = select(changed, (), ()).layers
    goals = dict.fromkeys((layer.name for layer in layers), Goal(sp.parse_pattern(pattern), sparsity))
    fit(changed, data, layers, goals, how, checkpoints=checkpoints)
    g.verify(changed, "fit")
    return changed


# ---- sequential calibration


def test_stages_see_what_onnxruntime_computes(bert: gs.Graph, data: Data) -> None:
    """Every stage's inputs, after every weight before it was changed, are those of one run of the changed graph."""
    changed = g.copy(bert)
    layers = select(changed, (), ()).layers
    calibration = SequentialCalibration(changed, bert, data, stages(changed, layers))
    assert [len(stage.layers) for stage in calibration.stages] == [3, 1, 1, 1] * 2
    seen: dict[str, np.ndarray] = {}
    before: dict[str, np.ndarray] = {}
    for index, stage in enumerate(calibration.stages):
        batches = list(calibration.batches(index))
        seen[stage.tensor] = np.concatenate([batch.x for batch in batches])
        before[stage.tensor] = np.concatenate([batch.dense_x for batch in batches])
        for layer in stage.layers:
            g.set_weight(changed, layer, layer.weight * 0.9)
    for graph, found in ((changed, seen), (bert, before)):
        run = g.runner(graph, list(found))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for feed in data:
            values = run(feed)
            for name in found:
                parts[name].append(values[name][feed["attention_mask"] != 0])
        for name, expected in parts.items():
            np.testing.assert_allclose(found[name], np.concatenate(expected), rtol=1e-3, atol=1e-4)
    assert all(not known for known in calibration._known[0])  # nothing is kept that no stage needs


def test_the_residual_of_an_output_layer_is_found(bert: gs.Graph) -> None:
    found = stages(bert, select(bert, (), ()).layers)
    assert [bool(stage.residuals) for stage in found] == [False, True, False, True] * 2
    assert found[1].residuals == {found[1].layers[0].name: found[0].tensor}


@pytest.mark.parametrize(("same", "runs"), [(0, 16), (1, 15)])
def test_a_stage_that_is_alike_in_both_graphs_is_run_once(
    bert: gs.Graph, data: Data, monkeypatch: pytest.MonkeyPatch, same: int, runs: int
) -> None:
    """The first stage before anything has changed, and every stage where there is one graph; with the same values."""
    real, count = g.runner, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return real(*arguments, **options)

    monkeypatch.setattr(g, "runner", counted)
    changed = g.copy(bert)
    two = SequentialCalibration(changed, bert, data, stages(changed, select(changed, (), ()).layers), same)
    one = SequentialCalibration(bert, bert, data, stages(bert, select(bert, (), ()).layers))
    pairs = [(list(two.batches(index)), list(one.batches(index))) for index in range(8)]
    assert count == runs + 8
    for mine, other in pairs:
        for a, b in zip(mine, other, strict=True):
            assert np.array_equal(a.x, b.x) and np.array_equal(a.dense_x, b.dense_x) and a.x.shape == a.dense_x.shape
            assert a.residuals.keys() == b.residuals.keys()


# ---- fitting


def test_each_step_of_the_fit_pays(bert: gs.Graph, data: Data) -> None:
    held = open_data(records(32, seed=9), g.inputs(bert))
    apart = Fit(sequential=False, bias=False, norms=False, damping=0.01)
    loss = {name: lost(prune(bert, data, how), bert, held) for name, how in {
        "magnitude": replace(apart, solver="magnitude"), "admm": apart, "all": Fit()}.items()}  # fmt: skip
    assert loss["all"] < loss["admm"] < loss["magnitude"]


def test_the_pattern_holds_and_biases_move(bert: gs.Graph, data: Data) -> None:
    for pattern in ("2x4", "2:4", "unstructured"):
        after = {layer.name: layer for layer in g.linear_layers(prune(bert, data, Fit(), pattern=pattern))}
        for layer in select(bert, (), ()).layers:
            assert sp.density(after[layer.name].weight) == pytest.approx(0.5, abs=0.01)
            assert not np.array_equal(np.asarray(after[layer.name].bias), np.asarray(layer.bias))
            found = sp.detect(after[layer.name].weight)
            assert pattern == "unstructured" or (found is not None and str(found.pattern) == pattern)


def test_the_same_data_give_the_same_weights(bert: gs.Graph, data: Data) -> None:
    assert g.to_text(prune(bert, data, Fit())) == g.to_text(prune(bert, data, Fit()))


def test_an_interrupted_run_goes_on(
    bert: gs.Graph, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(bert, data, Fit())
    from nmcompile.prune import fitting

    real, count = fitting._solve, 0

    def interrupted(*arguments: object) -> dict[str, np.ndarray]:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "_solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(bert, data, Fit(), checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    count = 100
    assert g.to_text(prune(bert, data, Fit(), checkpoints=tmp_path)) == g.to_text(whole)
    assert count == 100 + 9 - 3  # eight stages with layers and the last normalisation; three were taken from the folder
    prune(bert, data, Fit(), 0.4, checkpoints=tmp_path)
    assert count == 100 + 6 + 9  # another job takes nothing from it
    for path in tmp_path.iterdir():
        path.unlink()
    prune(bert, data, Fit(), checkpoints=tmp_path)
    stages = sorted(tmp_path.iterdir())
    for left in (b"PK damaged", _archive(weight0=np.zeros(3))):
        for path in (stages[0], stages[-1]):
            path.write_bytes(left)  # a damaged stage is done again
        assert g.to_text(prune(bert, data, Fit(), checkpoints=tmp_path)) == g.to_text(whole)
        assert all(path.read_bytes() != left for path in stages)


def _archive(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def test_few_samples_still_work_and_are_told(bert: gs.Graph, data: Data) -> None:
    few = open_data(records(2), g.inputs(bert))
    assert np.isfinite(lost(prune(bert, few, Fit()), bert, few))
    for samples, said in ((few, True), (data, False)):
        report = Pipeline([BlockPrune(solver="obs", sparsity=0.5)], calibration=Calibration(samples)).run(bert)[1][0]
        assert any("give more calibration samples" in note for note in report.notes) == said


def test_infinite_activations_name_the_layer(bert: gs.Graph, data: Data) -> None:
    broken = g.copy(bert)
    layer = select(broken, (), ()).layers[5]
    weight = layer.weight.copy()
    weight[0, 0] = np.inf
    g.set_weight(broken, layer, weight)
    with pytest.raises(CalibrationError, match=f"layer '{layer.name}'.*NaN or Inf"):
        prune(broken, data, Fit())


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (BlockPrune(solver="admm"), "needs calibration data"),
        (BlockPrune(ranking="sensitivity"), "needs calibration data"),
        (BlockPrune(solver="admm", ranking="global"), "ranking=global is for"),
        (BlockPrune(solver="admm", damping=-1.0), "damping=-1.0 is negative"),
        (NMPrune(solver="obs"), "needs calibration data"),
    ],
)
def test_wrong_options(bert: gs.Graph, pass_: BlockPrune, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline([pass_]).run(bert)


# ---- sparsities by sensitivity


def test_sparsities_follow_what_zeros_cost(bert: gs.Graph, data: Data) -> None:
    layers = select(bert, (), ()).layers
    goals = dict.fromkeys((layer.name for layer in layers), Goal(sp.Block(1, 4), 0.5))
    table = sensitivity.measure(bert, data, layers, goals)
    assert len(table) == 8 and table[0].layers == tuple(layer.name for layer in layers[:3])
    for unit in table:
        errors = list(unit.errors.values())
        assert errors == sorted(errors) and errors[0] == 0 < errors[1] and unit.weight > 0
    shares = sensitivity.sparsities(table, 0.5)
    sizes = {layer.name: layer.weight.size for layer in layers}
    assert 0.5 <= sum(sizes[name] * share for name, share in shares.items()) / sum(sizes.values()) < 0.56
    assert len({shares[name] for name in table[0].layers}) == 1  # query, key and value together
    harder = [replace(unit, weight=unit.weight * (100 if unit is table[2] else 1)) for unit in table]
    assert sensitivity.sparsities(harder, 0.5)[table[2].layers[0]] < shares[table[2].layers[0]] or (
        shares[table[2].layers[0]] == 0
    )


# ---- the order of features


def permuted(graph: gs.Graph, data: Data, pattern: str) -> tuple[gs.Graph, Report]:
    after, reports = Pipeline([PermuteFeatures(pattern=pattern)], calibration=Calibration(data), verify=True).run(graph)
    return after, reports[0]


@pytest.mark.parametrize("pattern", ["2x4", "4x4", "1x4", "2:4"])
def test_another_order_computes_the_same_and_keeps_more(bert: gs.Graph, data: Data, pattern: str) -> None:
    after, report = permuted(bert, data, pattern)
    assert report.changed >= (2 if pattern == "2:4" else 4)
    assert lost(after, bert, data) < 1e-8  # Pipeline(verify=True) has compared them too
    for before, now in report.detail["share of saliency kept, before and after"].values():  # type: ignore[attr-defined]
        assert now >= before
    assert g.to_text(after) != g.to_text(bert)


def test_what_may_be_reordered(bert: gs.Graph) -> None:
    kinds = [(len(part.makers), len(part.readers), part.spans) for part in hidden(bert)]
    assert sorted(kinds) == sorted([(1, 1, 1), (2, 0, 4), (1, 1, 4)] * 2)


def test_like_features_stand_together() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(4), 4))
    profiles = np.eye(4)[kinds] + rng.uniform(0, 0.05, (16, 4))
    order = grouped(profiles, 4)
    assert sorted(order) == list(range(16))
    assert all(len(set(kinds[order[i : i + 4]])) == 1 for i in range(0, 16, 4))


def test_spread_features_keep_what_one_group_could_not() -> None:
    """Four strong columns in one group of 2:4 keep two; spread over the groups, all four."""
    score = np.ones((6, 16)) * 0.01
    score[:, :4] = 1
    order = spread(score, 2, 4, 16)
    assert sorted(order) == list(range(16))
    kept = sp.keep_mask(score[:, order], sp.NM(2, 4), 0.5)
    assert (score[:, order] * kept).sum() > 0.99 * score[:, :4].sum()
    within = spread(np.tile(score[:, :8], 2), 2, 4, 8)
    assert sorted(within[:8]) == list(range(8))  # no column leaves its span


def test_no_sample_of_another_model(bert: gs.Graph) -> None:
    with pytest.raises(NmcompileError):
        open_data([{"pixel_values": np.zeros((3, 8, 8), np.float32)}], g.inputs(bert))


def test_normalisations_have_the_dense_models_mean_and_deviation(bert: gs.Graph, data: Data) -> None:
    """Every one behind a pruned layer, the last one too, which no pruned layer reads."""
    names = [node.outputs[0].name for node in bert.nodes if node.op == "LayerNormalization"][1:]
    pruned, plain = prune(bert, data, Fit()), prune(bert, data, Fit(norms=False))
    moments = {}
    for key, graph in (("dense", bert), ("fitted", pruned), ("plain", plain)):
        run = g.runner(graph, names)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for feed in data:
            for name, values in run(feed).items():
                parts[name].append(values[feed["attention_mask"] != 0])
        joined = {name: np.concatenate(found) for name, found in parts.items()}
        moments[key] = {name: np.stack([rows.mean(axis=0), rows.std(axis=0)]) for name, rows in joined.items()}
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(moments["fitted"][name], moments["dense"][name], rtol=2e-3, atol=2e-3)
        assert np.abs(moments["plain"][name] - moments["dense"][name]).max() > 0.02


def test_the_target_moves_from_these_inputs_to_the_dense_models(bert: gs.Graph, data: Data) -> None:
    """The whole way is nearest to the dense model's outputs on the samples; nothing of it is farthest."""
    loss = [lost(prune(bert, data, Fit(norms=False, correction=share)), bert, data) for share in (0.0, 0.5, 1.0)]
    assert loss[2] < loss[1] < loss[0]


def test_what_is_broadcast_over_the_batch_is_no_residual(tmp_path: Path) -> None:
    """Positions that are added to a layer's output: they hold no row for each token of the batch."""
    graph = parse("""(float[B,S,32] x) => (float[B,S,32] y) <float[64,32] table, float[32,32] w0, float[32,64] w1,
        float[64,32] w2> { i0 = Constant <value_int = 0> ()  i1 = Constant <value_int = 1> ()  n = Shape(x)
        s = Gather(n, i1)  r = Range(i0, s, i1)  p = Gather(table, r)  a = MatMul(x, w0)  b = Add(a, p)
        c = MatMul(b, w1)  d = Relu(c)  y = MatMul(d, w2) }""")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 20, 32)).astype(np.float32)} for _ in range(16)]
    result = nmcompile.compile(graph, tmp_path / "m.plan", calibration=samples, sparsity=0.5, pattern="2x4")
    assert result.loss["y"].cosine > 0.7
