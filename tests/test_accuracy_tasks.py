"""Models of known score on published tasks, and the command that scores them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from accuracy_cases import ID, MNLI, MRPC, WORDS, array, squad_file, words_tokenizer, write
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models

import nmcompile
from nmcompile.errors import InputError
from tools.accuracy import metrics, tasks
from tools.accuracy.metrics import Arrays, Feeds, evaluate
from tools.accuracy.task_cli import command, markdown

MODELS = Path(__file__).parents[1] / "models"


# ---- models -----------------------------------------------------------------------------------------------------


def has(feeds: Feeds, word: str) -> np.ndarray:
    """bool [batch]: which rows hold the word."""
    return np.asarray((feeds["input_ids"] == ID[word]).any(axis=1))


def sst2(folder: Path, count: int = 70) -> tasks.Task:
    """Sentences of different lengths, good ones and bad ones; every third is good."""
    kinds = [("bad", "good")[i % 3 == 0] for i in range(count)]
    rows = [f"the {'very ' * (i * 7 % 11)}{kind} film\t{int(kind == 'good')}" for i, kind in enumerate(kinds)]
    return tasks.load("sst2", write(folder / "dev.tsv", "sentence\tlabel", *rows))


def test_classes_come_back_in_order_whatever_the_batches(tmp_path: Path, tokenizer: Path) -> None:
    seen: list[tuple[int, int]] = []

    def run(feeds: Feeds) -> Arrays:
        assert list(feeds) == ["input_ids", "attention_mask"] and all(v.dtype == np.int64 for v in feeds.values())
        assert (feeds["input_ids"][feeds["attention_mask"] == 0] == ID["[PAD]"]).all()
        good = has(feeds, "good")
        seen.append(feeds["input_ids"].shape)
        return {"logits": np.stack([~good, good], axis=1).astype(np.float32)}

    task, told = sst2(tmp_path), []
    given = ("input_ids", "attention_mask")
    scores = evaluate(task, run, tokenizer, inputs=given, progress=lambda done, total: told.append((done, total)))
    assert scores == {"accuracy": 1.0}
    assert [rows for rows, _ in seen] == [32, 32, 6] and told == [(32, 70), (64, 70), (70, 70)]
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True) and seen[0][1] == 15
    wrong = evaluate(task, run, tokenizer, inputs=given, labels=["positive", " Negative"])
    assert wrong == {"accuracy": 0.0}
    assert evaluate(task, lambda feeds: {"y": np.ones((len(feeds["input_ids"]), 2))}, tokenizer) == {
        "accuracy": pytest.approx(46 / 70)  # always the first class
    }
    seen.clear()
    cut = evaluate(task, run, tokenizer, inputs=given, limit=5, max_length=4, batch=2)
    assert cut == {"accuracy": 4 / 5}  # "the very" tells nothing, so number 3 of the good ones (0 and 3) passes for bad
    assert seen == [(2, 4), (2, 4), (1, 4)]


def test_without_a_mask_only_equal_lengths_share_a_batch(tmp_path: Path, tokenizer: Path) -> None:
    def run(feeds: Feeds) -> Arrays:
        assert list(feeds) == ["input_ids"] and (feeds["input_ids"] != ID["[PAD]"]).all()
        good = has(feeds, "good")
        return {"logits": np.stack([~good, good], axis=1).astype(np.float32)}

    assert evaluate(sst2(tmp_path), run, tokenizer, inputs=["input_ids"]) == {"accuracy": 1.0}


def test_labels_in_the_models_order(tmp_path: Path, tokenizer: Path) -> None:
    rows = ["\t".join("01234567") + f"\tthe cat sat\t{word}\t" + "\t".join("abcde") + f"\t{label}" for word, label in
            (("yes", "entailment"), ("no", "contradiction"), ("maybe", "neutral"))]  # fmt: skip
    task = tasks.load("mnli", write(tmp_path / "dev_matched.tsv", MNLI, *rows))

    def run(feeds: Feeds) -> Arrays:  # its order: contradiction, entailment, neutral
        assert feeds["token_type_ids"].tolist() == [[0] * 5 + [1] * 2] * 3  # [CLS] a a a [SEP] b [SEP]
        return {"logits": np.stack([has(feeds, word) for word in ("no", "yes", "maybe")], axis=1).astype(np.float32)}

    assert evaluate(task, run, tokenizer, labels=["contradiction", "entailment", "neutral"]) == {"accuracy": 1.0}
    assert evaluate(task, run, tokenizer) == {"accuracy": 0.0}
    with pytest.raises(InputError, match="labels yes,no are not the task's, in any order: entailment,neutral"):
        evaluate(task, run, tokenizer, labels=["yes", "no"])


def test_two_metrics_and_matthews(tmp_path: Path, tokenizer: Path) -> None:
    def run(feeds: Feeds) -> Arrays:  # finds yes where yes or maybe is: 2 true positives, 1 false positive
        found = has(feeds, "yes") | has(feeds, "maybe")
        return {"logits": np.stack([~found, found], axis=1).astype(np.float32)}

    pairs = [(1, "yes", "one"), (1, "yes", "two two"), (0, "maybe", "one"), (0, "no", "one"), (1, "no", "one")]
    lines = [f"{label}\t0\t0\t{first}\t{second}" for label, first, second in pairs]
    task = tasks.load("mrpc", write(tmp_path / "dev.tsv", MRPC, *lines))
    assert evaluate(task, run, tokenizer) == pytest.approx({"accuracy": 3 / 5, "f1": 4 / 6})
    cola = tasks.load("cola", write(tmp_path / "cola.tsv", "x\t1\t\tyes one", "x\t0\t*\tno", "x\t0\t*\tmaybe two"))
    assert evaluate(cola, run, tokenizer) == {"matthews": pytest.approx((1 * 1 - 0) / math.sqrt(2 * 1 * 2 * 1))}


def sts(folder: Path) -> tasks.Task:
    """Second texts of 3, 1 and 2 words of the first's three, scored so."""
    rows = [f"g\tf\ty\t{i}\t{score}\tone two three\t{text}" for i, (score, text) in enumerate(
        [(5.0, "one two three"), (1.0, "one five five"), (3.0, "one two five five")])]  # fmt: skip
    return tasks.load("sts-benchmark", write(folder / "sts-dev.csv", *rows))


