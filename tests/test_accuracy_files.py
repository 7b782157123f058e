"""The file formats in which published tasks come, and what is said of damaged ones."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accuracy_cases import MNLI, MRPC, QQP, STSB, squad_file, write

from nmcompile.errors import InputError
from tools.accuracy import tasks

PUBLISHED: list[tuple[str, str, list[str], tuple[str, ...], float]] = [
    ("CoLA", "CoLA/dev.tsv", ['gj04\t0\t*\tA "cat sat.'], ('A "cat sat.',), 0),
    ("SST-2", "SST-2/dev.tsv", ["sentence\tlabel", "a '\u2028\" film \t1"], ("a '\u2028\" film ",), 1),
    ("mrpc", "MRPC/dev.tsv", ["\ufeff" + MRPC, '1\t7\t8\tThe " cat\tA cat\r'], ('The " cat', "A cat"), 1),
    ("qqp", "QQP/dev.tsv", [QQP, "1\t2\t3\twho?\twhere?\t0"], ("who?", "where?"), 0),
    ("sts_b", "STS-B/dev.tsv", [STSB, "0\tg\tf\t2012\t1\tn\tn\ta cat\ta dog\t2.500"], ("a cat", "a dog"), 2.5),
    ("mnli", "MNLI/dev_matched.tsv", [MNLI, "\t".join("0123456789abcde") + "\tcontradiction"], ("8", "9"), 2),
    ("MNLI-mm", "MNLI/dev_mismatched.tsv", [MNLI, "\t".join("0123456789abcde") + "\tneutral"], ("8", "9"), 1),
    ("qnli", "QNLI/dev.tsv", ["index\tquestion\tsentence\tlabel", "0\tq\ts\tentailment"], ("q", "s"), 0),
    ("rte", "RTE/dev.tsv", ["index\tsentence1\tsentence2\tlabel", "0\tp\th\tnot_entailment"], ("p", "h"), 1),
    ("wnli", "WNLI/dev.tsv", ["index\tsentence1\tsentence2\tlabel", "0\tp\th\t1"], ("p", "h"), 1),
    ("sts-benchmark", "stsbenchmark/sts-dev.csv",
     ["main-captions\tMSRvid\t2012test\t0000\t5.000\tA \"man\tA man\thttp://source"], ('A "man', "A man"), 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "lines", "texts", "gold"), PUBLISHED, ids=[item[0] for item in PUBLISHED])
def test_published_tables(
    name: str, file: str, lines: list[str], texts: tuple[str, ...], gold: float, tmp_path: Path
) -> None:
    path = write(tmp_path / file, *lines, "")
    for data in (tmp_path, path.parent, path):  # all of GLUE, the task's folder, the file
        task = tasks.load(name, data)
        assert task.examples == (tasks.Example(texts, gold),) and task.source == str(path)


def test_rows_that_break_off_or_have_no_label_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "QQP/dev.tsv", QQP, "1\t2\t3\twho", "1\t2\t3\twho?\twhere?\t1")
    start = "\t".join("0123456789abcde")
    write(tmp_path / "MNLI/dev_matched.tsv", MNLI, f"{start}\t-", f"{start}\tneutral")
    for name in ("qqp", "mnli"):
        task = tasks.load(name, tmp_path)
        assert [example.gold for example in task.examples if isinstance(example, tasks.Example)] == [1]
        assert task.skipped == 1


def test_mrpc_is_cut_from_the_files_that_microsoft_published(tmp_path: Path) -> None:
    rows = ["1\t7\t8\tone\ttwo", "0\t7\t9\tone\tthree", "0\t5\t8\tfour\ttwo"]
    write(tmp_path / "MRPC/msr_paraphrase_test.txt", "\ufeff" + MRPC, *rows[:1])
    assert tasks.load("mrpc", tmp_path).examples == (tasks.Example(("one", "two"), 1),)
    write(tmp_path / "MRPC/msr_paraphrase_train.txt", "\ufeff" + MRPC, *rows)
    write(tmp_path / "MRPC/dev_ids.tsv", "7\t9")
    assert tasks.load("mrpc", tmp_path).examples == (tasks.Example(("one", "three"), 0),)



def test_squad_files(tmp_path: Path) -> None:
    squad_file(tmp_path / "dev-v1.1.json", ("a cat", "who?", ["cat", "a cat"]))
    squad_file(tmp_path / "dev-v2.0.json", ("a dog", "who?", []))
    assert tasks.load("squad", tmp_path).examples == (tasks.Question("who?", "a cat", ("cat", "a cat")),)
    assert tasks.load("SQuAD_v2", tmp_path).examples == (tasks.Question("who?", "a dog", ()),)


def test_wikitext_is_one_text(tmp_path: Path) -> None:
    write(tmp_path / "wikitext-2-raw/wiki.test.raw", " ", " = Cat = ", " ")
    assert tasks.load("wikitext", tmp_path).examples == (" \n = Cat = \n \n",)


@pytest.mark.parametrize(
    ("name", "lines", "error"),
    [
        ("sst2", ["sentence\tlabel", "a film\t1", "a film"], "dev.tsv, line 3: 1 columns, 2 are needed"),
        ("sst2", ["sentence\tlabel", "a film\t2"], "dev.tsv, line 2: label '2' is not one of negative, positive"),
        ("sst2", ["index\tsentence", "0\ta film"], "dev.tsv, line 1: no column 'label' in index, sentence"),
        ("cola", ["gj04\t1\t\tok", "sentence\tlabel"], "dev.tsv, line 2: 2 columns, 4 are needed"),
        ("stsb", [STSB, "\t".join("012345678") + "\tnan"], "line 2: label 'nan' is not a number"),
        ("sst2", ["sentence\tlabel"], "dev.tsv has no examples of sst2"),
        ("squad", ["{", "x}"], "dev.tsv is not JSON: .*line 2"),
        ("squad", ['{"data": [{"paragraphs": [{"qas": [{"answers": []}]}]}]}'], r"data\[0\].paragraphs\[0\]: KeyError"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(name: str, lines: list[str], error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=error) as caught:
        tasks.load(name, write(tmp_path / "dev.tsv", *lines))
    assert "\n" not in str(caught.value)


def test_missing_data_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"has no dev-v1\.1\.json; task squad reads it"):
        tasks.load("squad", tmp_path)
    with pytest.raises(InputError, match=r"or its MRPC has no dev\.tsv or dev_ids\.tsv or msr_paraphrase_test\.txt"):
        tasks.load("mrpc", tmp_path)
    with pytest.raises(InputError, match="there is no file or folder"):
        tasks.load("squad", tmp_path / "x")
    with pytest.raises(InputError, match="no task 'sts3'; did you mean stsb"):
        tasks.load("sts3")
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(InputError, match=r"dev\.tsv, line 2: not UTF-8"):
        tasks.load("sst2", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"a folder with dev\.tsv, or pip install datasets"):
        tasks.load("sst2")


HUB: list[tuple[str, tuple[str, ...], str, list[dict[str, Any]], Any]] = [
    ("sst2", ("glue", "sst2"), "validation", [{"sentence": "s", "label": 1, "idx": 0}], tasks.Example(("s",), 1)),
    ("mrpc", ("glue", "mrpc"), "validation", [{"sentence1": "s", "sentence2": "t", "label": 0}],
     tasks.Example(("s", "t"), 0)),
    ("mnli-mm", ("glue", "mnli"), "validation_mismatched", [{"premise": "p", "hypothesis": "h", "label": 2}],
     tasks.Example(("p", "h"), 2)),
    ("stsb", ("glue", "stsb"), "validation", [{"sentence1": "s", "sentence2": "t", "label": 2.5}],
     tasks.Example(("s", "t"), 2.5)),
    ("sts-benchmark", ("mteb/stsbenchmark-sts",), "validation", [{"sentence1": "s", "sentence2": "t", "score": 3.0}],
     tasks.Example(("s", "t"), 3)),
    ("squad-v2", ("squad_v2",), "validation",
     [{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}], tasks.Question("q", "c", ())),
    ("wikitext-103", ("wikitext", "wikitext-103-raw-v1"), "test", [{"text": ""}, {"text": " = Cat = \n"}],
     " \n = Cat = \n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "split", "rows", "example"), HUB, ids=[item[0] for item in HUB])
def test_the_datasets_library_gives_the_same(
    name: str, path: tuple[str, ...], split: str, rows: list[dict[str, Any]], example: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[Any] = []

    def load_dataset(*words: str, split: str) -> list[dict[str, Any]]:
        asked.append((words, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert tasks.load(name).examples == (example,)
    assert asked == [(path, split)]


def test_a_failing_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*words: str, split: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"load_dataset\('glue', 'rte', split='validation'\) failed: no network"):
        tasks.load("rte")
