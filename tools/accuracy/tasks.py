"""GLUE, SQuAD, the STS benchmark and WikiText as their published files have them: load("sst2", "glue_data").

Formats: gluebenchmark.com (the dev sets, whose labels are public), rajpurkar.github.io/SQuAD-explorer, the STS
benchmark of ixa2.si.ehu.eus/stswiki, WikiText's raw files. Without a folder the `datasets` library gets the same sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nmcompile.errors import InputError

Kind = Literal["classes", "similarity", "answers", "language"]

OVERLAP = 128  # tokens that SQuAD's neighbouring windows share, as `stride` of the tokenizers library and run_qa.py
_PADS = ("[PAD]", "<pad>", "<|pad|>")


@dataclass(frozen=True)
class Example:
    """One or two texts and their class (an index of the benchmark's labels) or score."""

    texts: tuple[str, ...]
    gold: float


@dataclass(frozen=True)
class Question:
    """A question, the text that may hold its answer, and every gold answer; none where there is no answer."""

    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Tab-separated values without quoting: the columns of texts and label; `header` where the file has none."""

    texts: tuple[str, ...]
    label: str
    header: tuple[str, ...] = ()
    hub: tuple[str, ...] = ()  # the texts' names in the `datasets` library, where they differ
    short_rows: bool = False  # QQP has rows that break off; every reader leaves them out


@dataclass(frozen=True)
class Benchmark:
    """A published set: where its files lie, how they are read and what is measured.

    labels: in the published order, that of the `datasets` library; a file has them as words or as indexes.
    """

    name: str
    kind: Kind
    folders: tuple[str, ...]
    files: tuple[str, ...]  # the first that is there
    hub: tuple[str, ...]  # arguments of datasets.load_dataset
    metrics: tuple[str, ...]
    split: str = "validation"
    labels: tuple[str, ...] = ()
    columns: Columns = Columns((), "")
    unanswerable: bool = False  # SQuAD 2.0


@dataclass(frozen=True)
class Task:
    """A benchmark's examples, and where they came from; `skipped` rows had no label or broke off."""

    benchmark: Benchmark
    examples: tuple[Example, ...] | tuple[Question, ...] | tuple[str, ...]
    source: str
    skipped: int = 0


def _glue(
    name: str, folder: str, texts: Sequence[str], labels: Sequence[str], *measured: str, file: str = "dev.tsv",
    label: str = "label", config: str = "", **columns: Any,
) -> Benchmark:  # fmt: skip
    split = "validation" + file.removeprefix("dev").removesuffix(".tsv")
    read = Columns(tuple(texts), label, **columns)
    kind: Kind = "classes" if labels else "similarity"
    return Benchmark(
        name, kind, (folder,), (file,), ("glue", config or name), measured, split, tuple(labels), read
    )


_MNLI = ("entailment", "neutral", "contradiction")
_TWO = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
BENCHMARKS = {item.name: item for item in (
    _glue("cola", "CoLA", ["sentence"], ["unacceptable", "acceptable"], "matthews",
          header=("source", "label", "mark", "sentence")),
    _glue("sst2", "SST-2", ["sentence"], ["negative", "positive"], "accuracy"),
    _glue("mrpc", "MRPC", ["#1 String", "#2 String"], ["not_equivalent", "equivalent"], "accuracy", "f1",
          label="Quality", hub=_TWO),
    _glue("qqp", "QQP", ["question1", "question2"], ["not_duplicate", "duplicate"], "accuracy", "f1",
          label="is_duplicate", short_rows=True),
    _glue("stsb", "STS-B", _TWO, (), "pearson", "spearman", label="score"),
    _glue("mnli", "MNLI", _TWO, _MNLI, "accuracy", file="dev_matched.tsv", label="gold_label",
          hub=("premise", "hypothesis")),
    _glue("mnli-mm", "MNLI", _TWO, _MNLI, "accuracy", file="dev_mismatched.tsv", label="gold_label",
          hub=("premise", "hypothesis"), config="mnli"),
    _glue("qnli", "QNLI", ["question", "sentence"], _ENTAILS, "accuracy"),
    _glue("rte", "RTE", _TWO, _ENTAILS, "accuracy"),
    _glue("wnli", "WNLI", _TWO, ["not_entailment", "entailment"], "accuracy"),
    Benchmark("squad", "answers", (), ("dev-v1.1.json",), ("squad",), ("exact", "f1")),
    Benchmark("squad-v2", "answers", (), ("dev-v2.0.json",), ("squad_v2",), ("exact", "f1"), unanswerable=True),
    Benchmark("sts-benchmark", "similarity", ("stsbenchmark",), ("sts-dev.csv",), ("mteb/stsbenchmark-sts",),
              ("pearson", "spearman"),
              columns=Columns(_TWO, "score", header=("genre", "file", "year", "index", "score", *_TWO))),
    *(Benchmark(f"wikitext-{size}", "language", (f"wikitext-{size}-raw",), ("wiki.test.raw",),
                ("wikitext", f"wikitext-{size}-raw-v1"), ("perplexity",), "test") for size in (2, 103)),
)}  # fmt: skip
_ALIASES = {
    "sst-2": "sst2", "sts-b": "stsb", "mnli-m": "mnli", "mnli-matched": "mnli", "mnli-mismatched": "mnli-mm",
    "squad-v1.1": "squad", "squad-v2.0": "squad-v2", "squad2": "squad-v2", "stsbenchmark": "sts-benchmark",
    "wikitext": "wikitext-2", "wikitext2": "wikitext-2", "wikitext103": "wikitext-103",
}  # fmt: skip


# ---- loading ----------------------------------------------------------------------------------------------------


def benchmark(name: str) -> Benchmark:
    """By name, however it is spelled ("SST-2", "squad_v2"); InputError with the nearest name for another."""
    plain = name.lower().replace("_", "-")
    plain = _ALIASES.get(plain, plain)
    if plain in BENCHMARKS:
        return BENCHMARKS[plain]
    near = get_close_matches(plain, [*BENCHMARKS, *_ALIASES], n=1)
    meant = f"did you mean {_ALIASES.get(near[0], near[0])}?" if near else f"choose one of {', '.join(BENCHMARKS)}"
    raise InputError(f"there is no task {name!r}; {meant}")


def load(name: str, data: str | Path | None = None) -> Task:
    """The examples of a benchmark's development set (WikiText: test set) with their gold answers.

    data: the published file, its folder, or the folder of all GLUE tasks; None asks the `datasets` library.
    InputError names the task, file or line that is wrong.
    """
    chosen = benchmark(name)
    if data is None:
        task = _from_hub(chosen)
    elif chosen.kind == "answers":
        file = _find(chosen, Path(data))
        task = Task(chosen, tuple(_questions(file)), str(file))
    elif chosen.kind == "language":
        file = _find(chosen, Path(data))
        task = Task(chosen, (_text(file),), str(file))
    else:
        task = _from_table(chosen, Path(data))
    if not any(task.examples):
        raise InputError(f"{task.source} has no examples of {chosen.name}")
    return task


def _find(chosen: Benchmark, data: Path, *others: str) -> Path:
    """The file itself, or the first of the benchmark's that lies in the folder or in its own folder there."""
    if not data.exists():
        raise InputError(f"there is no file or folder {data}")
    if data.is_file():
        return data
    files = [*chosen.files, *others]
    for folder in (data, *(data / name for name in chosen.folders)):
        for file in files:
            if (folder / file).is_file():
                return folder / file
    inside = "".join(f" or its {name}" for name in chosen.folders)
    raise InputError(f"{data}{inside} has no {' or '.join(files)}; task {chosen.name} reads it")


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")  # msr_paraphrase_*.txt begin with a byte-order mark
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}, line {line}: not UTF-8") from None