def test_similarity_by_a_score(tmp_path: Path, tokenizer: Path) -> None:
    def run(feeds: Feeds) -> Arrays:
        assert (feeds["token_type_ids"] == 1).any()  # both texts at once
        return {"logits": 5.0 - (feeds["input_ids"] == ID["five"]).sum(axis=1, keepdims=True)}  # 5, 3, 3

    ranks = 1.5 / math.sqrt(2 * 1.5)  # of ranks 3, 1.5, 1.5 and 3, 1, 2
    assert evaluate(sts(tmp_path), run, tokenizer) == pytest.approx(
        {"pearson": 4 / math.sqrt(8 / 3 * 8), "spearman": ranks}
    )


def test_similarity_by_the_cosine_of_means(tmp_path: Path, tokenizer: Path) -> None:
    def run(feeds: Feeds) -> Arrays:
        hidden = np.eye(len(WORDS))[feeds["input_ids"]] * (feeds["input_ids"] > 3)[..., None]  # special tokens: zeros
        return {"last_hidden_state": hidden, "pooler_output": hidden[:, 0]}

    cosines = array(1, 1 / math.sqrt(3 * 5), 2 / math.sqrt(3 * 6))  # counts of one two three five
    gold = array(5, 1, 3)
    found = evaluate(sts(tmp_path), run, tokenizer)
    assert found == pytest.approx({"pearson": metrics.pearson(cosines, gold), "spearman": 1})
    pooled = lambda feeds: {"sentence_embedding": run(feeds)["last_hidden_state"].sum(1)}  # noqa: E731
    assert evaluate(sts(tmp_path), pooled, tokenizer) == pytest.approx(found)


LONG = "whale " + "it runs . " * 12 + "the blue whale sleeps " + "the dog sat . " * 6  # the answer is in the middle


