"""A small tokenizer and files to write, for the tests of tasks with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tasks need the extra hf")

from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models

VOCABULARY = """
[PAD] [UNK] [CLS] [SEP] good bad fine film the a cat dog sat runs sleeps where who is it blue whale lives in sea deep
very not yes no maybe one two three four five six . , ? =
"""
WORDS = VOCABULARY.split()
ID = {word: i for i, word in enumerate(WORDS)}
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label")  # fmt: skip
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"



def words_tokenizer() -> Any:
    model = Tokenizer(token_models.WordLevel(ID, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return model


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def squad_file(path: Path, *items: tuple[str, str, list[str]]) -> Path:
    """(context, question, answers) each, as dev-v1.1.json and dev-v2.0.json have them."""
    paragraphs = [
        {"context": context, "qas": [{"id": str(i), "question": question, "is_impossible": not answers,
                                      "answers": [{"text": text, "answer_start": 0} for text in answers]}]}
        for i, (context, question, answers) in enumerate(items)
    ]  # fmt: skip
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]} for paragraph in paragraphs]}
    return write(path, json.dumps(content))


def array(*values: float) -> np.ndarray:
    return np.array(values)
