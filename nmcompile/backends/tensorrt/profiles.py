"""What the versions of TensorRT differ in, as far as the graph that they are given is concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nmcompile.errors import UnsupportedError


@dataclass(frozen=True)
class Profile:
    """One generation of TensorRT and the ONNX that is emitted for it.

    name: what --trt-version takes. opset: of the emitted graph. newest_opset: the last one its parser reads (docs/
    operators.md of onnx-tensorrt). strong: types in the graph are types in the engine. zero_points: Q and DQ need a
    third input. half_scales: scales may be FP16 or BF16. int8_weights: an INT8 constant may go into DQ without a Q.
    int64: the engine has 64-bit integers. elements: element types that the parser converts (convertDtype there), by
    their numpy names.
    """

    name: str
    opset: int
    newest_opset: int
    strong: bool
    zero_points: bool
    half_scales: bool
    int8_weights: bool
    int64: bool
    elements: frozenset[str]

    @property
    def scales(self) -> tuple[str, ...]:
        """Types that a scale, or a constant that is to be quantized, may have."""
        return ("float32", "float16", "bfloat16") if self.half_scales else ("float32",)


_WEAK_ELEMENTS = frozenset({"float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"})
_STRONG_ELEMENTS = _WEAK_ELEMENTS | {"bfloat16", "float8_e4m3fn", "int4"}


def _strong(name: str) -> Profile:
    # 10.0 reads opset 20; later releases read more, which no release note promises for every operator.
    return Profile(name, opset=19, newest_opset=20, strong=True, zero_points=False, half_scales=True,
                   int8_weights=True, int64=True, elements=_STRONG_ELEMENTS)  # fmt: skip


PROFILES: Mapping[str, Profile] = {
    "8.6": Profile("8.6", opset=17, newest_opset=17, strong=False, zero_points=True, half_scales=False,
                   int8_weights=False, int64=False, elements=_WEAK_ELEMENTS),
    "10": _strong("10"),
    "11": _strong("11"),
}  # fmt: skip


def profile(name: str) -> Profile:
    """The profile of that name. UnsupportedError names the choices."""
    if name not in PROFILES:
        raise UnsupportedError(f"TensorRT {name} has no profile; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