def finder(word: str, last: str = "") -> Callable[[Feeds], Arrays]:
    """A model that answers from `word` to `last`; where the word is not, its logits point at [CLS]."""

    def run(feeds: Feeds) -> Arrays:
        context = feeds["token_type_ids"] == 1
        start, end = ((feeds["input_ids"] == ID[item]) & context for item in (word, last or word))
        cls = feeds["input_ids"] == ID["[CLS]"]
        return {"end_logits": 9.0 * end + 5 * cls, "start_logits": 9.0 * start + 5 * cls}

    return run


def silent(feeds: Feeds) -> Arrays:
    return {name: np.zeros(feeds["input_ids"].shape) for name in ("start_logits", "end_logits")}


def test_squad_windows_cover_a_long_text(tmp_path: Path, tokenizer: Path) -> None:
    items = [(LONG, "who sleeps?", ["x", "the blue whale"]), ("a cat", "who?", ["cat"])]
    task = tasks.load("squad", squad_file(tmp_path / "dev-v1.1.json", *items))
    widths = []

    def run(feeds: Feeds) -> Arrays:
        widths.append(feeds["input_ids"].shape[1])
        return {name: found + finder("cat")(feeds)[name] for name, found in finder("blue", "whale")(feeds).items()}

    assert evaluate(task, run, tokenizer, max_length=24, batch=1) == {"exact": 100, "f1": 100}
    assert len(widths) > 5 and max(widths) == 24
    assert evaluate(task, run, tokenizer) == {"exact": 100, "f1": 100}  # one window of each
    # Equal logits: the first word of the text, "whale" of "blue whale" (F1 2/3) and "a", which normalises to nothing.
    wrong = evaluate(task, silent, tokenizer, max_length=24)
    assert wrong == pytest.approx({"exact": 0, "f1": 100 / 3})


def test_squad_v2_may_have_no_answer(tmp_path: Path, tokenizer: Path) -> None:
    items: list[tuple[str, str, list[str]]] = [(LONG, "who?", ["blue whale"]), ("the sea", "?", []), ("a cat", "?", [])]
    task = tasks.load("squad-v2", squad_file(tmp_path / "dev-v2.0.json", *items))
    assert evaluate(task, finder("blue", "whale"), tokenizer, max_length=24) == {"exact": 100, "f1": 100}
    # Answers "cat" where none is right, and none where there is one: only the second question is right.
    assert evaluate(task, finder("cat"), tokenizer, max_length=24) == pytest.approx({"exact": 100 / 3, "f1": 100 / 3})


def test_offsets_of_a_byte_level_tokenizer_are_those_of_the_text() -> None:
    model = Tokenizer(token_models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(["the blue whalé sleeps the"] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    model.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    question = tasks.Question("who sleeps?", "the blue whalé sleeps the blue whalé", ())
    found = list(tasks.windows(0, question, model, 6 + len(model.encode("who sleeps?").ids)))
    words = [[question.context[a:b] for a, b in window.spans[window.allowed]] for window in found]
    assert words[0] == ["the", "blue", "whalé", "sleeps"] and words[-1][-1] == "whalé"
    assert all(set(part) <= {"the", "blue", "whalé", "sleeps"} for part in words)
    assert len(found[0].row.ids) == len(found[0].allowed) and found[0].row.ids[0] == 0


def language(feeds: Feeds) -> Arrays:
    """Next of one, two, three, four, five, six: the following one with probability 3/4, wherever it stands."""
    following = {ID[a]: ID[b] for a, b in zip(NUMBERS, NUMBERS[1:] + NUMBERS[:1], strict=True)}
    logits = np.full((*feeds["input_ids"].shape, len(WORDS)), math.log(0.25 / (len(WORDS) - 1)), np.float32)
    for place, token in np.ndenumerate(feeds["input_ids"]):
        if int(token) in following:
            logits[(*place, following[int(token)])] = math.log(0.75)
    return {"logits": logits}


NUMBERS = ["one", "two", "three", "four", "five", "six"]


def test_perplexity_of_a_known_language(tmp_path: Path, tokenizer: Path) -> None:
    task = tasks.load("wikitext-2", write(tmp_path / "wiki.test.raw", *[" ".join(NUMBERS) + " "] * 5))
    for length, batch in ((1024, None), (8, None), (7, 4), (2, 1)):
        found = evaluate(task, language, tokenizer, max_length=length, batch=batch)
        assert found == {"perplexity": pytest.approx(4 / 3, rel=1e-5)}
    shapes: list[tuple[int, ...]] = []

    def even(feeds: Feeds) -> Arrays:
        shapes.append(feeds["input_ids"].shape)
        assert ID["[CLS]"] not in feeds["input_ids"]
        return {"logits": np.zeros((*feeds["input_ids"].shape, 50))}

    assert evaluate(task, even, tokenizer, max_length=8, limit=2) == {"perplexity": pytest.approx(50)}
    assert shapes == [(1, 8), (1, 8)]


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        ({"logits": (2, 3)}, r"the model gives logits \[2, 3\]; the task needs logits \[batch, 2\]"),
        ({"hidden": (2, 5, 8), "pooled": (2, 8)}, r"gives hidden \[2, 5, 8\], pooled \[2, 8\]; the task needs logits"),
    ],
)
def test_a_model_without_the_output_says_what_it_has(
    outputs: dict[str, tuple[int, ...]], error: str, tmp_path: Path, tokenizer: Path
) -> None:
    def run(feeds: Feeds) -> Arrays:
        return {name: np.zeros(shape) for name, shape in outputs.items()}

    with pytest.raises(InputError, match=error):
        evaluate(sst2(tmp_path, 2), run, tokenizer)


