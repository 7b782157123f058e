"""Measure the engine's linear and attention kernels against the int8 peak of this CPU.

python tools/bench_kernels.py [--tokens 128] [--threads 1] [--isa avx512vnni]
python tools/bench_kernels.py --interpolation      # how far tuning's times between densities are off

The peak is the best rate of a dense product that stays in cache (3072 inputs, 128 outputs, 64 tokens), so a
share is of what this machine can do at that moment. Times are the least of several runs of the step alone, the
kernels of one shape in turn: first with bias, scales, rounding to bytes and storing, then of the products alone
(one thread). Where PyTorch is installed, its oneDNN does the dense layer too (bytes in, bytes out, one thread).
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from time import perf_counter

import numpy as np

from nmcompile import _native
from nmcompile.backends.cpu.measure import (
    Case,
    in_turn,
    int8_peak,
    made_up,
    memory_bandwidth,
    seconds,
    step_timer,
    supported,
)
from nmcompile.backends.cpu.pack import BLOCKS, DENSE, FLOAT, GATHERS, Kind, pack_dense
from nmcompile.backends.cpu.tuning import GRID, Table


def attention(args: argparse.Namespace, heads: int, depth: int) -> float:
    """Seconds of one attention step with a u8 result."""
    rows = heads * depth
    p = _native.Program(isa=args.isa, threads=args.threads)
    x, u = p.buffer(rows, "f32"), p.buffer(rows, "u8")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=u, scale=0.03, zero_point=128)
    eye = {"format": "dense", "values": pack_dense(np.eye(rows, dtype=np.int8))}
    ones = np.ones(rows, np.float32)
    q, k, v, y = (p.buffer(rows, layout) for layout in ("u8", "keys", "values", "u8"))
    for out in (q, k, v):
        p.linear(
            x=u, y=out, weight=eye, w_scale=ones, bias=None, x_scale=0.03, x_zero_point=128, y_scale=0.03,
            y_zero_point=128 if out == q else 0,
        )  # fmt: skip
    p.attention(
        q=q, k=k, v=v, y=y, heads=heads, scale=depth**-0.5, q_scale=0.03, q_zero_point=128, k_scale=0.03,
        v_scale=0.03, y_scale=0.03, y_zero_point=128,
    )  # fmt: skip
    p.leave(x=x, slot=0)
    p.prepare()
    data = np.random.default_rng(0).standard_normal((1, args.tokens, rows)).astype(np.float32)
    return in_turn([step_timer(p, 5, [data])], args.repeats)[0]


def linear_cases(n: int, k: int, tokens: int) -> list[Case]:
    kinds = [kind for kind in (*BLOCKS, *GATHERS) if supported(kind)]
    sparse = [Case(n, k, kind, density, tokens) for kind in kinds for density in (0.2, 0.1)]
    gelu = [Case(n, k, Kind("blocks", 2), 0.1, tokens, activation) for activation in ("gelu", "gelu_tanh")]
    return [Case(n, k, DENSE, 1.0, tokens), *sparse, Case(n, k, FLOAT, 1.0, tokens), *gelu]


def products(case: Case, isa: str, repeats: int) -> float:
    """Seconds of the products alone, on one thread."""
    weight = made_up(case.outputs, case.inputs, case.kind, case.density)
    return _native.time_products(weight, case.inputs, case.outputs, case.tokens, repeats, isa)


def onednn(n: int, k: int, tokens: int, repeats: int) -> float | None:
    """Seconds of oneDNN's dense u8 x s8 layer with a u8 result, on one thread; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    x = torch.randint(0, 255, (tokens, k), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, k), dtype=torch.int8), list(x.shape))
    scales, zeros, bias = torch.ones(n) * 1e-3, torch.zeros(n, dtype=torch.int32), torch.zeros(n)
    call = torch.ops.onednn.qlinear_pointwise
    best = float("inf")
    for _ in range(repeats + 5):
        start = perf_counter()
        call(x, 0.03, 128, packed, scales, zeros, bias, 0.1, 100, torch.uint8, "none", [], "")
        best = min(best, perf_counter() - start)
    return best


def interpolation(args: argparse.Namespace) -> None:
    """Times at densities between those that tuning measures, next to what it makes of its own."""
    for n, k in ((384, 384), (768, 768), (768, 3072)):
        for kind in (kind for kind in (*BLOCKS, *GATHERS) if supported(kind)):
            between = [(low + high) / 2 for low, high in pairwise(GRID)]
            cases = [Case(n, k, kind, density, args.tokens) for density in (*GRID, *between)]
            times = [time * 1e6 for time in seconds(cases, isa=args.isa, repeats=args.repeats)]
            table = Table("", "", "", args.tokens, {(n, k, kind, d): t for d, t in zip(GRID, times, strict=False)})
            made = [table.microseconds(n, k, kind, density) or 0.0 for density in between]
            errors = [guess / time - 1 for guess, time in zip(made, times[len(GRID) :], strict=True)]
            shown = "  ".join(f"{d:.1%} {e:+.1%}" for d, e in zip(between, errors, strict=True))
            print(f"{n:5}x{k:<5} {kind!s:11} {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--interpolation", action="store_true")
    args = parser.parse_args()
    if args.interpolation:
        return interpolation(args)
    p = _native.Program(isa=args.isa, threads=args.threads)
    best, bandwidth = int8_peak(args.isa, args.threads), memory_bandwidth(args.threads)
    print(f"{p.isa}, {args.threads} threads, {args.tokens} tokens; peak {best / 1e9:.0f} G MAC/s, "
          f"copying {bandwidth / 1e9:.0f} GB/s")  # fmt: skip
    for n, k in ((768, 768), (3072, 768), (768, 3072), (1024, 4096)):
        peer = onednn(n, k, args.tokens, args.repeats)
        if peer is not None:
            print(f"{n:5}x{k:<5} {'oneDNN':11} 100% {peer * 1e6:8.1f} us {n * k * args.tokens / peer / best:5.0%}")
        cases = linear_cases(n, k, args.tokens)
        times = seconds(cases, threads=args.threads, isa=args.isa, repeats=args.repeats)
        for case, time in zip(cases, times, strict=True):
            rate = n * k * case.density * args.tokens / time
            facts = f"{time * 1e6:8.1f} us {rate / 1e9:6.0f} G MAC/s {rate / best:5.0%}"
            if case.activation == "none" and case.kind != FLOAT:
                alone = products(case, args.isa, args.repeats)
                rate = n * k * case.density * args.tokens / alone
                facts += f", products {alone * 1e6:8.1f} us {rate / best:5.0%}"
            if peer is not None:
                facts += f", {peer / time:4.1f}x oneDNN"
            note = "" if case.activation == "none" else f" with {case.activation}"
            print(f"{n:5}x{k:<5} {case.kind!s:11} {case.density:4.0%} {facts}{note}")
    time = attention(args, 12, 64)
    print(f"attention 12 heads of 64 {time * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
