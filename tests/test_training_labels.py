"""Training with labels beside the dense model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import BERT, MODELS, QUICK, rows

import nmcompile
from nmcompile import ir as g
from nmcompile.calibrate import open_data
from nmcompile.errors import CalibrationError, NmcompileError, PassError
from nmcompile.input_roles import inputs
from nmcompile.trainer import Training
from nmcompile.training.labels import of_labels

CLASSES = MODELS / "bert-classifier.onnx"


def labelled(of: Any = lambda ids: int(sum(ids)) % 2) -> list[dict[str, Any]]:
    return [{**row, "kind": of(row["input_ids"])} for row in rows()]


def test_labels_pull_the_student_towards_them() -> None:
    feeds = list(open_data(rows(), inputs(g.admit(CLASSES)), limit=1000))

    def right(found: Training) -> float:
        chosen = [g.run(found.graph, batch)["logits"].argmax(1) for batch in feeds]
        return float((np.concatenate(chosen) == 1).mean())

    options: dict[str, Any] = {**QUICK, "steps": 40, "labels": "kind"}
    without = nmcompile.train(CLASSES, data=labelled(lambda ids: 1), label_weight=0.0, **options)
    found = nmcompile.train(CLASSES, data=labelled(lambda ids: 1), label_weight=20.0, **options)
    assert right(found) > max(right(without), 0.9)


def test_labels_that_do_not_fit() -> None:
    for error, words, path, made, options in (
        (CalibrationError, "kind 7 is no class of output 'logits'", CLASSES, labelled(lambda ids: 7), {}),
        (CalibrationError, "take as many outputs of logits", BERT, labelled(), {}),
        (CalibrationError, "input 'kind' is <U4", CLASSES, labelled(lambda ids: "good"), {}),
        (CalibrationError, "input 'kind' is missing", CLASSES, rows(), {}),
        (PassError, "is an input of the model", CLASSES, labelled(), {"labels": "attention_mask"}),
        (PassError, "no weight below", CLASSES, labelled(), {"label_weight": -1.0}),
        (PassError, "qat=2 is not a share", CLASSES, labelled(), {"qat": 2.0}),
        (PassError, "target=tpu is not known", CLASSES, labelled(), {"target": "tpu"}),
    ):
        with pytest.raises(error, match=words):
            nmcompile.train(path, data=made, **{**QUICK, "labels": "kind", **options})


def test_samples_that_were_read_without_their_labels_are_one_line() -> None:
    read = open_data(rows(), inputs(g.admit(CLASSES)), limit=1000)
    with pytest.raises(NmcompileError, match="the samples have no labels 'kind'; they have input_ids"):
        nmcompile.train(CLASSES, data=read, labels="kind", **QUICK)


def test_answers_are_labels_of_two_outputs() -> None:
    spans = [{**row, "first": 1, "last": len(row["input_ids"]) - 1} for row in rows()]
    options: dict[str, Any] = {**QUICK, "steps": 30, "labels": "first,last"}
    path, feeds = MODELS / "bert-qa.onnx", {"input_ids": np.arange(5, 15)[None]}
    feeds |= {"attention_mask": np.ones((1, 10), np.int64), "token_type_ids": np.zeros((1, 10), np.int64)}
    found = nmcompile.train(path, data=spans, label_weight=20.0, **options)
    names = [tensor.name for tensor in found.graph.outputs]
    given = g.run(found.graph, {name: feeds[name] for name in (info.name for info in inputs(found.graph))})
    assert [int(given[name].argmax()) for name in names] == [1, 9]
    with pytest.raises(CalibrationError, match="last 90 is no token of its sample"):
        nmcompile.train(path, data=[{**row, "last": 90} for row in spans], **options)


def test_tokens_have_labels_where_the_model_scores_tokens() -> None:
    made = [{**row, "kind": [5] * len(row["input_ids"])} for row in rows()]
    options: dict[str, Any] = {**QUICK, "steps": 30, "labels": "kind"}
    path, ids = MODELS / "gpt2-torchscript.onnx", np.arange(5, 15)[None]
    found = nmcompile.train(path, data=made, label_weight=20.0, **options)
    given = g.run(found.graph, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert (given[found.graph.outputs[0].name].argmax(-1) == 5).all()
    for error, wrong in (
        ("kind has 1 numbers, output 'logits' takes one for each of", [5]),
        ("kind -7 is no class of output 'logits'", [-7] * 64),
    ):
        with pytest.raises(CalibrationError, match=error):
            nmcompile.train(path, data=[{**row, "kind": wrong[: len(row["input_ids"])]} for row in rows()], **options)


def test_tokens_without_a_label_count_for_nothing() -> None:
    scores = torch.randn(2, 3, 7)
    labels = np.array([[1, 2, -100], [-100, 3, -100]])
    known = ((0, 0, 1), (0, 1, 2), (1, 1, 3))
    wanted = torch.stack([F.cross_entropy(scores[i, j], torch.tensor(label)) for i, j, label in known])
    assert float(of_labels(scores, labels)) == pytest.approx(float(wanted.mean()), rel=1e-6)
    assert float(of_labels(scores, np.full((2, 3), -100))) == 0.0
