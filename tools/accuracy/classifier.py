"""A text classifier in ONNX: an encoder, the mean of its token states over the mask, and a linear head.

The head is multinomial logistic regression on the encoder's embeddings, the encoder as it is (a linear probe), as much
regularised as the samples allow.
Logits are [batch, labels], in the order of the sorted labels of the train split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nmcompile.errors import InputError
from tools.accuracy.labelled import Example, Split
from tools.accuracy.task_cli import Model, open_model

STATES, MASK, LOGITS = "last_hidden_state", "attention_mask", "logits"
LENGTH, BATCH = 128, 32
DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the squared weights, next to the mean loss
PART = 5  # every fifth sample chooses among them
STEPS = 200  # of L-BFGS


@dataclass(frozen=True)
class Head:
    """weight [hidden, labels], bias [labels], float32; labels in the order of the columns."""

    weight: np.ndarray
    bias: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Embedder:
    """Runs an encoder or a classifier, ONNX or a plan, on texts in batches of like length."""

    model: Model
    tokenizer: Path
    length: int = LENGTH

    @classmethod
    def of(cls, model: Path, tokenizer: Path, threads: int | None = None, length: int = LENGTH) -> Embedder:
        return cls(open_model(model, threads), tokenizer, length)

    def outputs(self, texts: Sequence[str], name: str) -> np.ndarray:
        """[texts, width]: an output with a row per text; of STATES, the mean over the mask."""
        from tokenizers import Tokenizer

        reader = Tokenizer.from_file(str(self.tokenizer))
        reader.enable_truncation(self.length)
        reader.no_padding()
        rows = [encoded.ids for encoded in reader.encode_batch(list(texts))]
        order = np.argsort([len(row) for row in rows], kind="stable")
        parts = [self._batch([rows[i] for i in order[start : start + BATCH]], name)
                 for start in range(0, len(rows), BATCH)]  # fmt: skip
        found = np.empty((len(rows), parts[0].shape[1]), np.float32)
        found[order] = np.concatenate(parts)
        return found

    def _batch(self, rows: Sequence[Sequence[int]], name: str) -> np.ndarray:
        width = max(map(len, rows))
        ids, mask = (np.zeros((len(rows), width), np.int64) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        feeds = {"input_ids": ids, MASK: mask, "token_type_ids": np.zeros_like(ids)}
        values = np.asarray(self.model.run({key: feeds[key] for key in self.model.inputs})[name])
        if name != STATES:
            return values
        weight = mask[..., None].astype(np.float32)
        mean: np.ndarray = (values * weight).sum(axis=1) / weight.sum(axis=1)
        return mean


def fit_best(vectors: np.ndarray, labels: Sequence[str]) -> Head:
    """With the largest decay within a standard error of the best on a fifth of the samples, fitted to the others
    (Breiman et al. 1984): large weights in directions that hardly vary stand no change of the encoder."""
    held = np.arange(len(labels)) % PART == 0
    known = [label for label, out in zip(labels, held, strict=True) if not out]
    wanted = [label for label, out in zip(labels, held, strict=True) if out]
    right = []
    for decay in DECAYS:
        head = fit(vectors[~held], known, decay)
        chosen = (vectors[held] @ head.weight + head.bias).argmax(axis=1)
        right.append(float(np.mean([head.labels[i] == label for i, label in zip(chosen, wanted, strict=True)])))
    best = max(right)
    enough = best - (best * (1 - best) / max(len(wanted), 1)) ** 0.5
    return fit(vectors, labels, max(decay for decay, share in zip(DECAYS, right, strict=True) if share >= enough))


def fit(vectors: np.ndarray, labels: Sequence[str], decay: float = DECAYS[0]) -> Head:
    """Logistic regression by L-BFGS in double precision, on features of mean 0 and deviation 1, folded back after."""
    import torch

    names = tuple(sorted(set(labels)))
    x = torch.from_numpy(vectors.astype(np.float64))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    y = torch.tensor([names.index(label) for label in labels])
    weight = torch.zeros(x.shape[1], len(names), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight + bias, y) + decay * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    folded = weight.detach() / scale[:, None]
    shift = bias.detach() - mean @ folded
    return Head(folded.numpy().astype(np.float32), shift.numpy().astype(np.float32), names)


def append(encoder: onnx.ModelProto, head: Head) -> onnx.ModelProto:
    """The encoder with mean pooling over the mask and the head: one output, logits [batch, labels]."""
    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    graph = model.graph
    if STATES not in {item.name for item in graph.output} or MASK not in {item.name for item in graph.input}:
        raise InputError(f"the encoder lacks the output {STATES} or the input {MASK}")
    for name, value in (("pooling.axis", np.asarray([-1], np.int64)), ("pooling.tokens", np.asarray([1], np.int64)),
                        ("classifier.weight", head.weight), ("classifier.bias", head.bias)):  # fmt: skip
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    graph.node.extend([
        helper.make_node("Cast", [MASK], ["pooling.float"], "pooling.float", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["pooling.float", "pooling.axis"], ["pooling.mask"], "pooling.mask"),
        helper.make_node("Mul", [STATES, "pooling.mask"], ["pooling.masked"], "pooling.masked"),
        helper.make_node("ReduceSum", ["pooling.masked", "pooling.tokens"], ["pooling.sum"], "pooling.sum", keepdims=0),
        helper.make_node("ReduceSum", ["pooling.mask", "pooling.tokens"], ["pooling.count"], "pooling.count",
                         keepdims=0),
        helper.make_node("Div", ["pooling.sum", "pooling.count"], ["pooled"], "pooled"),
        helper.make_node("MatMul", ["pooled", "classifier.weight"], ["classifier"], "classifier"),
        helper.make_node("Add", ["classifier", "classifier.bias"], [LOGITS], "classifier/bias"),
    ])  # fmt: skip
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", len(head.labels)]))
    entry = model.metadata_props.add()
    entry.key, entry.value = "labels", "\n".join(head.labels)
    return model


def accuracy(model: Embedder, labels: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of the examples whose label has the largest logit."""
    best = model.outputs([text for text, _ in examples], LOGITS).argmax(axis=1)
    return float(np.mean([labels[i] == label for i, (_, label) in zip(best, examples, strict=True)]))


def make(encoder: Path, tokenizer: Path, split: Split, output: Path, threads: int | None = None) -> float:
    """Fit a head on the train split, write the classifier to `output`; its accuracy on the test split."""
    train, test = split
    vectors = Embedder.of(encoder, tokenizer, threads).outputs([text for text, _ in train], STATES)
    head = fit_best(vectors, [label for _, label in train])
    onnx.save(append(onnx.load(encoder), head), output)
    onnx.checker.check_model(str(output))
    return accuracy(Embedder.of(output, tokenizer, threads), head.labels, test)
