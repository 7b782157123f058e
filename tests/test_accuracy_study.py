"""tools/accuracy: pairs of paragraphs, retrieval scores, recipes, tables and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nmcompile.passes import Train
from nmcompile.recipes import PRESETS
from nmcompile.spec import parse_spec
from tools.accuracy.__main__ import main
from tools.accuracy.plot import draw
from tools.accuracy.retrieval import Scores, Task
from tools.accuracy.study import ABLATION, PATTERNS, Row, blocks, markdown, to_json, trained, training_ablation
from tools.accuracy.texts import pairs

FIRST, SECOND = "What the thing is, in a line of its own.", "How the thing is used, at a little more length."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "paragraphs_of_mine.py").write_text(f'''
class Thing:
    """{FIRST} 1

    {SECOND} 1

    And more.
    """
    def method(self):
        """{FIRST} 2

        {SECOND}
        It goes on 2.
        """
    def same(self):
        """{FIRST} 3

        {SECOND} 1
        """
    def _hidden(self):
        """{FIRST} 4

        {SECOND} 4
        """
def short():
    """Too short.

    {SECOND} 5
    """
def example():
    """{FIRST} 6

    >>> {SECOND} 6
    """
''')
    monkeypatch.syspath_prepend(str(tmp_path))
    return "paragraphs_of_mine"


def test_pairs_are_the_first_two_paragraphs(package: str) -> None:
    found = pairs([package, "no_such_package"])
    assert sorted(found) == [(f"{FIRST} 1", f"{SECOND} 1"), (f"{FIRST} 2", f"{SECOND} It goes on 2.")]
    assert pairs([package], seed=1) in (found, found[::-1])


def test_scores_by_hand() -> None:
    """Three pairs in the plane: the first finds its own, the second finds another's, the third comes second."""
    angles = np.radians([0, 90, 180, 10, 175, 200])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    task = Task((), np.arange(6), 3)
    scores = task.scores(vectors, vectors)
    assert scores.top1 == pytest.approx(1 / 3)  # 0 -> 10; 90 -> 10 before 175; 180 -> 175 before 200
    assert scores.mrr == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert scores.cosine == pytest.approx(1) and task.scores(vectors, -vectors).cosine == pytest.approx(-1)


def test_embeddings_are_means_of_real_tokens_in_order() -> None:
    feeds = {"attention_mask": np.array([[1, 0], [1, 1]])}
    hidden = np.array([[[3.0, 4.0], [9.0, 9.0]], [[1.0, 0.0], [0.0, 1.0]]], np.float32)
    found = Task((feeds,), np.array([1, 0]), 1).embeddings(lambda _: hidden)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0.6, 0.8]], rtol=1e-6)


def test_recipes_are_valid() -> None:
    for recipe in (*PATTERNS, *ABLATION):
        parse_spec(str(recipe.options.get("passes", "")))
        assert recipe.options.get("preset", "default") in (*PRESETS, *(r.options.get("preset") for r in ABLATION))
    assert blocks("1x4", 0.5) == {"pattern": "1x4", "sparsity": 0.5}
    assert [pass_.name for pass_ in parse_spec(blocks("1x4", 0.5, damping=0.01)["passes"])] == [
        "permute-features", "block-prune"]  # fmt: skip
    assert len(parse_spec(blocks("1x4", 0.5, order=False)["passes"])) == 1


def test_table_and_picture(tmp_path: Path) -> None:
    base = {"stdlib": Scores(0.5, 0.6, 1.0)}
    rows = [Row("dense", {"stdlib": Scores(0.5, 0.6, 0.99)}, 0.0, 3.0, 2.0),
            Row("1x4", {"stdlib": Scores(0.4, 0.54, 0.9)}, 0.5, 90.0, 1.0)]  # fmt: skip
    lines = markdown(rows, base).splitlines()
    assert lines[2].startswith("| float | 0% | 0.500 (100.0%)")
    assert lines[4] == "| 1x4 | 50% | 0.400 (80.0%) | 0.540 (90.0%) | 0.9000 | 1.00 | 90 |"
    assert '"mrr": 0.54' in to_json(rows, base)
    pytest.importorskip("matplotlib")
    draw(rows, base, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_that_does_not_exist_is_one_line() -> None:
    result = CliRunner().invoke(main, ["retrieval", "--only", "nonsense"])
    assert result.exit_code == 1
    assert "no row is named nonsense" in result.output or "is not installed" in result.output


def test_every_way_of_training_is_one_that_there_is() -> None:
    pytest.importorskip("torch", reason="training needs the extra train")
    rows = [*training_ablation("2x4", 0.8, "6m"), *trained("2:4", None, ["10m", "1h"], qat=0.2)]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if row.training is not None:
            Train(**row.training).check()
