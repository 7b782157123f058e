"""Rules S1 to S7: whether weights that look pruned get TensorRT's 2:4 kernels."""

from __future__ import annotations

from collections.abc import Iterator

from nmcompile.backends.tensorrt import walk
from nmcompile.backends.tensorrt.findings import Hit, Rule, Subject
from nmcompile.backends.tensorrt.gemms import Gemm, merge_groups

PRUNED = 0.7  # density up to which a weight is taken to be meant for 2:4; a dense one has hardly any zeros
MULTIPLE = 32  # channels that INT8 formats are vectorised by, and what cuSPARSELt asks of INT8 operands
WIDE = 256  # channels from which sparse products are faster, by NVIDIA's answers in the issues below
NARROWEST = 16  # ModelOpt quantizes no product with fewer inputs or outputs


def odd_sizes(gemm: Gemm) -> str:
    """"" or which size is no multiple of 32."""
    sizes = (("outputs", gemm.weight.outputs), ("inputs", gemm.weight.inputs))
    return ", ".join(f"{size} {what} are no multiple of {MULTIPLE}" for what, size in sizes if size % MULTIPLE)


def narrow(gemm: Gemm) -> str:
    """"" or which size is below 256."""
    sizes = (("outputs", gemm.weight.outputs), ("inputs", gemm.weight.inputs))
    return ", ".join(f"{size} {what} are fewer than {WIDE}" for what, size in sizes if size < WIDE)


def mixed(gemm: Gemm, groups: list[list[Gemm]]) -> Gemm | None:
    """A dense product of the merge group of a 2:4 one."""
    group = next((group for group in groups if any(other is gemm for other in group)), [])
    return next((other for other in group if not other.weight.pattern), None)


def _pattern(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        weight = gemm.weight
        if weight.stored or weight.rounded or weight.density > PRUNED:
            continue
        what = f"{weight.broken} of {weight.groups} groups of four inputs hold more than two non-zeros"
        if weight.inputs % 4:
            what = f"{weight.inputs} inputs are no multiple of 4"
        yield Hit(gemm.name, f"{1 - weight.density:.0%} of its weights are zero, but {what}")


def _sizes(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if gemm.weight.pattern and odd_sizes(gemm):
            yield Hit(gemm.name, odd_sizes(gemm))


def _rounded(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if gemm.weight.stored != gemm.weight.rounded:
            held = "stored" if gemm.weight.stored else "rounded"
            yield Hit(gemm.name, f"only its {held} values are 2:4")


def _groups(subject: Subject) -> Iterator[Hit]:
    for group in merge_groups(subject.gemms):
        sparse = [gemm.name for gemm in group if gemm.weight.pattern]
        for gemm in group:
            if sparse and not gemm.weight.pattern:
                yield Hit(gemm.name, f"it is dense and reads what the 2:4 layer '{sparse[0]}' reads")


def _epilogue(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if gemm.weight.pattern and gemm.int8 and gemm.epilogue == "float":
            yield Hit(gemm.name, f"{gemm.reader} takes its result in float: eligible, but will likely stay dense")
        elif gemm.weight.pattern and not gemm.int8:
            yield Hit(gemm.name, "its weight is 2:4, but it computes in float", "quantize its inputs", "note")


def _channels(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if gemm.weight.pattern and narrow(gemm):
            yield Hit(gemm.name, narrow(gemm))


def _vectors(subject: Subject) -> Iterator[Hit]:
    for gemm in subject.gemms:
        if not gemm.int8:
            continue
        shape = walk.sizes(gemm.x)
        single = gemm.node.op != "Conv" and shape is not None and all(size == 1 for size in shape[:-1])
        least = min(gemm.weight.outputs, gemm.weight.inputs)
        # ModelOpt lets convolutions of 8 channels pass.
        fits = gemm.node.op == "Conv" and not least % 8
        if gemm.weight.outputs == 1 or single:
            yield Hit(gemm.name, "it multiplies by a vector")
        elif least < NARROWEST and not fits:
            yield Hit(gemm.name, f"{gemm.weight.outputs}x{gemm.weight.inputs} is below {NARROWEST} channels")


RULES = (
    Rule("S1", "pruned weights are 2:4 along the inputs", "warning", "TensorRT developer guide, structured sparsity",
         "prune with n-m-prune(pattern=2:4); one group that breaks it makes the layer dense", _pattern),
    Rule("S2", "outputs and inputs of 2:4 weights are multiples of 32", "warning",
         "cuSPARSELt and CUTLASS, INT8 alignment; ModelOpt's weight_sparsity",
         "leave this layer dense, or pad its channels", _sizes),
    Rule("S3", "weights are 2:4 before and after rounding", "warning", "TensorRT developer guide, structured sparsity",
         "store weights on the INT8 grid, zeros as zeros", _rounded),
    Rule("S4", "layers that read one tensor are 2:4 together or not at all", "warning",
         "TensorRT merges products of one input, Model-Optimizer pull request 1664",
         "prune all layers that read this tensor, or none", _groups),
    Rule("S5", "2:4 products are INT8 in and INT8 out", "warning", "Model-Optimizer pull request 1664",
         "put a Q/DQ pair right behind its bias and activation", _epilogue),
    Rule("S6", "2:4 products have at least 256 channels", "warning", "TensorRT issues 3849 and 4065",
         "leave this layer dense: its sparse kernel is not faster", _channels),
    Rule("S7", "no vector and no narrow product is INT8", "warning", "ModelOpt, onnx/quantization/graph_utils.py",
         "leave this layer float", _vectors),
)  # fmt: skip