def _from_table(chosen: Benchmark, data: Path) -> Task:
    """GLUE's dev file; MRPC without one is cut from Microsoft's as GLUE's script does, or is Microsoft's test set."""
    keep: set[tuple[str, ...]] = set()
    if chosen.name != "mrpc":
        file = _find(chosen, data)
    else:
        file = _find(chosen, data, "dev_ids.tsv", "msr_paraphrase_test.txt")
        if file.name == "dev_ids.tsv":
            keep = {tuple(row) for _, row in _rows(file)}
            file = file.with_name("msr_paraphrase_train.txt")
    examples, skipped = [], 0
    for example in _examples(chosen, file, keep):
        if example is None:
            skipped += 1
        else:
            examples.append(example)
    return Task(chosen, tuple(examples), str(file), skipped)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of lines that are not blank. Quotes are text, only \\n ends a line (csv splits at more)."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r").split("\t")


def _examples(chosen: Benchmark, file: Path, keep: Collection[tuple[str, ...]]) -> Iterator[Example | None]:
    """None for a row to skip. `keep`: the (#1 ID, #2 ID) of MRPC to take, all when empty."""
    columns, rows = chosen.columns, _rows(file)
    header = list(columns.header) or next(rows, (1, [""]))[1]
    wanted = [*columns.texts, columns.label]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InputError(f"{file}, line 1: no column {missing[0]!r} in {', '.join(header)[:200]}")
    places = [header.index(name) for name in wanted]
    for number, row in rows:
        if keep and tuple(row[1:3]) not in keep:
            continue
        if len(row) > max(places):
            *texts, label = (row[place] for place in places)
            yield Example(tuple(texts), _gold(chosen, label, f"{file}, line {number}")) if label != "-" else None
        elif columns.short_rows:
            yield None
        else:
            raise InputError(f"{file}, line {number}: {len(row)} columns, {max(places) + 1} are needed")


