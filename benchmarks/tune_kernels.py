"""Which launch shapes are fastest on this card: decode attention, chunks of prompts, the thin products of one and two rows.

    python benchmarks/tune_kernels.py [decode] [prefill] [thin]

Kernels are compiled by several processes first, then timed by one: microseconds in a graph, a line for each shape, best first.
"""

# ruff: noqa: B023  every closure is called before its loop goes on

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_kernels import bf16, micros

from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.gemv import GemvConfig, thin_linear
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.paged_prefill import PrefillConfig, paged_prefill

PROCESSES = 14
DECODE = [
    *((64, 2, 4, 4), (64, 2, 4, 5), (64, 2, 4, 6), (64, 3, 4, 5), (64, 4, 4, 4), (64, 5, 4, 4), (64, 4, 2, 4), (64, 3, 2, 5)),
    *((32, 4, 4, 5), (32, 4, 4, 6), (32, 3, 4, 6), (32, 4, 2, 5), (32, 6, 2, 4), (32, 6, 4, 5), (32, 5, 1, 4), (16, 8, 1, 5)),
    *((128, 1, 8, 5), (128, 1, 8, 4), (128, 2, 8, 4), (128, 2, 4, 4), (128, 1, 4, 5), (64, 2, 8, 5), (64, 3, 4, 4)),
]
PREFILL = [
    *((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 4, 4), (128, 32, 8, 4)),
    *((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 4)),
]
CHUNKS = {
    "4096": [(0, 4096)],
    "512 behind 4096": [(4096, 512)],
    "16x256": [(0, 256)] * 16,
    "8x512 behind 1024": [(1024, 512)] * 8,
}
"""Rows of (tokens cached, tokens to run)."""
LOADS = {
    "256x600": [600] * 256,
    "64x640": [640] * 64,
    "130 mixed": [300 + 11 * i for i in range(130)],
    "1x256": [256],
    "8x2000": [2000] * 8,
    "64x4160 shared": [4160] * 64,
}
THIN = {
    "0.6B qkv": (4096, 1024, True, False),
    "0.6B o": (1024, 2048, False, False),
    "0.6B gate_up": (3072, 1024, True, True),
    "0.6B down": (1024, 3072, False, False),
    "0.6B lm_head": (151936, 1024, False, False),
    "8B qkv": (6144, 4096, True, False),
    "8B o": (4096, 4096, False, False),
    "8B gate_up": (12288, 4096, True, True),
    "8B down": (4096, 12288, False, False),
    "8B lm_head": (151936, 4096, False, False),
}

Measured = tuple[str, str, Callable[[], float]]


