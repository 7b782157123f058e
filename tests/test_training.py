"""nmcompile.train and the pass behind it: from a dense graph and samples to a sparse one that is better than pruned."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from onnx_text import parse

import nmcompile
from nmcompile import ir as g
from nmcompile import sparsity as sp
from nmcompile.calibrate import Data, open_data
from nmcompile.cli import cli
from nmcompile.cli.train import SHIPPED
from nmcompile.errors import CalibrationError, NmcompileError, PassError, UnsupportedError
from nmcompile.input_roles import inputs
from nmcompile.passes import Train
from nmcompile.pipeline import Pipeline
from nmcompile.profile.curve import draw
from nmcompile.recipes import canonical_passes
from nmcompile.training import Distillation, recipe, seconds
from nmcompile.training.batches import FITTED, Batches, for_fitting, length, parted
from nmcompile.training.blocks import blocks
from nmcompile.training.distil import Trainer
from nmcompile.training.losses import Bank, Output, of_output
from nmcompile.training.pair import Pair
from nmcompile.training.weighing import sensitivities

MODELS = Path(__file__).parent.parent / "models"
BERT = MODELS / "bert-dynamo.onnx"
QUICK: dict[str, Any] = {"solver": "obs", "sparsity": 0.7, "budget": "60s", "steps": 40, "tokens": 512, "lr": 1e-3}


def rows(count: int = 400, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(5, 60, int(rng.integers(4, 20))).tolist()} for _ in range(count)]


def data(path: Path = BERT) -> Data:
    return open_data(rows(), inputs(g.admit(path)), limit=1000)


def zeros(graph: gs.Graph, names: Any) -> dict[str, np.ndarray]:
    return {layer.name: layer.weight == 0 for layer in g.linear_layers(graph) if layer.name in names}


@pytest.mark.parametrize("masks", ["fixed", "gradual", "admm", "lasso", "srste"])
@pytest.mark.parametrize("pattern", ["2x4", "2:4"])
def test_every_policy_is_better_than_pruning_and_keeps_its_zeros(masks: str, pattern: str) -> None:
    options = {**QUICK, "sparsity": None if pattern == "2:4" else 0.7}
    found = nmcompile.train(BERT, data=data(), pattern=pattern, masks=masks, **options)
    assert found.loss_trained < found.loss_pruned
    for name, mask in zeros(found.graph, found.sparsity).items():
        assert mask.mean() >= found.sparsity[name] - 1e-9
        kept = sp.keep_mask((~mask).astype(np.float32), sp.parse_pattern(pattern), found.sparsity[name])
        assert not (~mask & ~kept).any(), f"{name}: weights outside of the pattern"
    assert abs(found.zeros - (0.5 if pattern == "2:4" else 0.7)) < 0.02


def test_what_is_written_runs_alike_and_compiles_sparse(tmp_path: Path) -> None:
    out, log = tmp_path / "sparse.onnx", tmp_path / "history.jsonl"
    found = nmcompile.train(BERT, out, data=data(), history=log, **QUICK)
    feeds = next(iter(data()))
    before = g.run(g.admit(BERT), feeds)
    after, again = g.run(g.admit(out), feeds), g.run(found.graph, feeds)
    assert set(before) == set(after)
    for name, values in after.items():
        np.testing.assert_allclose(values, again[name], atol=1e-6)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["loss"] == found.loss_pruned
    assert min(line["loss"] for line in lines) == found.loss_trained
    result = nmcompile.compile(out, tmp_path / "m.plan", calibration=rows())
    assert sum(layer["pattern"] != "dense" for layer in result.layers) == len(found.sparsity)


def test_a_run_that_was_interrupted_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nmcompile.train(BERT, data=data(), masks="gradual", resume=tmp_path / "a", **QUICK)
    step = Trainer._step

    def until_20(self: Trainer, feeds: Any) -> None:
        if self.progress.step == 20:
            raise KeyboardInterrupt
        step(self, feeds)

    monkeypatch.setattr(Trainer, "_step", until_20)
    with pytest.raises(KeyboardInterrupt):
        nmcompile.train(BERT, data=data(), masks="gradual", resume=tmp_path / "b", **QUICK)
    steps: list[int] = []

    def counted(self: Trainer, feeds: Any) -> None:
        steps.append(self.progress.step)
        step(self, feeds)

    monkeypatch.setattr(Trainer, "_step", counted)
    resumed = nmcompile.train(BERT, data=data(), masks="gradual", resume=tmp_path / "b", **QUICK)
    assert 0 < steps[0] <= 20 and steps[-1] == QUICK["steps"] - 1
    for a, b in zip(g.linear_layers(whole.graph), g.linear_layers(resumed.graph), strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
    assert resumed.loss_trained == whole.loss_trained


def test_a_damaged_checkpoint_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "distil.pt").write_bytes(b"PK\x03\x04 no")
    assert nmcompile.train(BERT, data=data(), resume=tmp_path, **QUICK).loss_trained > 0


def test_training_that_makes_it_worse_is_not_kept() -> None:
    found = nmcompile.train(BERT, data=data(), **{**QUICK, "lr": 1.0, "steps": 6})
    assert found.loss_trained <= found.loss_pruned


def test_block_by_block_first() -> None:
    found = nmcompile.train(BERT, data=data(), local=0.15, **{**QUICK, "budget": "40s"})
    local = [entry for entry in found.history if entry["stage"] == "local" and "block" in entry]
    assert local and all(entry["after"] <= entry["before"] for entry in local)
    assert found.loss_trained < found.loss_pruned


@pytest.mark.parametrize("name", ["gpt2-dynamo", "vit-dynamo", "bert-classifier", "bert-qa", "t5-dynamo"])
def test_other_models_and_outputs(name: str) -> None:
    source = g.admit(MODELS / f"{name}.onnx")
    made = [{key: value[0] for key, value in g.random_feeds(inputs(source), seed=i).items()} for i in range(48)]
    found = nmcompile.train(source, data=made, **{**QUICK, "steps": 15})
    assert found.loss_trained < found.loss_pruned


def test_as_a_pass_in_a_compile_with_a_limit(tmp_path: Path) -> None:
    passes = "train(pattern=2x4, sparsity=0.8, solver=obs, steps=10, tokens=256, budget=60s)"
    result = nmcompile.compile(BERT, tmp_path / "m.plan", passes=passes, calibration=rows(), max_drop="cosine=0.02")
    assert result.held is not None and result.held.drop <= 0.02


def test_what_cannot_be(tmp_path: Path) -> None:
    for error, words, options in (
        (CalibrationError, "at least, the data have 10", {"data": rows(10)}),
        (PassError, "'soon' is not a time", {"budget": "soon"}),
        (PassError, "too short for one step", {"budget": "0.5s"}),
        (PassError, "masks=magic is not known", {"masks": "magic"}),
        (PassError, "nothing to train", {"sparsity": 0.0}),
        (PassError, "lr=5 is no learning rate", {"lr": 5.0}),
        (NmcompileError, "unknown sparsity pattern 'big'", {"pattern": "big"}),
        (PassError, "does not know dept", {"masks": "admm", "masks_options": ("dept:3",)}),
    ):
        with pytest.raises(error, match=words):
            nmcompile.train(BERT, tmp_path / "out.onnx", **{"data": rows(), **QUICK, **options})
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no CUDA GPU"):
            nmcompile.train(BERT, tmp_path / "out.onnx", data=rows(), device="cuda", **QUICK)
    with pytest.raises(NmcompileError, match="MaxPool, which has no gradient"):
        source = g.admit(MODELS / "cnn.onnx")
        images = [{key: value[0] for key, value in g.random_feeds(inputs(source)).items()}] * 40
        nmcompile.train(source, data=images, **QUICK)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    command = ["train", str(BERT), "-o", str(tmp_path / "s.onnx"), "--data", str(tmp_path / "rows.jsonl"), "--sparsity",
               "0.7", "--solver", "obs", "--plot", str(tmp_path / "c.svg"), "--steps", "10", "--tokens", "256", "--lr",
               "0.003"]  # fmt: skip
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "held-out samples" in result.output and (tmp_path / "s.onnx").exists()
    assert (tmp_path / "c.svg").read_text().count("minutes of training") == 1
    result = CliRunner().invoke(cli, [*command[:-2], "--budget", "soon"])
    assert result.exit_code == 1 and result.output.startswith("error: 'soon' is not a time")


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.toml")))
def test_the_recipes_that_come_along(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    out = tmp_path / "s.onnx"
    result = CliRunner().invoke(cli, ["train", str(BERT), "-o", str(out), "--data", str(tmp_path / "rows.jsonl"),
                                      "--recipe", name, "--solver", "obs", "--steps", "40", "--tokens", "512", "--lr",
                                      "0.001", "--history", str(tmp_path / "h.jsonl")])  # fmt: skip
    assert result.exit_code == 0, result.output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert min(losses) < losses[0]
    pattern = tomllib.loads((SHIPPED / name).read_text())["pattern"]
    found = [sp.detect(layer.weight) for layer in g.linear_layers(g.load(out))]
    assert any(str(item.pattern) == pattern for item in found if item is not None)


# ---- parts -------------------------------------------------------------------------------------------------------


def test_blocks_end_at_the_residual_stream() -> None:
    graph = nmcompile.torch_module(BERT).graph()
    found = blocks(graph, [layer.name for layer in g.linear_layers(graph)][:-1])
    assert [len(block.layers) for block in found] == [4, 2, 4, 2]
    assert found[0].start == "" and all(a.end == b.start for a, b in pairwise(found))


def test_batches_hold_their_tokens_and_every_sample_once() -> None:
    batches = Batches(data(), 64)
    epoch = batches.epoch(0)
    assert sum(len(feeds["input_ids"]) for feeds in epoch) == 400
    assert all(feeds["input_ids"].size <= 64 for feeds in epoch)
    later = next(batches.since(len(epoch) + 2))
    np.testing.assert_array_equal(later["input_ids"], batches.epoch(1)[2]["input_ids"])
    assert max(map(length, data().rows)) == 19


def test_times() -> None:
    assert [seconds(text) for text in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    assert recipe.Recipe().budget == 600


def test_the_learning_rate_goes_by_the_width_unless_it_is_given() -> None:
    rates = [recipe.Recipe().rate(width) for width in (None, 128, 384, 768, 1024)]
    assert rates[:3] == [1e-3] * 3 and rates[3] == pytest.approx(3e-4, rel=0.01) and 1e-4 < rates[4] < 2e-4
    assert recipe.Recipe(lr=2e-4).rate(768, 0.5) == 2e-4
    zeros = [recipe.Recipe().rate(384, sparsity) for sparsity in (0.9, 0.8, 0.5, 0.3, 0.1)]
    assert zeros == pytest.approx([1e-3, 1e-3, 3.9e-4, 1.4e-4, 1.4e-4], rel=0.01)


def test_similarities_are_taken_to_the_teachers_latest_vectors() -> None:
    torch.manual_seed(0)
    bank, output, how = Bank(5), Output("y", "embedding"), Distillation(cosine=0.0, relations=1.0)
    teacher = [F.normalize(torch.randn(3, 8), dim=-1) for _ in range(3)]
    student = (teacher[2] + 0.3 * torch.randn(3, 8)).requires_grad_()
    assert float(of_output(output, teacher[0], teacher[0], None, how, bank)) == 0.0  # none are held yet
    assert float(of_output(output, teacher[1], teacher[1], None, how, bank)) == pytest.approx(0.0, abs=1e-6)
    found = of_output(output, student, teacher[2], None, how, bank)
    held = torch.cat(teacher[:2])[-5:]
    p, q = (torch.softmax(F.normalize(x, dim=-1) @ held.t() / 0.05, -1) for x in (teacher[2], student.detach()))
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    found.backward()
    torch.testing.assert_close(bank.held["y"], torch.cat(teacher)[-5:])
    assert student.grad is not None and float(student.grad.norm()) > 0


def test_many_classes_are_compared_by_the_likeliest_and_the_rest() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 9000) * 3
    student = (teacher + torch.randn(2, 3, 9000)).requires_grad_()
    found = of_output(Output("y", "tokens"), student, teacher, None, Distillation(temperature=2.0))
    p, q = (torch.softmax(x.detach().double() / 2, -1) for x in (teacher, student))
    likeliest = teacher.topk(512, -1).indices
    both = [torch.cat((x.gather(-1, likeliest), 1 - x.gather(-1, likeliest).sum(-1, keepdim=True)), -1) for x in (p, q)]
    wanted = 4 * (both[0] * (both[0] / both[1]).log()).sum(-1).mean()
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-4)
    assert 0.2 < float(found.detach() / (4 * (p * (p / q).log()).sum(-1).mean())) < 1  # of all classes' divergence
    found.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad.norm()) > 0
    same = of_output(Output("y", "tokens"), teacher, teacher, None, Distillation())
    assert float(same) == pytest.approx(0, abs=1e-5)


def test_what_is_asked_of_the_loss_is_what_it_weighs() -> None:
    asked = Train(relations=0.25, temperature=3.0).recipe.loss
    assert asked == Distillation(features=1.0, outputs=1.0, cosine=5.0, relations=0.25, temperature=3.0)
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    found = of_output(Output("y", "embedding"), student, teacher, None, asked)
    assert float(found) == pytest.approx(5.0 * (1 - 0.5**0.5) / 2)  # two samples have no relations


def test_feature_maps_are_weighed_by_what_the_outputs_feel() -> None:
    text = """(float[N,T,3] x) => (float[N,T,3] y) <float[3,3] a, float[3,3] b, float[3,3] c> {
        h = MatMul(x, a)  r = Add(h, x)  i = MatMul(r, b)  y = MatMul(i, c) }"""
    graph, _ = Pipeline(canonical_passes()).run(parse(text))
    layers = g.linear_layers(graph)
    for layer, diagonal in zip(layers, np.array([[1, 1, 1], [2, 0.5, 0.5], [0.5, 2, 2]], np.float32), strict=True):
        g.set_weight(graph, layer, np.diag(diagonal))
    samples = [{"x": np.random.default_rng(i).normal(size=(5, 3)).astype(np.float32)} for i in range(400)]
    held = open_data(samples, inputs(graph), limit=400)
    pair = Pair.of(graph, graph, [layer.name for layer in layers], held)
    assert pair.ends == ["r", "i"]
    found = sensitivities(pair, Batches(held, 256, 0).epoch(0), [Output("y", "tokens")])
    # |J^T r|^2 |h|^2 per n: r = 2x: 1 * 4; i = (4, 1, 1) x: (0.25 + 4 + 4) / 3 * 18 / 3
    np.testing.assert_allclose(found, np.array([4, 16.5]) / 20.5 * 2, rtol=0.1)


def test_training_by_sensitivity_is_better_than_pruning() -> None:
    found = nmcompile.train(BERT, data=data(), weighing="sensitivity", **QUICK)
    assert found.loss_trained < found.loss_pruned
    with pytest.raises(PassError, match="feature maps are weighed 'often'; known are uniform, sensitivity"):
        nmcompile.train(BERT, data=data(), weighing="often", **QUICK)


@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_are_trained_where_they_are_wanted(embeddings: bool) -> None:
    dense = nmcompile.torch_module(BERT).initializers
    found = nmcompile.train(BERT, data=data(), embeddings=embeddings, **{**QUICK, "steps": 5})
    tables = {tensor.name: np.asarray(tensor.values) for node in found.graph.nodes if node.op == "Gather"
              for tensor in node.inputs[:1] if isinstance(tensor, gs.Constant) and tensor.values.ndim == 2}  # fmt: skip
    moved = [name for name, values in tables.items() if not np.array_equal(values, dense[name].detach().numpy())]
    assert bool(moved) == embeddings and len(tables) >= 2


def test_a_ladder_of_sparsities() -> None:
    found = nmcompile.train(BERT, data=data(), rungs=("0.4", "0.6"), **QUICK)
    first = {entry["rung"]: entry["loss"] for entry in reversed(found.history)}
    assert [entry["rung"] for entry in found.history] == sorted(entry["rung"] for entry in found.history)
    assert first[0] < first[1] < first[2] and abs(found.zeros - 0.7) < 0.03
    assert found.loss_trained < found.loss_pruned
    for name, mask in zeros(found.graph, found.sparsity).items():
        assert mask.mean() >= found.sparsity[name] - 1e-9
    for rungs in (("0.6", "0.4"), ("0.8",), ("high",)):
        with pytest.raises(PassError, match=r"do not rise to the sparsity of 0\.7"):
            nmcompile.train(BERT, data=data(), rungs=rungs, **QUICK)


def test_what_is_held_out_is_bounded_in_samples_and_tokens() -> None:
    whole = data()
    for most, tokens, least in ((5, 1 << 20, 5), (256, 100, 2), (256, 1, 2)):
        training, held = parted(whole, most, tokens)
        count = len(held.rows)
        assert least <= count <= most and (count == 2 or sum(map(length, held.rows)) <= tokens)
        assert len(training.rows) + count == len(whole.rows)


def test_a_rate_that_ruins_is_halved_from_the_best_state_on(tmp_path: Path) -> None:
    options = {**QUICK, "lr": 0.1, "steps": 60}
    found = nmcompile.train(BERT, data=data(), resume=tmp_path, **options)
    rates = [entry["rate"] for entry in found.history if "rate" in entry]
    assert rates and rates == [2.0**-i for i in range(1, len(rates) + 1)]
    assert found.loss_trained < found.loss_pruned


def test_a_run_that_trained_blocks_goes_on_with_what_it_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 10, "local": 0.1, "resume": tmp_path}
    first = nmcompile.train(BERT, data=data(), **options)
    again = nmcompile.train(BERT, data=data(), **options)
    assert first.history[0]["stage"] == "local" and again.history == first.history
    assert again.loss_trained == first.loss_trained


@pytest.mark.parametrize("stages", [("distil",), ("quantized",), ("distil", "quantized")])
def test_the_curve_shows_the_stages_that_there_were(stages: tuple[str, ...]) -> None:
    history = [{"stage": stage, "step": i, "loss": 2.0 - i, "seconds": 60.0 * i} for stage in stages for i in range(2)]
    svg = draw([{"stage": "local", "before": 1.0, "after": 0.5}, *history], "svg").decode()
    assert ("eight bits" in svg) == ("quantized" in stages) and "pruned" in svg


def test_pruning_fits_to_more_samples_than_it_measures_by_and_to_none_held_out() -> None:
    made = open_data(rows(3000), inputs(g.admit(BERT)), limit=3000)
    found = for_fitting(made, 1_000_000)
    _, held = parted(made, 10_000, 10**9)
    assert len(found.rows) == FITTED and found.batch == 32 and found.samples == FITTED
    assert not {id(row) for row in found.rows} & {id(row) for row in held.rows}
    large = for_fitting(made, 100_000_000)  # whose layers take 100 times as long
    assert len(large.rows) == 256 and 256 < len(for_fitting(made, 66_000_000).rows) < 512
    few = for_fitting(replace(made, rows=made.rows[:40]), 1_000_000)
    assert len(few.rows) == 38 and few.batch == made.batch
    infos = tuple(replace(info, shape=(16, *info.shape[1:])) for info in made.inputs)
    fixed = replace(made, inputs=infos, rows=made.rows[:16])
    assert for_fitting(fixed, 1_000_000) is fixed  # 15 are no batch