def test_other_misfits_are_named(tmp_path: Path, tokenizer: Path) -> None:
    task = sst2(tmp_path, 2)
    with pytest.raises(InputError, match="takes input_ids, position_ids; tasks feed input_ids, attention_mask, token"):
        evaluate(task, silent, tokenizer, inputs=["input_ids", "position_ids"])
    with pytest.raises(InputError, match="outputs hold NaN"):
        evaluate(task, lambda feeds: {"logits": np.full((2, 2), np.nan)}, tokenizer)
    with pytest.raises(InputError, match=r"is not a readable tokenizer\.json"):
        evaluate(task, silent, tmp_path / "none.json")
    with pytest.raises(InputError, match="leaves no room for text"):
        evaluate(task, silent, tokenizer, max_length=3)
    with pytest.raises(InputError, match="task sts-benchmark has no labels"):
        evaluate(sts(tmp_path), silent, tokenizer, labels=["x"])
    squad = tasks.load("squad", squad_file(tmp_path / "q.json", ("a cat", "who is it ?", ["cat"])))
    with pytest.raises(InputError, match=r"gives y \[1, 9\]; the task needs start_logits \[batch, tokens\]"):
        evaluate(squad, lambda feeds: {"y": silent(feeds)["end_logits"]}, tokenizer)
    with pytest.raises(InputError, match="leaves no room after 'who is it"):
        evaluate(squad, silent, tokenizer, max_length=8)
    wiki = tasks.load("wikitext", write(tmp_path / "wiki.test.raw", "one two three"))
    with pytest.raises(InputError, match=r"need logits \[batch, tokens, 33 or more\]"):
        evaluate(wiki, lambda feeds: {"logits": np.zeros((1, 3, 8))}, tokenizer)


def test_the_callers_tokenizer_is_not_changed(tmp_path: Path) -> None:
    model = words_tokenizer()
    model.enable_padding(pad_id=0, length=40)
    before = model.to_str()
    evaluate(sst2(tmp_path, 3), lambda feeds: {"logits": np.zeros((3, 2))}, model)
    assert model.to_str() == before


# ---- the command ------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def mnli(folder: Path) -> Path:
    rows: Sequence[str] = [
        "\t".join("01234567") + f"\tthe cat {'very ' * i}sat\t{WORDS[4 + i]}\t" + "\t".join("abcde") + f"\t{label}"
        for i, label in enumerate(["entailment", "neutral", "contradiction", "neutral"])
    ]
    return write(folder / "MNLI/dev_matched.tsv", MNLI, *rows)


