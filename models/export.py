"""Regenerate the small reference models of this folder with the real exporters.

    python models/export.py bert-torchscript        one file
    python models/export.py --all                   all of them
    python models/export.py --list                  what there is

Every model is tiny and random (see architectures.py), keeps batch and sequence free, and is stripped of the
exporter's notes (stack traces, local paths). Needs torch, transformers and onnxscript for the exports and
onnxruntime for the fused graphs; importing this file needs none of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

FOLDER = Path(__file__).resolve().parent
if not __package__:  # run as a script
    sys.path.insert(0, str(FOLDER.parent))

from models.architectures import (  # noqa: E402
    ARCHITECTURES,
    CONTROL_FLOW,
    Architecture,
    free_dims,
    randomise,
    samples,
)

IR_VERSION = 10  # the newest that every supported onnxruntime reads; opset 23 needs 11


@dataclass(frozen=True)
class Model:
    """One committed file: which architecture, by which exporter, with which options."""

    architecture: str
    exporter: str  # torchscript | dynamo | onnxruntime | ort-transformers | text
    opset: int = 17
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


# torchscript + eager attention and dynamo + sdpa attention, so that both forms of attention occur.
MODELS: dict[str, Model] = {
    "bert-torchscript": Model("bert", "torchscript", 17),
    "bert-torchscript-opset11": Model("bert", "torchscript", 11, note="the oldest; Softmax flattens its input"),
    "bert-torchscript-opset13": Model(
        "bert", "torchscript", 13, note="LayerNormalization in plain operators"
    ),
    "bert-dynamo": Model("bert", "dynamo", 20),
    "bert-dynamo-attention": Model("bert", "dynamo", 23, note="`Attention` operators of opset 23"),
    "bert-fp16": Model("bert", "torchscript", 17, {"half": True}, note="float16 weights and activations"),
    "bert-ort": Model("bert", "onnxruntime", 17, note="bert-torchscript after onnxruntime, level EXTENDED"),
    "bert-ort-transformers": Model(
        "bert", "ort-transformers", 17, note="bert-torchscript after onnxruntime.transformers"
    ),
    "bert-classifier": Model("bert-classifier", "torchscript", 17),
    "bert-qa": Model("bert-qa", "torchscript", 17),
    "distilbert-torchscript": Model("distilbert", "torchscript", 17),
    "distilbert-dynamo": Model("distilbert", "dynamo", 20),
    "roberta-torchscript": Model("roberta", "torchscript", 17),
    "roberta-dynamo": Model("roberta", "dynamo", 20),
    "electra-torchscript": Model("electra", "torchscript", 17),
    "vit-torchscript": Model("vit", "torchscript", 17),
    "vit-dynamo": Model("vit", "dynamo", 20),
    "gpt2-torchscript": Model("gpt2", "torchscript", 17),
    "gpt2-dynamo": Model("gpt2", "dynamo", 20),
    "t5-torchscript": Model("t5", "torchscript", 17),
    "t5-dynamo": Model(
        "t5", "dynamo", 20, {"attention": "eager"}, "torch.export cannot decompose its sdpa form"
    ),
    "cnn": Model("cnn", "torchscript", 17, note="no Transformer"),
    "lstm": Model("lstm", "torchscript", 17, note="no Transformer"),
    "control-flow": Model("control-flow", "text", 20, note="Loop and If around linear layers"),
}


def _positional(call: Callable[..., Any], architecture: Architecture) -> Callable[..., Any]:
    """`call` with its inputs by position and its named outputs as a tuple, as both exporters want."""

    def forward(*tensors: Any) -> Any:
        found = call(**dict(zip(architecture.inputs, tensors, strict=True)))
        return tuple(getattr(found, name) for name in architecture.outputs)

    return forward


def torchscript(model: Model) -> onnx.ModelProto:
    import torch

    architecture = ARCHITECTURES[model.architecture]
    module = randomise(architecture.build("eager"))
    if model.options.get("half"):
        module = module.half()
    if hasattr(module, "config"):
        module.forward = _positional(
            module.forward, architecture
        )  # a wrapper module would lengthen every node's name
    tensors = samples(architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            tuple(tensors.values()),
            str(path),
            dynamo=False,
            opset_version=model.opset,
            input_names=list(tensors),
            output_names=list(architecture.outputs),
            dynamic_axes={name: free_dims(name) for name in tensors},
        )
        return onnx.load(path)


def dynamo(model: Model) -> onnx.ModelProto:
    import torch

    architecture = ARCHITECTURES[model.architecture]

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = randomise(architecture.build(model.options.get("attention", "sdpa")))

        def forward(self, *tensors: torch.Tensor) -> Any:
            return _positional(self.model, architecture)(*tensors)

    tensors = samples(architecture)
    program = torch.onnx.export(
        Exported(),
        tuple(tensors.values()),
        dynamo=True,
        opset_version=model.opset,
        input_names=list(tensors),
        output_names=list(architecture.outputs),
        dynamic_shapes={"tensors": tuple(free_dims(name) for name in tensors)},
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _plain_bert(folder: str) -> str:
    path = str(Path(folder) / "plain.onnx")
    onnx.save(torchscript(MODELS["bert-torchscript"]), path)
    return path


def onnxruntime_optimised(model: Model) -> onnx.ModelProto:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        ort.InferenceSession(_plain_bert(folder), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def ort_transformers(model: Model) -> onnx.ModelProto:
    from onnxruntime.transformers.optimizer import optimize_model

    with tempfile.TemporaryDirectory() as folder:
        fused = optimize_model(
            _plain_bert(folder), model_type="bert", num_heads=4, hidden_size=64, opt_level=0
        )
        path = str(Path(folder) / "fused.onnx")
        fused.save_model_to_file(path)  # which also declares com.microsoft
        return onnx.load(path)


def text(model: Model) -> onnx.ModelProto:
    import numpy as np

    generator = np.random.default_rng(0)
    source = CONTROL_FLOW
    for size in (64, 48, 48, 6):
        values = ", ".join(f"{value:.4f}" for value in generator.normal(0, 0.3, size))
        source = source.replace("{WEIGHTS}", "{" + values + "}", 1)
    return onnx.parser.parse_model(source)


EXPORTERS: dict[str, Callable[[Model], onnx.ModelProto]] = {
    "torchscript": torchscript,
    "dynamo": dynamo,
    "onnxruntime": onnxruntime_optimised,
    "ort-transformers": ort_transformers,
    "text": text,
}


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what exporters note for debugging (stack traces name local folders), in place."""

    def strip(graph: onnx.GraphProto) -> None:
        for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
        graph.ClearField("metadata_props")
        for node in graph.node:
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
                if attribute.HasField("g"):
                    strip(attribute.g)

    model.ClearField("metadata_props")
    strip(model.graph)
    return model


def export(name: str, folder: Path = FOLDER) -> Path:
    """Write one model of the table to `folder`, checked; returns its path."""
    model = MODELS[name]
    proto = tidy(EXPORTERS[model.exporter](model))
    proto.ir_version = min(proto.ir_version, IR_VERSION if model.opset < 23 else 11)
    onnx.checker.check_model(proto)
    path = folder / f"{name}.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to export")
    parser.add_argument("--all", action="store_true", help="export every model")
    parser.add_argument("--list", action="store_true", help="list the models")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where to write (default: beside this file)"
    )
    arguments = parser.parse_args()
    if arguments.list:
        for name, model in MODELS.items():
            print(f"{name:26} {model.architecture:16} {model.exporter:17} opset {model.opset}  {model.note}")
        return
    names = list(MODELS) if arguments.all else arguments.names
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        sys.exit(
            f"unknown model {unknown[0]!r}; --list shows the names"
            if unknown
            else parser.format_usage().strip()
        )
    warnings.filterwarnings("ignore")
    for name in names:
        path = export(name, arguments.folder)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
