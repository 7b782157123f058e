"""Calibration data from every kind of source, and what is wrong with them in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nmcompile.calibrate import open_data, split
from nmcompile.errors import CalibrationError
from nmcompile.tensorinfo import TensorInfo

Array = npt.NDArray[Any]


def info(name: str, dtype: str, *shape: int | str | None) -> TensorInfo:
    return TensorInfo(name, np.dtype(dtype), shape)


IDS = info("input_ids", "int64", "batch", "seq")
MASK = info("attention_mask", "int64", "batch", "seq")
TYPES = info("token_type_ids", "int64", "batch", "seq")
POSITIONS = info("position_ids", "int64", "batch", "seq")
IMAGE = info("pixel_values", "float32", "batch", 3, 4, 4)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="text needs the extra hf")
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3, "cat": 4, "sat": 5, "[PAD]": 6}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    model.enable_padding(pad_id=6, pad_token="[PAD]", length=20)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_an_npz_is_cut_into_batches_as_often_as_wanted(tmp_path: Path) -> None:
    ids, mask = np.arange(70).reshape(10, 7), np.ones((10, 7), np.int32)
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=mask, labels=np.zeros(10))
    data = open_data(tmp_path / "d.npz", [IDS, MASK], batch=4)
    for _ in range(2):
        batches = list(data)
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([batch["input_ids"] for batch in batches]), ids)
        assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)
        assert batches[0]["attention_mask"].dtype == np.int64
    assert data.samples == 10 and not data.synthetic


def test_the_limit_counts_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.zeros((10, 7), int))
    assert open_data(str(tmp_path / "d.npz"), [IDS], limit=5, batch=2).samples == 5


def test_a_stack_of_batches_is_the_same_as_its_samples() -> None:
    images = np.random.default_rng(0).random((2, 5, 3, 4, 4))
    stacked = list(open_data([{"pixel_values": images}], [IMAGE], batch=10))
    single = list(
        open_data([{"pixel_values": image} for image in images.reshape(10, 3, 4, 4)], [IMAGE], batch=10)
    )
    np.testing.assert_array_equal(stacked[0]["pixel_values"], single[0]["pixel_values"])
    assert stacked[0]["pixel_values"].dtype == np.float32 and len(stacked) == 1


def test_a_folder_of_npy_or_npz(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / "npz").mkdir(exist_ok=True)
        np.savez(tmp_path / "npz" / f"{part}.npz", input_ids=np.full((3, 2), part))
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "input_ids.npy", np.repeat([0, 1], 3)[:, None].repeat(2, 1))
    for kind in ("npz", "npy"):
        (batch,) = open_data(tmp_path / kind, [IDS])
        assert batch["input_ids"].tolist() == [[0, 0]] * 3 + [[1, 1]] * 3


def test_lists_are_padded_and_the_rest_is_made(tmp_path: Path) -> None:
    source = lines(tmp_path / "d.jsonl", {"input_ids": [7, 8, 9]}, {"input_ids": [5]})
    (batch,) = open_data(source, [IDS, MASK, TYPES, POSITIONS])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_mask_of_the_data_is_kept() -> None:
    (batch,) = open_data([{"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0]}], [IDS, MASK])
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]


def test_without_a_mask_a_batch_has_one_length() -> None:
    data = open_data([{"input_ids": [1] * length} for length in (3, 3, 2, 3)], [IDS])
    assert [batch["input_ids"].shape for batch in data] == [(2, 3), (1, 2), (1, 3)]
    assert data.samples == 4


def test_samples_of_like_lengths_share_batches_in_an_order_of_none() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 200)]
    made = open_data([{"input_ids": [1] * n} for n in lengths], [IDS, MASK], batch=8)
    batches = list(made)
    real = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    assert sorted(n for batch in real for n in batch) == sorted(lengths)
    assert sum(batch["input_ids"].size for batch in batches) < 1.25 * sum(lengths)  # 1.9 as they come
    longest = [max(batch) for batch in real[:8]]
    assert longest != sorted(longest) and [list(map(len, real[:24]))] == [[8] * 24]
    assert [batch["input_ids"].tolist() for batch in made] == [batch["input_ids"].tolist() for batch in batches]


def test_tokens_are_cut_to_max_length_and_padded_to_a_fixed_one() -> None:
    fixed = [info("input_ids", "int32", 1, 4), info("attention_mask", "float32", 1, 4)]
    batches = list(open_data([{"input_ids": [1] * 6}, {"input_ids": [2]}], fixed, max_length=5))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 1, 1, 1]], [[2, 0, 0, 0]]]
    assert batches[1]["attention_mask"].dtype == np.float32
    (batch,) = open_data([{"input_ids": [1] * 6}], [IDS], max_length=5)
    assert batch["input_ids"].shape == (1, 5)


def test_a_mask_is_made_for_embedded_tokens() -> None:
    embedded = info("inputs_embeds", "float32", "b", "s", 8)
    samples = [{"inputs_embeds": np.ones((length, 8))} for length in (2, 3)]
    (batch,) = open_data(samples, [embedded, MASK])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["inputs_embeds"].shape == (2, 3, 8) and batch["inputs_embeds"][0, 2].max() == 0


def test_a_fixed_batch_wins_and_the_rest_is_dropped() -> None:
    fixed = info("x", "float32", 4, 2)
    data = open_data([{"x": np.ones((10, 2))}], [fixed], batch=3)
    assert [batch["x"].shape for batch in data] == [(4, 2), (4, 2)] and data.samples == 8
    with pytest.raises(CalibrationError, match="3 calibration samples do not fill one batch"):
        open_data([{"x": np.ones((3, 2))}], [fixed])


def test_a_scalar_input_is_not_batched() -> None:
    scale = info("scale", "float32")
    (batch,) = open_data([{"x": np.ones((3, 2)), "scale": 0.5}], [info("x", "float32", "n", 2), scale])
    assert batch["scale"].shape == () and batch["x"].shape == (3, 2)


def test_a_generator_is_read_once_and_only_to_the_limit() -> None:
    def endless() -> Iterator[dict[str, object]]:
        while True:
            yield {"input_ids": [1, 2]}

    data = open_data(endless(), [IDS], limit=6, batch=4)
    assert (
        [len(batch["input_ids"]) for batch in data] == [len(batch["input_ids"]) for batch in data] == [4, 2]
    )


def test_text_is_tokenized_cut_and_padded_with_the_tokenizers_token(tokenizer: Path, tmp_path: Path) -> None:
    source = lines(
        tmp_path / "d.jsonl", {"text": "the cat sat"}, {"text": "cat"}, {"text": "cat", "text_pair": "sat"}
    )
    (batch,) = open_data(source, [IDS, MASK, TYPES], tokenizer=tokenizer)
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 2], [1, 4, 2, 6, 6], [1, 4, 2, 5, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 5]
    assert batch["token_type_ids"].tolist() == [[0] * 5, [0] * 5, [0, 0, 0, 1, 1]]
    (batch,) = open_data(source, [IDS, MASK], tokenizer=tokenizer.parent, max_length=4)
    assert batch["input_ids"][0].tolist() == [1, 3, 4, 2]


def test_text_needs_a_tokenizer_that_is_there_and_readable(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="text needs the extra hf")
    with pytest.raises(CalibrationError, match="item 0 holds text; give the tokenizer"):
        open_data([{"text": "the cat"}], [IDS])
    (tmp_path / "bad.json").write_text("{}")
    for path in (tmp_path / "bad.json", tmp_path / "none.json"):
        with pytest.raises(CalibrationError, match=r"not a readable tokenizer\.json"):
            open_data([{"text": "the cat"}], [IDS], tokenizer=path)


def test_a_missing_tokenizers_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CalibrationError, match=r"pip install nmcompile\[hf\]") as error:
        open_data([{"text": "the cat"}], [IDS], tokenizer="tokenizer.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "inputs", "message"),
    [
        ({"ids": [1]}, [IDS], r"item 0: input 'input_ids' is missing \(the data have: ids\)"),
        ({"input_ids": [1]}, [IDS, IMAGE], r"input 'pixel_values' is missing \(the data have: input_ids\)"),
        ({"input_ids": [1.5]}, [IDS], "'input_ids' is float64, the model takes int64"),
        ({"input_ids": ["a"]}, [IDS], "'input_ids' is <U1, the model takes int64"),
        ({"input_ids": [2**40]}, [info("input_ids", "int32", "b", "s")], "beyond the model's int32"),
        ({"input_ids": []}, [IDS], "'input_ids' is empty"),
        ({"input_ids": [[1, 2], [3]]}, [IDS], "'input_ids' is ragged"),
        ({"input_ids": [[[[1]]]]}, [IDS], "do not fit the model's inputs"),
        ({"input_ids": [1], "attention_mask": [[1]]}, [IDS, MASK], "do not fit the model's inputs"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, [IDS, MASK], "different numbers of samples"),
        ({"pixel_values": np.ones((3, 5, 5))}, [IMAGE], r"shape \[3, 5, 5\] does not fit"),
        ({"pixel_values": np.full((3, 4, 4), np.nan)}, [IMAGE], "holds NaN or Inf"),
        ({"x": np.full((1, 2), 1e6)}, [info("x", "float16", "b", 2)], "holds NaN or Inf as float16"),
        ([1, 2], [IDS], "item 0 is a list; give dicts"),
    ],
)
def test_data_that_do_not_fit_say_so_in_one_line(record: Any, inputs: list[TensorInfo], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        open_data([record], inputs)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_say_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(tmp_path / "pickle.npz", input_ids=np.array([{}], object))
    (tmp_path / "d.csv").write_text("1,2")
    (tmp_path / "list.jsonl").write_text("\n[1]\n")
    (tmp_path / "bad.jsonl").write_bytes(b'{"input_ids": \xff')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "none.npz": "do not exist",
        "bad.npz": "cannot be read",
        "pickle.npz": "cannot be read",
        "d.csv": r"give \.npz, \.jsonl or a folder",
        "list.jsonl": "line 2 is not an object",
        "bad.jsonl": "line 1 is not JSON",
        "empty.jsonl": "hold no samples",
        "folder": "hold no samples",
    }.items():
        with pytest.raises(CalibrationError, match=message) as error:
            open_data(tmp_path / name, [IDS])
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="hold no samples"):
        open_data([], [IDS])


def test_no_source_gives_made_up_data_that_say_so() -> None:
    data = open_data(None, [IDS, MASK, IMAGE], batch=4, limit=10)
    batches = list(data)
    assert data.synthetic and data.samples == sum(len(batch["input_ids"]) for batch in batches) >= 8
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["pixel_values"].shape == (4, 3, 4, 4)
    np.testing.assert_array_equal(batches[0]["input_ids"], next(iter(data))["input_ids"])


# ---- what strangers give ----------------------------------------------------------------------------------------


def test_hostile_lines_of_json_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.calibrate.sources.LINE", 100_000)
    wrong = {
        "[" * 40_000 + "]" * 40_000: "nested too deep",
        '{"input_ids": ' + "[" * 200 + "1" + "]" * 200 + "}": "ragged, or no array|is object",
        '{"input_ids": [1, [2, 3]]}': "is ragged",
        '{"input_ids": [99999999999999999999999]}': "input_ids",
        '{"input_ids": [1.5]}': "is float64, the model takes int64",
        '{"input_ids": {"a": 1}}': "is object",
        '{"input_ids": ["a"]}': "the model takes int64",
        '{"input_ids": [' + "1, " * 50_000 + "1]}": "longer than",
    }
    for number, (text, match) in enumerate(wrong.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        with pytest.raises(CalibrationError, match=match) as caught:
            open_data(path, [IDS])
        assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.npz", "a.jsonl", "folder/a.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(CalibrationError, match="not a regular file"):
            open_data(tmp_path / name if "folder" not in name else tmp_path / "folder", [IDS])
    with pytest.raises(CalibrationError, match=r"not a readable tokenizer\.json: it is not a regular file"):
        pytest.importorskip("tokenizers", reason="text needs the extra hf")
        open_data([{"text": "a"}], [IDS], tokenizer=tmp_path / "a.jsonl")


def test_text_that_is_no_unicode_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(CalibrationError, match="cannot be tokenized"):
        open_data(tmp_path / "t.jsonl", [IDS], tokenizer=tokenizer)


def test_a_row_that_the_model_fixes_is_shared_by_the_samples() -> None:
    """position_ids [1, s] beside input_ids [b, s]: given once, or once per sample."""
    row = info("position_ids", "int64", 1, "seq")
    ids, positions = np.arange(60).reshape(10, 6), np.arange(6)[None] + 3
    for given in (positions, np.tile(positions, (10, 1))):
        feeds = list(open_data([{"input_ids": ids, "position_ids": given}], [IDS, row], batch=4))
        assert [len(feed["input_ids"]) for feed in feeds] == [4, 4, 2]
        assert all(feed["position_ids"].tolist() == positions.tolist() for feed in feeds)
    different = np.arange(60).reshape(10, 6) % 7
    feeds = list(open_data([{"input_ids": ids, "position_ids": different}], [IDS, row], batch=4))
    assert len(feeds) == 10 and feeds[3]["position_ids"].tolist() == [different[3].tolist()]
    np.testing.assert_array_equal(np.concatenate([feed["input_ids"] for feed in feeds]), ids)


def test_a_batch_of_one_alone_stays_one() -> None:
    one = [info("input_ids", "int64", 1, "seq"), info("attention_mask", "int64", 1, "seq")]
    feeds = list(open_data([{"input_ids": np.ones((5, 6), int)}], one, batch=4))
    assert [feed["input_ids"].shape for feed in feeds] == [(1, 6)] * 5


@pytest.mark.parametrize("samples, seen, held", [(8, 8, 8), (12, 8, 8), (16, 8, 8), (32, 24, 8), (64, 56, 8),
                                                 (128, 112, 16)])  # fmt: skip
def test_both_parts_fill_the_batches_that_the_model_fixes(samples: int, seen: int, held: int) -> None:
    fixed = [info("x", "float32", 8, "seq", 4)]
    parts = split(open_data([{"x": np.ones((samples, 3, 4), np.float32)}], fixed))
    assert [part.samples for part in parts] == [seen, held]
    assert all(feed["x"].shape == (8, 3, 4) for part in parts for feed in part)
    if samples >= 16:
        assert not set(map(id, parts[0].rows)) & set(map(id, parts[1].rows))


def test_empty_sizes_strings_and_no_inputs() -> None:
    empty = info("e", "float32", "batch", 0)
    feed = next(iter(open_data([{"e": np.zeros((3, 0), np.float32), "input_ids": np.ones((3, 4), int)}], [empty, IDS])))
    assert feed["e"].shape == (3, 0)
    words = TensorInfo("words", np.dtype(object), ("batch",))
    feed = next(iter(open_data([{"words": np.array(["a", "b"], object)}], [words])))
    assert feed["words"].tolist() == ["a", "b"]
    with pytest.raises(CalibrationError, match="takes no samples"):
        open_data([{}], [info("x", "float32", 0, 4)])
    with pytest.raises(CalibrationError, match="no inputs"):
        open_data([{}], [])


def test_made_up_images_that_are_large_come_in_small_batches_and_few() -> None:
    feeds = list(open_data(None, [info("pixels", "float32", "batch", 3, 1024, 1024)], batch=8))
    assert feeds[0]["pixels"].shape == (5, 3, 1024, 1024) and len(feeds) == 2
    feeds = list(open_data(None, [info("pixels", "float32", "batch", 3, 32, 32)], batch=8))
    assert [feed["pixels"].shape[0] for feed in feeds] == [8] * 8
