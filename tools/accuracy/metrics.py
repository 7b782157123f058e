"""What the published benchmarks measure, first as functions of arrays and strings, then of a model.

    task = load("sst2", "glue_data")
    evaluate(task, session.run, "tokenizer.json")      # -> {"accuracy": 0.91}
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np

from nmcompile.errors import InputError
from tools.accuracy.tasks import (
    Encode,
    Example,
    Kind,
    Question,
    Row,
    Task,
    copy_tokenizer,
    encoder,
    lm_windows,
    pad_id,
    windows,
)

Feeds = dict[str, np.ndarray]
Arrays = Mapping[str, np.ndarray]
Run = Callable[[Feeds], Arrays]
Metric = Callable[[np.ndarray, np.ndarray], float]  # (predicted [n], gold [n]) -> score, higher is better

FEEDS = ("input_ids", "attention_mask", "token_type_ids")  # int64 [batch, tokens]
LENGTH: dict[Kind, int] = {"classes": 128, "similarity": 128, "answers": 384, "language": 1024}  # tokens
BATCH: dict[Kind, int] = {"classes": 32, "similarity": 32, "answers": 16, "language": 1}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ---- classes ----------------------------------------------------------------------------------------------------


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Share of equal elements."""
    return float(np.mean(predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 when it is neither predicted nor there."""
    hits, positives = np.sum((predicted == 1) & (gold == 1)), np.sum(predicted == 1) + np.sum(gold == 1)
    return float(2 * hits / positives) if positives else 0.0


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews' correlation of two classes 0 and 1 in [-1, 1]; 0 when either side has one class only."""
    return pearson(predicted == 1, gold == 1)  # the phi coefficient is Pearson's of the indicators


# ---- numbers ----------------------------------------------------------------------------------------------------


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Correlation in [-1, 1]; 0 when either side is constant, where it is not defined."""
    x, y = (np.asarray(side, np.float64) for side in (predicted, gold))
    if x.size == 0 or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)))


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson's correlation of ranks; equal values share the mean of their ranks."""
    return pearson(ranks(predicted), ranks(gold))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [n]; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each group of equals
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman,
}  # fmt: skip


# ---- sentences --------------------------------------------------------------------------------------------------


def mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[batch, hidden], the mean over the tokens that mask [batch, tokens] leaves of hidden [batch, tokens, hidden]."""
    kept = mask[..., None].astype(bool)
    total = np.where(kept, hidden, 0).sum(axis=1, dtype=np.float64)  # where: padding may hold anything, NaN too
    return np.asarray(total / np.maximum(kept.sum(axis=1), 1))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n], of the rows of a and b [n, hidden]; 0 for a row of zeros."""
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.where(norm == 0, 1, norm))


# ---- answers in a text ------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and repeated spaces, in the order of SQuAD's evaluate-v1.1.py."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad(prediction: str, answers: Sequence[str], *, unanswerable: bool = False) -> tuple[float, float]:
    """(exact match, F1 of words), each 0 to 1, the best over the gold `answers`.

    unanswerable: by the rules of evaluate-v2.0.py, where no answers mean that "" is right, answers that normalise to
    nothing do not count, and F1 with an empty side is 1 when both are empty. Else those of evaluate-v1.1.py.
    """
    found = normalize_answer(prediction)
    gold = [normalize_answer(answer) for answer in answers]
    if unanswerable:
        gold = [answer for answer in gold if answer] or [""]
    exact = max((float(found == answer) for answer in gold), default=0.0)
    return exact, max((_word_f1(found.split(), answer.split(), unanswerable) for answer in gold), default=0.0)


def _word_f1(found: Sequence[str], gold: Sequence[str], empty_counts: bool) -> float:
    if not found or not gold:
        return float(empty_counts and found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))  # = 2 P R / (P + R)


def best_span(
    start: np.ndarray, end: np.ndarray, allowed: np.ndarray, n_best: int = 20, longest: int = 30
) -> tuple[float, int, int] | None:
    """(score, first token, last token) of the span with the largest start + end logit; None when there is none.

    start, end: logits [tokens]; allowed: bool [tokens], the tokens of the text. Spans begin and end at one of the
    `n_best` allowed tokens of the largest logits and have at most `longest` tokens, as BERT's run_squad.py has it.
    """
    tokens = np.flatnonzero(allowed)
    firsts, lasts = (tokens[np.argsort(-side[tokens], kind="stable")[:n_best]] for side in (start, end))
    spans = [(float(start[i]) + float(end[j]), int(i), int(j)) for i in firsts for j in lasts if 0 <= j - i < longest]
    return max(spans, key=lambda span: span[0], default=None)