def test_the_command_compares_a_plan_with_its_model(tmp_path: Path, tokenizer: Path) -> None:
    model, plan, out = MODELS / "bert-classifier.onnx", tmp_path / "m.plan", tmp_path / "out.json"
    nmcompile.compile(model, plan, preset="fast", measure=False)
    mnli(tmp_path)
    result = invoke(model, plan, "--task", "mnli", "--data", tmp_path, "--tokenizer", tokenizer, "--json", out,
                    "--threads", 1, "--limit", 3, "--max-length", 16)  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["| model | accuracy | of the first |", "|---|---:|---:|"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {model}", f"| {plan}"]
    assert "mnli: 4 examples of" in result.stderr
    saved = json.loads(out.read_text())
    assert saved["task"] == "mnli" and saved["limit"] == 3
    assert list(saved["models"]) == [str(model), str(plan)]
    assert all(scores["accuracy"] in (0, 1 / 3, 2 / 3, 1) for scores in saved["models"].values())


@pytest.mark.parametrize(
    ("model", "name", "columns"),
    [("bert-qa", "squad", 5), ("bert-dynamo", "sts-benchmark", 5), ("gpt2-dynamo", "wikitext-2", 3)],
)
def test_the_command_runs_every_kind(
    model: str, name: str, columns: int, tmp_path: Path, tokenizer: Path
) -> None:
    squad_file(tmp_path / "dev-v1.1.json", ("the blue whale lives in the sea", "where is it ?", ["the sea"]))
    write(tmp_path / "wiki.test.raw", " ".join(NUMBERS * 4))
    sts(tmp_path)
    result = invoke(MODELS / f"{model}.onnx", "--task", name, "--data", tmp_path, "--tokenizer", tokenizer,
                    "--max-length", 16, "--threads", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    cells = result.stdout.splitlines()[2].strip("| ").split(" | ")
    assert len(cells) == columns and math.isfinite(float(cells[1]))
    if name == "wikitext-2":
        assert float(cells[1]) > 1 and cells[2] == "100%"


def test_shares_are_of_the_first() -> None:
    found = {"a": {"exact": 80.0, "f1": 0.0}, "b": {"exact": 60.0, "f1": 1.0}}
    assert markdown(found).splitlines() == [
        "| model | exact | of the first | f1 | of the first |",
        "|---|---:|---:|---:|---:|",
        "| a | 80.0000 | 100% | 0.0000 | - |",
        "| b | 60.0000 | 75% | 1.0000 | - |",
    ]


def test_models_of_fixed_sizes_are_fed_them(tmp_path: Path, tokenizer: Path) -> None:
    import onnx

    from tools.accuracy.task_cli import open_model

    graph = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (int32[4,6] input_ids, int32[4,6] attention_mask) => (float[4,6] y) { s = Add(input_ids, attention_mask)
          y = Cast <to = 1> (s) }
    """)
    onnx.save(graph, tmp_path / "m.onnx")
    model = open_model(tmp_path / "m.onnx")
    assert (model.inputs, model.batch, model.tokens) == (("input_ids", "attention_mask"), 4, 6)
    ids = np.array([[5, 6], [7, 0]])
    assert model.run({"input_ids": ids, "attention_mask": ids * 0 + 1})["y"].tolist() == [[6, 7], [8, 1]]


def test_bad_input_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    mnli(tmp_path)
    good = MODELS / "bert-classifier.onnx"
    broken = write(tmp_path / "broken.onnx", "x")
    for words, error in [
        ([tmp_path / "none.onnx", "--task", "mnli", "--data", tmp_path], "there is no file"),
        ([good, "--task", "mnlj", "--data", tmp_path], "did you mean mnli?"),
        ([good, "--task", "sst2", "--data", tmp_path], "has no dev.tsv"),
        ([MODELS / "bert-dynamo.onnx", "--task", "mnli", "--data", tmp_path], "the task needs logits [batch, 3]"),
        ([broken, "--task", "mnli", "--data", tmp_path], "onnxruntime cannot open"),
        ([good, "--task", "mnli", "--data", tmp_path, "--labels", "a,b"], "labels a,b are not the task's"),
        ([good, "--task", "mnli", "--data", tmp_path, "--json", tmp_path], "is a folder"),
    ]:
        result = invoke(*words, "--tokenizer", tokenizer)
        assert result.exit_code == 1, (error, result.output)
        assert error in result.stderr.splitlines()[-1] and result.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.stderr and not result.stdout
