"""Plain English paragraphs out of docstrings, reStructuredText, Markdown, HTML and manual pages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

LEAST, MOST = 30, 600  # characters of a paragraph
WORDS = 5  # of a paragraph, at least
COMMON = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "do", "for", "from", "had", "has", "have",
    "he", "her", "his", "i", "if", "in", "into", "is", "it", "its", "may", "more", "must", "my", "no", "not", "of",
    "on", "one", "or", "our", "she", "so", "than", "that", "the", "their", "them", "then", "there", "these", "they",
    "this", "to", "was", "we", "were", "what", "when", "which", "who", "will", "with", "would", "you", "your",
})  # fmt: skip
COMMON_SHARE = 0.15  # of the words; English prose has 0.4, lists of names hardly any
LETTERS_SHARE = 0.88  # letters and blanks among the characters
CODE_SHARE = 0.025  # of characters that prose hardly has

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.M | re.S)
_BLANK = re.compile(r"\n[ \t]*\n")
_RULE = re.compile(r"^\s*([=\-~^\"'`*+#_.:])\1{2,}[\s=\-+|]*$", re.M)
_CODE_LINE = re.compile(
    r"^\s*(>>>|\.\.\. |\$ |In \[|\.\. |\||\+[-=]|@\w|#!|:\w+:\s*$|import |from \w+ import|def |class )", re.M
)
_ITEM = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,2}[.)]|:\w+(?: [^:\n]*)?:)\s+", re.M)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_MARKUP = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), " "),  # images
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # Markdown's links
    (re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # roles
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`_+"), r"\1"),  # reStructuredText's links
    (re.compile(r"`+([^`]+)`+_*"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<!\w)[*_]([^*_\n]+)[*_](?!\w)"), r"\1"),
    (re.compile(r"https?://\S+"), " "),
    (re.compile(r"\[[\w#-]*\]_?"), " "),  # references and footnotes
)
_OTHER = re.compile(r"[^a-z0-9]+")
_SKIPPED_WORDS = ("copyright", "all rights reserved", "warranty", "licensed under", "spdx-license")


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a text whose paragraphs are divided by blank lines, white space collapsed, LEAST to MOST characters;
    marks within a line stay, as models meet them.

    Code, tables, headings and lists of names are left out; items of lists and fields of docstrings are paragraphs of
    their own; what is longer is cut between sentences.
    """
    code = None  # indentation of the text that announced a block of code by a double colon
    for block in _BLANK.split(_FENCE.sub("\n\n", text.expandtabs(4))):
        if not block.strip():
            continue
        indent = len(block) - len(block.lstrip(" \n"))
        if code is not None and indent > code:
            continue
        code = indent if block.rstrip().endswith("::") else None
        if _RULE.search(block) or _CODE_LINE.search(block):
            continue
        for item in _ITEM.split(block):
            yield from _pieces(" ".join(item.split()))


def without_tags(text: str) -> str:
    """HTML, or Markdown with HTML in it, as text: paragraphs, items and rows are divided by blank lines."""
    text = re.sub(r"<(script|style|pre|table)\b.*?</\1>", "\n\n", text, flags=re.S | re.I)
    text = re.sub(r"</?(?:p|li|ul|ol|div|br|h[1-6]|dt|dd|note|important)\b[^<>]*>", "\n\n", text, flags=re.I)
    return html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text))


def is_prose(text: str) -> bool:
    """Of English words for the most part, and neither code nor a licence."""
    words = text.lower().split()
    common = sum(word.strip(".,;:!?()\"'") in COMMON for word in words)
    if len(words) < WORDS or common < COMMON_SHARE * len(words):
        return False
    letters = sum(letter.isalpha() or letter == " " for letter in text)
    code = sum(letter in "=(){}[]<>_|\\/@#$%^*+~" for letter in text)
    return (
        letters >= LETTERS_SHARE * len(text)
        and code <= 1 + CODE_SHARE * len(text)
        and not any(word in text.lower() for word in _SKIPPED_WORDS)
    )


def _pieces(text: str) -> Iterator[str]:
    for piece in joined(_SENTENCE.split(text), MOST) if len(text) > MOST else [text]:
        if LEAST <= len(piece) <= MOST and is_prose(_plain(piece)):
            yield piece


def _plain(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def joined(parts: Iterable[str], most: int) -> Iterator[str]:
    """Neighbours put together while they are at most `most` characters long."""
    held = ""
    for part in parts:
        if held and len(held) + 1 + len(part) > most:
            yield held
            held = part
        else:
            held = f"{held} {part}" if held else part
    if held:
        yield held


def windows(text: str, most: int = MOST) -> Iterator[str]:
    """A text without sentences or paragraphs, cut between words; a short rest is left out."""
    return (piece for piece in joined(text.split(), most) if len(piece) >= LEAST and is_prose(piece))


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words, by which texts of other layout and markup are known as the same."""
    return tuple(_OTHER.sub(" ", text.lower()).split())


def manual(text: str) -> Iterator[str]:
    """The prose of a manual page in roff."""
    text = re.sub(r"^(?:\.\\\"|'\\\").*$", "", text, flags=re.M)
    text = re.sub(r"^\.(?:EX|nf)\b.*?^\.(?:EE|fi)\b", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^\.(?:[BI]|BR|IR|BI|RB|RI|IB|SM|Nm|Fl|Ar|Em|Xr|Pa)\b *(.*)$", r"\1", text, flags=re.M)
    text = re.sub(r"^[.'].*$", "\n", text, flags=re.M)  # every other request begins a paragraph
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\&|\\/|\\,|\\%|\\:|\\c", "", text)
    text = re.sub(
        r"\\\(..|\\\[\w+\]|\\\*\(..|\\\*.", " ", text.replace("\\-", "-").replace("\\(aq", "'").replace("\\ ", " ")
    )
    return paragraphs(text)