# ---- language models --------------------------------------------------------------------------------------------


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in nats, float64 [tokens]; logits [tokens, vocabulary], targets [tokens]."""
    below = logits.astype(np.float32, copy=False) - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(below).sum(axis=1, dtype=np.float64))
    return np.asarray(total - below[np.arange(len(targets)), targets])


def perplexity(losses: np.ndarray) -> float:
    """exp of the mean loss in nats per token; lower is better."""
    return float(np.exp(np.mean(losses)))


# ---- a model ----------------------------------------------------------------------------------------------------


Progress = Callable[[int, int], None]  # (rows done, rows in all)


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Engine:
    """Runs rows in batches of like lengths, longest first."""

    run: Run
    inputs: Collection[str]
    batch: int
    pad: int
    progress: Progress

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Feeds, Arrays]]:
        """(indexes of the rows, all feeds, outputs) of each batch."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        done = 0
        while done < len(order):
            group = order[done : done + self.batch]
            if "attention_mask" not in self.inputs:  # such a model would read padding as text
                group = [i for i in group if len(rows[i].ids) == len(rows[group[0]].ids)]
            feeds = _padded([rows[i] for i in group], self.pad)
            yield group, feeds, self.run({name: feeds[name] for name in FEEDS if name in self.inputs})
            done += len(group)
            self.progress(done, len(order))


