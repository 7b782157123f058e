"""Says of each layer whether TensorRT is likely to take a 2:4 INT8 kernel, and what stands in the way.

The reasons come in the order in which TensorRT decides: the pattern, INT8 on both inputs, what the layers beside it
are, an INT8 epilogue, then sizes. What is chosen in the end is a matter of timing on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nmcompile.backends.tensorrt.gemms import Gemm, merge_groups
from nmcompile.backends.tensorrt.rules_sparsity import mixed, narrow, odd_sizes

Verdict = Literal["sparse INT8 likely", "eligible, will likely stay dense", "dense INT8", "float"]
REASONS = 2  # the first ones are enough to act on


@dataclass(frozen=True)
class LayerVerdict:
    """One product with a constant weight. int8: both inputs come out of a DQ. pattern: 2:4, after rounding too.
    epilogue: "int8" or "float". why: plain words, "" when nothing stands in the way."""

    name: str
    outputs: int
    inputs: int
    int8: bool
    pattern: bool
    epilogue: str
    verdict: Verdict
    why: str


def judge(found: Sequence[Gemm]) -> list[LayerVerdict]:
    """A verdict for each product."""
    groups = merge_groups(found)
    verdicts = []
    for gemm in found:
        weight = gemm.weight
        reasons = [reason for reason in _reasons(gemm, groups) if reason]
        verdict: Verdict = "sparse INT8 likely"
        if not gemm.int8:
            verdict = "float"
        elif not weight.pattern:
            verdict = "dense INT8"
        elif reasons:
            verdict = "eligible, will likely stay dense"
        elif weight.dequantize is not None and weight.constant.values.dtype.kind == "i":
            reasons = ["its weight is an INT8 constant, whose eligibility only the build log tells"]
        why = "; ".join(reasons[:REASONS])
        verdicts.append(LayerVerdict(gemm.name, weight.outputs, weight.inputs, gemm.int8, weight.pattern,
                                     gemm.epilogue, verdict, why))  # fmt: skip
    return verdicts


def _reasons(gemm: Gemm, groups: list[list[Gemm]]) -> Iterator[str]:
    weight = gemm.weight
    if not weight.pattern:
        yield _not_sparse(gemm)
    if gemm.dequantize is None:
        yield "its input is not quantized"
    if weight.dequantize is None:
        yield "its weight is not quantized"
    if not weight.pattern:
        return
    beside = mixed(gemm, groups)
    if beside is not None:
        yield f"it may be merged with '{beside.name}', which is dense"
    if gemm.epilogue != "int8":
        yield f"{gemm.reader} takes its result in float"
    yield odd_sizes(gemm)
    yield narrow(gemm)


def _not_sparse(gemm: Gemm) -> str:
    weight = gemm.weight
    if weight.inputs % 4:
        return f"not 2:4: {weight.inputs} inputs are no multiple of 4"
    if weight.stored != weight.rounded:
        return f"2:4 only {'before' if weight.stored else 'after'} rounding"
    if weight.density > 0.95:
        return "not pruned"
    return f"not 2:4: {weight.broken} of {weight.groups} groups of four inputs hold more than two non-zeros"