def _gold(chosen: Benchmark, label: object, where: str) -> float:
    text = str(label).strip()
    if text in chosen.labels:
        return chosen.labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if value in range(len(chosen.labels)) or (not chosen.labels and np.isfinite(value)):
        return value
    allowed = f"one of {', '.join(chosen.labels)} or its index" if chosen.labels else "a number"
    raise InputError(f"{where}: label {text[:40]!r} is not {allowed}")


def _questions(file: Path) -> Iterator[Question]:
    try:
        content = json.loads(_text(file))
    except ValueError as error:  # says line and column
        raise InputError(f"{file} is not JSON: {error}") from None
    where = "data"
    try:
        for i, article in enumerate(content["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                where = f"data[{i}].paragraphs[{j}]"
                for item in paragraph["qas"]:
                    answers = tuple(str(answer["text"]) for answer in item["answers"])
                    yield Question(str(item["question"]), str(paragraph["context"]), answers)
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not a SQuAD file: {where}: {type(error).__name__} {error}") from None


def _from_hub(chosen: Benchmark) -> Task:
    try:
        import datasets
    except ImportError:
        files = " or ".join(chosen.files)
        raise InputError(f"task {chosen.name} needs its data: a folder with {files}, or pip install datasets") from None
    source = f"datasets.load_dataset({', '.join(map(repr, chosen.hub))}, split={chosen.split!r})"
    try:
        rows: Iterable[Any] = datasets.load_dataset(*chosen.hub, split=chosen.split)
    except (OSError, ValueError) as error:
        raise InputError(f"{source} failed: {' '.join(str(error).split())[:300]}") from None
    if chosen.kind == "language":  # a line of the file each, without the " \n" of empty ones
        return Task(chosen, ("".join(row["text"] or " \n" for row in rows),), source)
    if chosen.kind == "answers":
        found = (Question(row["question"], row["context"], tuple(row["answers"]["text"])) for row in rows)
        return Task(chosen, tuple(found), source)
    texts = chosen.columns.hub or chosen.columns.texts
    label = "score" if chosen.name == "sts-benchmark" else "label"
    return Task(chosen, tuple(
        Example(tuple(row[name] for name in texts), _gold(chosen, row[label], f"{source}, row {i}"))
        for i, row in enumerate(rows)
    ), source)  # fmt: skip


# ---- tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One sequence: tokens and their types."""

    ids: Sequence[int]
    types: Sequence[int]


Encode = Callable[[Sequence[tuple[str, ...]]], list[Row]]


def copy_tokenizer(given: Any) -> Any:
    """A copy, which may be changed."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("tasks need the tokenizers package: pip install nmcompile[hf]") from None
    try:
        return Tokenizer.from_file(str(given)) if isinstance(given, str | Path) else Tokenizer.from_str(given.to_str())
    except Exception as error:  # the only class that tokenizers raises
        raise InputError(f"{given} is not a readable tokenizer.json: {error}") from None


def pad_id(model: Any) -> int:
    known = [token for token in map(model.token_to_id, _PADS) if token is not None]
    return int((model.padding or {}).get("pad_id", known[0] if known else 0))


def encoder(model: Any, length: int) -> Encode:
    """Each a text or a pair -> rows of at most `length` tokens; of a pair the longer text is cut first."""
    if length <= model.num_special_tokens_to_add(True):
        raise InputError(f"a max length of {length} tokens leaves no room for text")
    model.no_padding()
    model.enable_truncation(length)
    return lambda texts: [
        Row(found.ids, found.type_ids) for found in model.encode_batch([t if len(t) > 1 else t[0] for t in texts])
    ]


@dataclass(frozen=True)
class Window:
    """Part of a question's context. spans: int32 [tokens, 2], the characters of each; allowed: bool [tokens]."""

    question: int
    row: Row
    spans: np.ndarray
    allowed: np.ndarray


def windows(number: int, question: Question, model: Any, length: int) -> Iterator[Window]:
    """[CLS] question [SEP] context [SEP] (or as the tokenizer joins pairs), windows of the context sharing OVERLAP."""
    asked = model.encode(question.question, add_special_tokens=False)
    context = model.encode(question.context, add_special_tokens=False)
    room = length - model.num_special_tokens_to_add(True) - len(asked.ids)
    if room < 2:
        raise InputError(f"a max length of {length} tokens leaves no room after {question.question[:60]!r}; raise it")
    context.truncate(room, stride=min(OVERLAP, room // 2))
    for part in (context, *context.overflowing):
        found = model.post_process(asked, part)
        allowed = np.array([sequence == 1 for sequence in found.sequence_ids])
        spans = np.zeros((len(allowed), 2), np.int32)
        spans[allowed] = part.offsets  # those of `found` are wrong where the tokenizer trims spaces: it did so twice
        yield Window(number, Row(found.ids, found.type_ids), spans, allowed)


def lm_windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored token): all but the very first once, with length - stride before it."""
    begin, scored = 0, 1
    while scored < tokens:
        end = min(begin + length, tokens)
        yield begin, end, max(scored, begin + 1)
        begin, scored = begin + stride, end
