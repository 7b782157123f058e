"""Metrics of published tasks, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from accuracy_cases import array

from tools.accuracy import metrics, tasks


def test_metrics_of_classes() -> None:
    predicted, gold = array(1, 0, 1, 1), array(1, 1, 1, 0)  # 2 true positives, 1 false positive, 1 false negative
    assert metrics.accuracy(predicted, gold) == 0.5
    assert metrics.f1(predicted, gold) == pytest.approx(2 / 3)
    assert metrics.matthews(predicted, gold) == pytest.approx(-1 / 3)  # (2*0 - 1*1) / sqrt(3 * 3 * 1 * 1)
    assert metrics.matthews(gold, gold) == pytest.approx(1) and metrics.f1(gold, gold) == 1
    assert metrics.matthews(array(1, 1, 1, 1), gold) == 0 and metrics.f1(array(0, 0), array(0, 0)) == 0


def test_correlations() -> None:
    assert metrics.pearson(array(1, 2, 3), array(1, 2, 4)) == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    assert metrics.pearson(array(1, 2, 3), array(5, 3, 1)) == pytest.approx(-1)
    assert metrics.pearson(array(2, 2, 2), array(1, 2, 3)) == 0
    assert metrics.ranks(array(7, 1, 7, 9)).tolist() == [2.5, 1, 2.5, 4]
    assert metrics.spearman(array(1, 2, 2, 4), array(1, 30, 20, 400)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_pooling_leaves_padding_out() -> None:
    hidden = np.array([[[1.0, 0], [3, 4], [np.nan, 9]]])
    assert metrics.mean_pool(hidden, np.array([[1, 1, 0]])).tolist() == [[2, 2]]
    assert metrics.cosine(np.array([[3.0, 4], [0, 0]]), np.array([[4.0, 3], [1, 1]])) == pytest.approx([24 / 25, 0])


@pytest.mark.parametrize(
    ("prediction", "answers", "unanswerable", "scores"),
    [
        ("The  Cat's, a hat!", ["cats hat"], False, (1, 1)),
        ("cat sat", ["dog", "the cat sat down"], False, (0, 0.8)),  # P = 2/2, R = 2/3
        ("cat cat", ["cat dog"], False, (0, 0.5)),  # a word counts as often as both have it
        ("", ["dog"], False, (0, 0)),
        ("the", ["The"], False, (1, 0)),  # nothing is left: 1.1 compares the strings, its F1 finds no common word
        ("the", ["The"], True, (1, 1)),
        ("", [], True, (1, 1)),
        ("dog", [], True, (0, 0)),
        ("", ["dog"], True, (0, 0)),
        ("", ["the", "dog"], True, (0, 0)),  # 2.0 drops the answer that is empty once normalised
    ],
)
def test_squad_scores(
    prediction: str, answers: list[str], unanswerable: bool, scores: tuple[float, float]
) -> None:
    assert metrics.squad(prediction, answers, unanswerable=unanswerable) == pytest.approx(scores)


def test_the_best_span_is_legal() -> None:
    start, end = array(9, 1, 5, 0, 2), array(9, 6, 0, 3, 4)
    allowed = np.array([False, True, True, True, True])
    assert metrics.best_span(start, end, allowed) == (9, 2, 4)  # 0 is not of the text, 2..1 runs backwards
    assert metrics.best_span(start, end, allowed, longest=2) == (8, 2, 3)
    assert metrics.best_span(start, end, allowed, n_best=1) is None  # the best start comes after the best end
    assert metrics.best_span(start, end, ~allowed) == (18, 0, 0)


def test_losses_and_perplexity() -> None:
    losses = metrics.token_losses(np.log(np.array([[1.0, 3], [1, 1]])) + 500, np.array([1, 0]))
    assert losses == pytest.approx([-math.log(0.75), math.log(2)], abs=1e-4)
    assert metrics.perplexity(np.log([2.0, 8])) == pytest.approx(4)


def test_windows_of_a_language_model_score_each_token_once() -> None:
    assert list(tasks.lm_windows(9, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
    assert list(tasks.lm_windows(6, 4, 4)) == [(0, 4, 1), (4, 6, 5)]
    assert list(tasks.lm_windows(3, 8, 4)) == [(0, 3, 1)] and list(tasks.lm_windows(1, 8, 4)) == []
