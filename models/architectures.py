"""The architectures behind the reference models: tiny, seeded, random; torch is imported late.

Biases and the affine part of the normalisations are random too, so that nothing is trivially 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BERT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
POSITIONS = {"max_position_embeddings": 64}
TOKENS = ("input_ids", "attention_mask")
SEGMENTS = (*TOKENS, "token_type_ids")


@dataclass(frozen=True)
class Architecture:
    """A torch model and the names it is exported with; `build` takes the attention implementation."""

    build: Callable[[str], Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _transformer(
    model: str, config: str, inputs: tuple[str, ...], outputs: tuple[str, ...], **sizes: Any
) -> Architecture:
    def build(attention: str) -> Any:
        import transformers

        settings = getattr(transformers, config)(attn_implementation=attention, **sizes)
        return getattr(transformers, model)(settings)

    return Architecture(build, inputs, outputs)


def _cnn(_: str) -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.SiLU(),
        nn.Conv2d(16, 24, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def _lstm(_: str) -> Any:
    import torch
    from torch import nn

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(256, 16)
            self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True)
            self.tags = nn.Linear(48, 7)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.tags(self.lstm(self.embedding(input_ids))[0])  # type: ignore[no-any-return]

    return Tagger()


HIDDEN, POOLED = "last_hidden_state", "pooler_output"
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _transformer("BertModel", "BertConfig", SEGMENTS, (HIDDEN, POOLED), **BERT, **POSITIONS),
    "bert-classifier": _transformer(
        "BertForSequenceClassification",
        "BertConfig",
        SEGMENTS,
        ("logits",),
        num_labels=3,
        **BERT,
        **POSITIONS,
    ),
    "bert-qa": _transformer(
        "BertForQuestionAnswering",
        "BertConfig",
        SEGMENTS,
        ("start_logits", "end_logits"),
        **BERT,
        **POSITIONS,
    ),
    "distilbert": _transformer(
        "DistilBertModel",
        "DistilBertConfig",
        TOKENS,
        (HIDDEN,),
        vocab_size=256,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        **POSITIONS,
    ),
    "roberta": _transformer(
        "RobertaModel", "RobertaConfig", TOKENS, (HIDDEN, POOLED), type_vocab_size=1, **SMALL, **POSITIONS
    ),
    "electra": _transformer(
        "ElectraModel", "ElectraConfig", SEGMENTS, (HIDDEN,), embedding_size=16, **SMALL, **POSITIONS
    ),
    "vit": _transformer(
        "ViTModel",
        "ViTConfig",
        ("pixel_values",),
        (HIDDEN, POOLED),
        image_size=32,
        patch_size=8,
        **{name: size for name, size in SMALL.items() if name != "vocab_size"},
    ),
    "gpt2": _transformer(
        "GPT2LMHeadModel",
        "GPT2Config",
        TOKENS,
        ("logits",),
        vocab_size=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "t5": _transformer(
        "T5ForConditionalGeneration",
        "T5Config",
        (*TOKENS, "decoder_input_ids"),
        ("logits", "encoder_last_hidden_state"),
        vocab_size=256,
        d_model=32,
        d_kv=16,
        num_layers=2,
        num_heads=2,
        d_ff=64,
        use_cache=False,
        decoder_start_token_id=0,
    ),
    "cnn": Architecture(_cnn, ("pixel_values",), ("logits",)),
    "lstm": Architecture(_lstm, ("input_ids",), ("logits",)),
}

# A recurrent step `steps` times, then one of two linear layers: both kinds of subgraph capture outer tensors.
CONTROL_FLOW = """
<ir_version: 10, opset_import: ["" : 20]>
control_flow (float[batch, 8] x, int64 steps) => (float[batch, 6] y)
<float[8, 8] w_loop = {WEIGHTS}, float[8, 6] w_then = {WEIGHTS}, float[8, 6] w_else = {WEIGHTS},
 float[6] b_then = {WEIGHTS},
 bool always = {1}, float zero = {0.0}>
{
   loop_out = Loop (steps, always, x) <
      body: graph = step (int64 i, bool keep_in, float[batch, 8] h) => (bool keep, float[batch, 8] h_out) {
      keep = Identity (keep_in)
      z = MatMul (h, w_loop)
      t = Tanh (z)
      h_out = Add (t, x)
   }>
   total = ReduceSum <keepdims: int = 0> (loop_out)
   positive = Greater (total, zero)
   y = If (positive) <
      then_branch: graph = then_linear () => (float[batch, 6] y_then) {
         p = MatMul (loop_out, w_then)
         y_then = Add (p, b_then)
      },
      else_branch: graph = else_linear () => (float[batch, 6] y_else) { y_else = MatMul (loop_out, w_else) }
   >
}
"""


def randomise(model: Any) -> Any:
    """Seeded weights of variance 1/fan-in, gains around 1, biases around 0, in place; sets eval mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise * (tensor.shape[0] / tensor.numel()) ** 0.5)
            else:
                lowered = name.lower()
                gain = lowered.endswith("running_var") or (
                    lowered.endswith("weight")
                    and any(norm in lowered for norm in ("norm", "ln_", "1.weight"))
                )
                tensor.copy_(float(gain) + 0.1 * noise)
    return model.eval()


def samples(architecture: Architecture) -> dict[str, Any]:
    """The tensors an architecture is traced with: batch 2, sequence 7 (decoder: 5), one row padded."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Any] = {}
    for name in architecture.inputs:
        length = 5 if name.startswith("decoder") else 7
        if name == "pixel_values":
            tensors[name] = torch.randn(2, 3, 32, 32, generator=generator)
        elif name == "attention_mask":
            tensors[name] = (torch.arange(length) < torch.tensor([[length], [length - 2]])).long()
        elif name == "token_type_ids":
            tensors[name] = (torch.arange(length) >= 3).long().repeat(2, 1)
        else:
            tensors[name] = torch.randint(3, 256, (2, length), generator=generator)
    return tensors


def free_dims(name: str) -> dict[int, str]:
    """Which dimensions of an input are free, by name."""
    if name == "pixel_values":
        return {0: "batch"}
    return {0: "batch", 1: "decoder_sequence" if name.startswith("decoder") else "sequence"}
