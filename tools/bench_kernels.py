"""Measure the engine's linear and attention kernels against the int8 peak of this CPU.

python tools/bench_kernels.py [--tokens 128] [--threads 1] [--isa avx512vnni]

The peak is the best rate of a dense product that stays in cache (3072 inputs, 128 outputs, 64 tokens), so a
share is of what this machine can do at that moment. Times are the least of several runs of the step alone.
"""

from __future__ import annotations

import argparse

import numpy as np

from nmcompile import _native


def dense(w: np.ndarray) -> dict[str, object]:
    n, k = w.shape
    tiles = w.reshape(n // 4, 4, k // 4, 4).transpose(0, 2, 1, 3)
    return {"format": "dense", "values": np.ascontiguousarray(tiles)}


def blocks(rng: np.random.Generator, n: int, k: int, rows: int, density: float) -> dict[str, object]:
    keep = rng.random((n // rows, k // 4)) < density
    count = int(keep.sum())
    return {
        "format": "blocks",
        "rows": rows,
        "values": rng.integers(-127, 128, (count, rows, 4)).astype(np.int8),
        "columns": np.nonzero(keep)[1].astype(np.uint16),
        "starts": np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.uint32),
    }


def seconds(program: _native.Program, step: int, inputs: list[np.ndarray], repeats: int) -> float:
    return min(program.run_profiled(inputs)[1][step] for _ in range(repeats)) * 1e-9


def linear(
    args: argparse.Namespace,
    n: int,
    k: int,
    tokens: int,
    weight: dict[str, object],
    activation: str = "none",
) -> float:
    """Seconds of one linear step with a u8 result."""
    p = _native.Program(isa=args.isa, threads=args.threads)
    x, q = p.buffer(k, "f32"), p.buffer(k, "u8")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=q, scale=0.03, zero_point=128)
    y = p.buffer(n, "u8")
    ones = np.full(n, 0.001, np.float32)
    p.linear(
        x=q, y=y, weight=weight, w_scale=ones, bias=ones, x_scale=0.03, x_zero_point=128,
        activation=activation, y_scale=0.1, y_zero_point=100,
    )  # fmt: skip
    p.leave(x=x, slot=0)
    p.prepare()
    data = np.random.default_rng(0).standard_normal((1, tokens, k)).astype(np.float32)
    return seconds(p, 2, [data], args.repeats)


def peak(args: argparse.Namespace) -> float:
    """Multiply-adds per second of a dense product whose panel and weights stay in the first caches."""
    w = np.ones((128, 3072), np.int8)
    return max(w.size * 64 / linear(args, *w.shape, 64, dense(w)) for _ in range(3))


def attention(args: argparse.Namespace, tokens: int, heads: int, depth: int) -> float:
    rows = heads * depth
    p = _native.Program(isa=args.isa, threads=args.threads)
    x, u = p.buffer(rows, "f32"), p.buffer(rows, "u8")
    p.enter(y=x, slot=0)
    p.quantize(x=x, y=u, scale=0.03, zero_point=128)
    eye, ones = dense(np.eye(rows, dtype=np.int8)), np.ones(rows, np.float32)
    q, k, v, y = (p.buffer(rows, layout) for layout in ("u8", "s8", "s8rows", "u8"))
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
    data = np.random.default_rng(0).standard_normal((1, tokens, rows)).astype(np.float32)
    return seconds(p, 5, [data], args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    best = peak(args)
    p = _native.Program(isa=args.isa, threads=args.threads)
    print(f"{p.isa}, {args.threads} threads, {args.tokens} tokens; peak {best / 1e9:.0f} G MAC/s")
    for n, k in ((768, 768), (3072, 768), (768, 3072)):
        w = rng.integers(-127, 128, (n, k)).astype(np.int8)
        cases: list[tuple[str, float, dict[str, object]]] = [("dense", 1.0, dense(w))]
        for rows in (1, 2, 4, 8, 16):
            cases += [(f"{rows}x4", density, blocks(rng, n, k, rows, density)) for density in (0.2, 0.1)]
        for name, density, weight in cases:
            time = linear(args, n, k, args.tokens, weight)
            rate = n * k * density * args.tokens / time
            facts = f"{time * 1e6:8.1f} us {rate / 1e9:6.0f} G MAC/s {rate / best:5.0%}"
            print(f"{n:5}x{k:<5} {name:6} {density:4.0%} {facts}")
        for activation in ("gelu", "gelu_tanh"):
            time = linear(args, n, k, args.tokens, blocks(rng, n, k, 2, 0.1), activation=activation)
            print(f"{n:5}x{k:<5} 2x4     10% {time * 1e6:8.1f} us with {activation}")
    time = attention(args, args.tokens, 12, 64)
    print(f"attention 12 heads of 64 {time * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