def load(lengths: list[int], shared: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Caches of some layers, and block tables in random order behind ``shared`` common blocks."""
    pages = [-(-length // 16) - shared for length in lengths]
    order = torch.randperm(sum(pages) + shared, dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(pages) + shared, dtype=torch.int32)
    at = shared
    for row, count in enumerate(pages):
        tables[row, :shared] = order[:shared]
        tables[row, shared : shared + count] = order[at : at + count]
        at += count
    copies = 2 if at > 4000 else 8
    return [bf16(at, 8, 2, 16, 128) for _ in range(copies)], tables.to("cuda")


def decode(timed: bool) -> Iterator[Measured]:
    """Every load with every configuration."""
    for (name, lengths), heads in itertools.product(LOADS.items(), (16, 32)):
        caches, tables = load(lengths if timed else lengths[:1], 256 if "shared" in name else 0)
        rows = len(lengths) if timed else 1
        lens = torch.tensor(lengths[:rows], dtype=torch.int32, device="cuda")
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        q = bf16(rows, heads, 128)
        for shape in DECODE:
            config = DecodeConfig(*shape)

            def run(config: DecodeConfig = config) -> float:
                plan = DecodePlan(256, heads, 8, 128, "cuda", max_blocks=512, config=config)
                plan.update(lens, slots, tables)
                calls = [lambda c=c: paged_decode(q, c, plan, pdl=True) for c in caches]  # type: ignore[misc]
                return micros(calls * 2) if timed else calls[0]() is None

            gb = sum(lengths) * 4096 / 1e3
            yield f"decode {name} {heads}/8 ({gb / 4240:.1f} us at 4.24 TB/s)", str(shape), run


def prefill(timed: bool) -> Iterator[Measured]:
    """Every chunk with every configuration."""
    for (name, rows), heads in itertools.product(CHUNKS.items(), (16, 32)):
        caches, tables = load([sum(row) for row in rows], 0)
        starts = torch.tensor([0, *itertools.accumulate(row[1] for row in rows)], dtype=torch.int32, device="cuda")
        computed = torch.tensor([row[0] for row in rows], dtype=torch.int32, device="cuda")
        slots = torch.arange(len(rows), dtype=torch.int32, device="cuda")
        q = bf16(sum(row[1] for row in rows), heads, 128)
        work = sum(4 * heads * 128 * new * (cached + new / 2) for cached, new in rows)
        for shape in PREFILL:
            config = PrefillConfig(*shape)

            def run(config: PrefillConfig = config) -> float:
                calls = [lambda c=c: paged_prefill(q, c, tables, slots, starts, computed, config=config) for c in caches]  # type: ignore[misc]
                return micros(calls) if timed else calls[0]() is None

            yield f"prefill {name} {heads}/8 ({work / 7.21e8:.1f} us at 721 TFLOP/s)", str(shape), run


def thin(timed: bool) -> Iterator[Measured]:
    """Every layer with every configuration, and cuBLAS."""
    for (name, (n, k, norm, silu)), rows in itertools.product(THIN.items(), (1, 2)):
        total = n * (2 if silu else 1)
        copies = max(2, min(40, int(2e8 / (total * k * 2)) + 1)) if timed else 1
        weights = [bf16(total, k) for _ in range(copies)]
        x, out, norm_weight = bf16(rows, k), bf16(rows, n), bf16(k)
        key = f"thin {name} x{rows} ({total * k * 2 / 4.24e6:.1f} us at 4.24 TB/s)"
        for block_n, block_k, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
            per_thread = block_n * block_k * (2 if silu else 1) // (32 * warps)
            if block_k > k or not 16 <= per_thread <= 128 or k // block_k > 16:
                continue
            config = GemvConfig("fma", block_n, block_k, warps)

            def run(config: GemvConfig = config) -> float:
                def call(weight: torch.Tensor) -> None:
                    thin_linear(
                        x, weight, norm_weight=norm_weight if norm else None, silu=silu, out=out, config=config, pdl=True
                    )

                return micros([lambda w=w: call(w) for w in weights]) if timed else call(weights[0]) is None  # type: ignore[misc]

            yield key, str((block_n, block_k, warps)), run
        if timed:
            yield key, "cublas", lambda: micros([lambda w=w: F.linear(x, w) for w in weights])  # type: ignore[misc]


def main() -> None:
    """Compile as one of several processes, or have that done and measure."""
    parts = {"decode": decode, "prefill": prefill, "thin": thin}
    if sys.argv[1:2] == ["--compile"]:
        mine, chosen = int(sys.argv[2]), sys.argv[3:]
        for name in chosen:
            for index, (_, _, run) in enumerate(parts[name](False)):
                if index % PROCESSES == mine:
                    with contextlib.suppress(Exception):  # what does not compile is a line of the table later
                        run()
        return
    chosen = sys.argv[1:] or list(parts)
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", str(index), *chosen]) for index in range(PROCESSES)]
    for worker in workers:
        worker.wait()
    found: dict[str, list[tuple[float, str]]] = {}
    for name in chosen:
        for key, config, run in parts[name](True):
            try:
                found.setdefault(key, []).append((run(), config))
            except Exception as error:
                print(key, config, str(error)[:80])
    for key, times in found.items():
        print(key, "  ".join(f"{us:.2f} {config}" for us, config in sorted(times)[:7]), "| worst", f"{max(times)[0]:.1f}")


if __name__ == "__main__":
    main()
