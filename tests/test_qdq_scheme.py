"""Scheme: one value for all passes of quantization, checked in one place, and the text of passes that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from nmcompile.contract import Pass
from nmcompile.errors import PassError
from nmcompile.passes import InsertQdq, QuantizeOutputs, SmoothActivations
from nmcompile.qdq.scheme import CPU, TENSORRT, Scheme
from nmcompile.recipes import PRESETS, scheme_passes
from nmcompile.spec import parse_spec, spec

DEFAULT = PRESETS["default"]


@pytest.mark.parametrize(("options", "message"), [
    ({"activations": "uint4"}, "activations=uint4 is not known; choose uint8 (CPU) or int8 (TensorRT)"),
    ({"clip": "median"}, "clip=median is not known; choose one of min-max, percentile, entropy, mse, output"),
    ({"attention": "half"}, "attention=half is not known; choose int8 or float"),
    ({"weight_bits": 4}, "weight_bits=4 is not known; choose 8, or 7 for CPUs without VNNI"),
    ({"alpha": 1.0}, "alpha=1.0 is not between 0 and 1; 0.5 shares the load evenly, 0 chooses"),
    ({"outputs": "some"}, "outputs=some is not known; choose sparse, all or none"),
    ({"least_scale": -1.0}, "least_scale=-1.0 is not a scale; 0 takes every weight as it is"),
    ({"least_scale": float("nan")}, "least_scale=nan is not a scale; 0 takes every weight as it is"),
])  # fmt: skip
def test_every_option_is_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(PassError) as error:
        replace(CPU, **options)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize("text", [
    "insert-qdq",
    "insert-qdq(activations=int8, clip=percentile, percentile=99.9, bias=true, least_scale=6.2e-05, attention=float)",
    'insert-qdq(weight_bits=7, softmax=true, heads=true, include="a*"|b, exclude=c)',
])  # fmt: skip
def test_a_pass_goes_through_its_scheme_and_back(text: str) -> None:
    (pass_,) = parse_spec(text)
    assert isinstance(pass_, InsertQdq) and InsertQdq.of(pass_.scheme) == pass_


def test_what_recipes_say() -> None:
    def said(passes: Sequence[Pass]) -> list[str]:
        return [spec(pass_) for pass_ in passes]

    assert said(scheme_passes(replace(DEFAULT.scheme(CPU), keep=("a",)))) == [
        "smooth-activations(alpha=0.0)", "insert-qdq(clip=output, bias=true, exclude=a)"]  # fmt: skip
    assert said(scheme_passes(replace(DEFAULT.scheme(TENSORRT), attention="float", outputs="sparse"))) == [
        "smooth-activations(alpha=0.0, activations=int8)",
        "insert-qdq(activations=int8, clip=output, bias=true, least_scale=6.2e-05, attention=float)",
        "quantize-outputs(clip=mse)",
    ]
    fast = replace(PRESETS["fast"].scheme(TENSORRT), attention="int8", outputs="none")
    assert said(scheme_passes(fast))[1:] == ["insert-qdq(activations=int8, least_scale=6.2e-05, softmax=true)"]


def test_a_scheme_says_its_passes() -> None:
    assert scheme_passes(CPU) == [InsertQdq()]
    assert [type(pass_) for pass_ in scheme_passes(replace(TENSORRT, alpha=0.5))] == [
        SmoothActivations, InsertQdq, QuantizeOutputs]  # fmt: skip
    # attention in float has no probabilities to quantize, with int8 they are
    assert [InsertQdq.of(replace(TENSORRT, attention=kind)).softmax for kind in ("float", "int8")] == [False, True]


def test_outputs_take_their_ranges_without_layers() -> None:
    assert QuantizeOutputs.of(Scheme(clip="output", outputs="all")).clip == "mse"
