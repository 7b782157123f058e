"""Every reference model reaches the canonical form and computes there what it did before."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from nmcompile import ir as g
from nmcompile.canonical import attentions
from nmcompile.pipeline import Pipeline, Report
from nmcompile.recipes import canonical_passes

MODELS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))}
BERTS = [name for name in MODELS if name.startswith("bert-")]
BERT = {"Add": 21, "Cast": 1, "Gather": 5, "Gelu": 2, "LayerNormalization": 5, "MatMul": 17, "Mul": 2, "Range": 1,
        "Reshape": 8, "Shape": 1, "Softmax": 2, "Tanh": 1, "Transpose": 8, "Unsqueeze": 1, "Where": 1}  # fmt: skip
# what a file has beside the encoder, and lacks of it
BESIDE: dict[str, dict[str, int]] = {
    "bert-classifier": {"MatMul": 1, "Add": 1},
    "bert-fp16": {"Cast": 2},  # each output back to half precision
    # its attention gives 0 to a query that sees no key
    "bert-dynamo-attention": {"IsNaN": 2, "Where": 2},
    # its mask counts: as many keys as the attention mask has ones
    "bert-ort-transformers": {"Equal": 1, "Gather": 1, "Less": 1, "Range": 1, "ReduceSum": 1, "Shape": 1},
    "bert-qa": {
        "Squeeze": 2,
        "Split": 0,
        "MatMul": 1,
        "Add": 1,
        "Gather": -1,
        "Tanh": -1,
    },  # start and end, no pooler
}
ENCODERS = ("bert-", "distilbert-", "roberta-", "electra-", "gpt2-", "vit-")
PADDED = "padding by attention_mask"
MASKS = {"gpt2": f"{PADDED} and causal", "vit": "none"}
LEFT = {"t5": ("a bias other than a mask is added to its scores, by Cast",
               "queries and keys come from different sequences (cross-attention)",
               "embedding not matched, its ids are")}  # fmt: skip


@functools.cache
def canonical(name: str) -> tuple[gs.Graph, gs.Graph, tuple[Report, ...]]:
    """(the model, its canonical graph, reports of the passes)"""
    source = g.load(MODELS[name])
    return source, *Pipeline(canonical_passes()).run(source)


def feeds(graph: gs.Graph, batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded inputs; the last row is padded from its middle on, and padding's id is 1."""
    rng = np.random.default_rng(length)
    found: dict[str, np.ndarray] = {}
    for info in g.inputs(graph):
        if info.name == "steps":
            found[info.name] = np.array(length, info.dtype)
        elif info.dtype.kind == "f":
            found[info.name] = rng.standard_normal((batch, *info.shape[1:])).astype(info.dtype)  # type: ignore[arg-type]
        elif "mask" in info.name:
            found[info.name] = np.ones((batch, length), info.dtype)
            found[info.name][-1, (length + 1) // 2 :] = 0
        else:
            largest = 2 if "token_type" in info.name else 256
            found[info.name] = rng.integers(0, largest, (batch, length)).astype(info.dtype)
    if "attention_mask" in found and "input_ids" in found:
        found["input_ids"] = np.where(found["attention_mask"] == 0, 1, np.maximum(found["input_ids"], 3))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name: str) -> None:
    source, graph, _ = canonical(name)
    expected, found = g.runner(source, None), g.runner(graph, None)
    for batch, length in ((1, 1), (1, 5), (1, 17), (3, 1), (3, 5), (3, 17)):
        inputs = feeds(source, batch, length)
        after = found(inputs)
        for key, values in expected(inputs).items():
            assert (after[key].shape, after[key].dtype) == (values.shape, values.dtype), key
            atol = 3e-2 if values.dtype == np.float16 else 1e-4
            np.testing.assert_allclose(
                after[key], values, rtol=0, atol=atol, err_msg=f"{key} {batch}x{length}"
            )


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(ENCODERS)])
def test_everything_is_matched(name: str) -> None:
    source, graph, reports = canonical(name)
    matched = [report.detail["matched"] for report in reports if "matched" in report.detail]
    embeddings = [] if "vit" in name else ["2/2" if name.startswith(("distilbert", "gpt2")) else "3/3"]
    assert matched == [
        "5/5",
        "2/2",
        "2/2",
        *embeddings,
    ]  # normalisations, activations, attentions, embeddings
    assert [note for report in reports for note in report.notes] == []
    found = attentions(graph)
    assert [str(item.mask) for item in found] == [MASKS.get(name.split("-")[0], PADDED)] * 2
    assert {len(graph.inputs), len(graph.outputs)} == {len(source.inputs), len(source.outputs)}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(tuple(LEFT))])
def test_what_is_not_matched_is_said(name: str) -> None:
    _, graph, reports = canonical(name)
    notes = [note for report in reports for note in report.notes]
    assert len(notes) == 8 and attentions(graph) == []
    assert all(any(reason in note for reason in LEFT[name.split("-")[0]]) for note in notes)
    assert [r.detail["matched"] for r in reports if "matched" in r.detail] == ["12/12", "0/0", "0/6", "2/4"]


@pytest.mark.parametrize("name", ["cnn", "lstm", "control-flow"])
def test_other_models_pass_through(name: str) -> None:
    _, graph, reports = canonical(name)
    assert [note for report in reports for note in report.notes] == []
    assert attentions(graph) == []


@pytest.mark.parametrize("name", BERTS)
def test_every_exporters_bert_is_one_graph(name: str) -> None:
    _, graph, _ = canonical(name)
    found = Counter(node.op for node in graph.nodes)
    wanted = Counter(BERT)
    wanted.update(BESIDE.get(name, {}))
    assert found == +wanted
    assert not any(node.domain for node in graph.nodes if node.domain != "ai.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_a_second_time_nothing_changes(name: str) -> None:
    _, graph, _ = canonical(name)
    again, reports = Pipeline(canonical_passes()).run(graph)
    assert [report.changed for report in reports] == [0] * len(reports)
    assert [(node.op, node.name) for node in again.nodes] == [(node.op, node.name) for node in graph.nodes]