def _padded(rows: Sequence[Row], pad: int) -> Feeds:
    """int64 [batch, tokens], as wide as the longest."""
    shape = len(rows), max(1, *(len(row.ids) for row in rows))
    ids, mask, types = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], types[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, row.types, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


class Sizes(TypedDict, total=False):
    """Of a run over a task: tokens of an input, examples of a batch, examples in all; None is the usual one."""

    max_length: int | None
    batch: int | None
    limit: int | None


def evaluate(
    task: Task, run: Run, tokenizer: Any, *, inputs: Collection[str] = FEEDS, labels: Sequence[str] = (),
    progress: Progress = _quiet, **sizes: Unpack[Sizes],
) -> dict[str, float]:  # fmt: skip
    """The benchmark's metrics of a model: 0 to 1, correlations -1 to 1, SQuAD's 0 to 100, perplexity per token.

    run: feeds -> outputs; tokenizer: the path of a tokenizer.json or a tokenizers.Tokenizer, which is not changed;
    inputs: those of FEEDS that the model takes; labels: the order of the model's logits where it is not the
    benchmark's; max_length: tokens (default LENGTH); limit: examples from the first, windows of WikiText.
    Outputs needed: logits [batch, labels]; for similarity logits [batch, 1], or embeddings of tokens
    [batch, tokens, hidden] or of sentences, whose cosine counts; start_logits and end_logits [batch, tokens];
    logits [batch, tokens, vocabulary] of a causal model. InputError where the model lacks them.
    """
    kind = task.benchmark.kind
    if "input_ids" not in inputs or not set(inputs) <= set(FEEDS):
        raise InputError(f"the model takes {', '.join(inputs)}; tasks feed {', '.join(FEEDS)}, at least input_ids")
    if labels and kind != "classes":
        raise InputError(f"task {task.benchmark.name} has no labels to order")
    model = copy_tokenizer(tokenizer)
    engine = _Engine(run, inputs, sizes.get("batch") or BATCH[kind], pad_id(model), progress)
    length, limit = sizes.get("max_length") or LENGTH[kind], sizes.get("limit")
    examples: Any = task.examples[:limit]  # of the class that the kind has
    if kind == "answers":
        return _answers(examples, engine, model, length, task.benchmark.unanswerable)
    if kind == "language":
        return _language(str(task.examples[0]), engine, model, length, limit)
    encode = encoder(model, length)
    gold = np.array([example.gold for example in examples])
    if kind == "classes":
        predicted = _classes(examples, engine, encode, task.benchmark.labels, labels)
    else:
        predicted = _similarity(examples, engine, encode)
    return {name: METRICS[name](predicted, gold) for name in task.benchmark.metrics}


def _output(
    outputs: Arrays, names: Sequence[str], shape: tuple[int | None, ...], need: str, by_shape: bool = True
) -> np.ndarray:
    """The first of `names` that the model has, or else its first output of that shape (None: any size)."""
    named = [outputs[name] for name in names if name in outputs]
    for values in named or (outputs.values() if by_shape else ()):
        if _fits(values, shape):
            if np.isnan(values).any():
                raise InputError(f"the model's outputs hold NaN, its {need} cannot be scored")
            return values
    raise InputError(f"the model gives {_listed(outputs)}; the task needs {need}")


def _fits(values: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    return values.ndim == len(shape) and all(map(lambda a, b: b in (None, a), values.shape, shape))


def _listed(outputs: Arrays) -> str:
    return ", ".join(f"{name} {list(values.shape)}" for name, values in outputs.items())


def _classes(
    examples: Sequence[Example], engine: _Engine, encode: Encode, own: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """int64 [examples], indexes of the benchmark's `own` labels."""
    order = [label.strip().lower() for label in labels] or list(own)
    if sorted(order) != sorted(own):
        raise InputError(f"labels {','.join(order)} are not the task's, in any order: {','.join(own)}")
    meaning = np.array([own.index(label) for label in order])
    predicted = np.empty(len(examples), np.int64)
    for group, _, outputs in engine(encode([example.texts for example in examples])):
        logits = _output(outputs, ["logits"], (len(group), len(own)), f"logits [batch, {len(own)}]")
        predicted[group] = meaning[logits.argmax(axis=1)]
    return predicted


def _similarity(examples: Sequence[Example], engine: _Engine, encode: Encode) -> np.ndarray:
    """float64 [examples]: the model's score of the pair, or the cosine of its texts' embeddings."""
    pairs = encode([example.texts for example in examples])
    _, feeds, outputs = next(replace(engine, progress=_quiet)(pairs[:1]))  # tells what kind of model it is
    scores = np.empty(len(pairs), np.float64)
    if any(_fits(values, (1, 1)) for values in outputs.values()):
        for group, _, outputs in engine(pairs):
            scores[group] = _output(outputs, ["logits"], (len(group), 1), "logits [batch, 1]")[:, 0]
        return scores
    sides = encode([(text,) for example in examples for text in example.texts])
    vectors: list[np.ndarray] = [np.empty(0)] * len(sides)
    for group, feeds, outputs in engine(sides):
        for i, vector in zip(group, _embeddings(outputs, feeds["attention_mask"]), strict=True):
            vectors[i] = vector
    return cosine(np.stack(vectors[::2]), np.stack(vectors[1::2]))


def _embeddings(outputs: Arrays, mask: np.ndarray) -> np.ndarray:
    """[batch, hidden]: the model's own sentence embeddings, or means of its tokens'."""
    if "sentence_embedding" in outputs:  # as sentence-transformers exports them
        return _output(outputs, ["sentence_embedding"], (len(mask), None), "sentence_embedding [batch, hidden]")
    need = "logits [batch, 1] or embeddings [batch, tokens, hidden]"
    return mean_pool(_output(outputs, ["last_hidden_state", "token_embeddings"], (*mask.shape, None), need), mask)


def _answers(
    questions: Sequence[Question], engine: _Engine, model: Any, length: int, unanswerable: bool
) -> dict[str, float]:
    """Exact match and F1 in percent. With `unanswerable`, no answer is given where the least score of the first token
    ([CLS]) of all windows is above the best span's, as BERT's run_squad.py has it with a threshold of 0."""
    model.no_padding()
    model.no_truncation()
    parts = [window for i, item in enumerate(questions) for window in windows(i, item, model, length)]
    best = [(-np.inf, "")] * len(questions)
    null = np.full(len(questions), np.inf)
    for group, feeds, outputs in engine([window.row for window in parts]):
        shape = feeds["input_ids"].shape
        starts, ends = (
            _output(outputs, [name], shape, f"{name} [batch, tokens]", False) for name in ("start_logits", "end_logits")
        )
        for i, start, end in zip(group, starts, ends, strict=True):
            window = parts[i]
            null[window.question] = min(null[window.question], float(start[0]) + float(end[0]))
            span = best_span(start[: len(window.allowed)], end[: len(window.allowed)], window.allowed)
            if span is not None and span[0] > best[window.question][0]:
                text = questions[window.question].context
                best[window.question] = span[0], text[window.spans[span[1], 0] : window.spans[span[2], 1]]
    scores = [
        squad("" if unanswerable and null[i] > best[i][0] else best[i][1], item.answers, unanswerable=unanswerable)
        for i, item in enumerate(questions)
    ]
    exact, words = 100 * np.mean(scores, axis=0)
    return {"exact": float(exact), "f1": float(words)}


def _language(text: str, engine: _Engine, model: Any, length: int, limit: int | None) -> dict[str, float]:
    """Perplexity per token of the tokenizer over the text in one piece, windows of `length` half over each other."""
    model.no_padding()
    model.no_truncation()
    tokens = np.array(model.encode(text, add_special_tokens=False).ids, np.int64)
    if len(tokens) < 2 or length < 2:
        raise InputError("perplexity takes a text and a max length of at least 2 tokens")
    spans = list(lm_windows(len(tokens), length, length // 2))[:limit]
    rows = [Row(tokens[begin:end].tolist(), [0] * (end - begin)) for begin, end, _ in spans]
    least = int(tokens.max()) + 1
    losses = []
    for group, feeds, outputs in engine(rows):
        need = f"logits [batch, tokens, {least} or more] of a causal model"
        logits = _output(outputs, ["logits"], (*feeds["input_ids"].shape, None), need)
        if logits.shape[2] < least:
            raise InputError(f"the model gives {_listed(outputs)}; the tokenizer's tokens need {need}")
        for i, values in zip(group, logits, strict=True):
            begin, end, scored = spans[i]
            losses.append(token_losses(values[scored - 1 - begin : end - 1 - begin], tokens[scored:end]))
    return {"perplexity": perplexity(np.concatenate(losses))}
