"""Achieved bandwidth and arithmetic of every kernel against cuBLAS and SDPA, one JSON line per measurement.

    python benchmarks/bench_kernels.py [thin] [decode] [several] [prefill] [small] [sample] [energy]

Times are graph replays (median); weights rotate through copies that exceed the second-level cache. GB/s counts each input read
once and each output written once. ``energy``: millijoules of one launch by the driver, over two seconds of the same.
"""

# ruff: noqa: B023, D103  every closure is called before its loop goes on; a script documents itself above

import ctypes
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from vllm_model.kernels._launch import compile_together
from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.gemv import GemvConfig, default_gemv_config, thin_linear
from vllm_model.kernels.logprobs import token_logprobs
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.paged_prefill import PrefillConfig, paged_prefill
from vllm_model.kernels.qk_norm_rope import qk_norm_rope, rope_table
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.kernels.silu_mul import silu_mul

DEVICE = "cuda"


def micros(calls: Sequence[Callable[[], object]], replays: int = 12) -> float:
    """Microseconds of one call, in a graph that makes all of ``calls``."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])


def report(kernel: str, shape: str, us: float, *, moved: float = 0.0, flops: float = 0.0, **more: object) -> None:
    line: dict[str, object] = {"kernel": kernel, "shape": shape, "us": round(us, 2)}
    if moved:
        line["GB/s"] = round(moved / us / 1e3)
    if flops:
        line["TFLOP/s"] = round(flops / us / 1e6)
    print(json.dumps(line | more), flush=True)


def attempt(kernel: str, shape: str, run: Callable[[], None]) -> None:
    """A configuration that does not fit the card is a line of the table, not the end of it."""
    try:
        run()
    except Exception as error:  # noqa: BLE001, RUF100
        print(json.dumps({"kernel": kernel, "shape": shape, "error": str(error)[:120]}), flush=True)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def thin() -> None:
    shapes = {
        "0.6B qkv": (4096, 1024, True, False),
        "0.6B o": (1024, 2048, False, False),
        "0.6B gate_up": (3072, 1024, True, True),
        "0.6B down": (1024, 3072, False, False),
        "0.6B lm_head": (151936, 1024, True, False),
        "8B qkv": (6144, 4096, True, False),
        "8B o": (4096, 4096, False, False),
        "8B gate_up": (12288, 4096, True, True),
        "8B down": (4096, 12288, False, False),
    }
    for name, (n, k, norm, silu) in shapes.items():
        total = n * (2 if silu else 1)
        copies = max(2, min(40, int(3e8 / (total * k * 2)) + 1))
        weights = [bf16(total, k) * k**-0.5 for _ in range(copies)]
        norm_weight = bf16(k)
        for rows in (1, 2):
            x, residual, out = bf16(rows, k), None if norm else bf16(rows, n), bf16(rows, n)
            moved = total * k * 2.0
            report("cublas", f"{name} x{rows}", micros([lambda w=w: F.linear(x, w) for w in weights]), moved=moved)  # type: ignore[misc]
            configs = [default_gemv_config(rows, n, k, silu=silu)]
            configs += [GemvConfig(*shape) for shape in ((4, 512, 2), (4, 1024, 4), (8, 1024, 8), (16, 256, 4))]
            for config in dict.fromkeys(configs):

                def run(config: GemvConfig = config, x: torch.Tensor = x, name: str = f"{name} x{rows}") -> None:
                    def call(w: torch.Tensor, pdl: bool) -> None:
                        given = {"norm_weight": norm_weight} if norm else {"residual": residual}
                        thin_linear(x, w, silu=silu, out=out, config=config, pdl=pdl, **given)

                    us = micros([lambda w=w: call(w, False) for w in weights])  # type: ignore[misc]
                    pdl = micros([lambda w=w: call(w, True) for w in weights])  # type: ignore[misc]
                    report("thin", name, us, moved=moved, pdl_us=round(pdl, 2), config=str(config)[10:])

                attempt("thin", f"{name} x{rows} {config}", run)


def paged(lengths: list[int], kv_heads: int, layers: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    pages = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(pages), dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    at = 0
    for row, count in enumerate(pages):
        tables[row, :count] = order[at : at + count]
        at += count
    return [bf16(at, kv_heads, 2, 16, 128) for _ in range(layers)], tables.to(DEVICE)


def decode() -> None:
    mixed = torch.randint(100, 2048, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, lengths in {"256 mixed": mixed, "64x640": [640] * 64, "1x256": [256], "1x32768": [32768]}.items():
        for heads in (16, 32):
            caches, tables = paged(lengths, 8, 2 if sum(lengths) > 50000 else 6)
            lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
            slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
            q = bf16(len(lengths), heads, 128)
            for config in (DecodeConfig(), DecodeConfig(32, 6, 2, 4), DecodeConfig(32, 4, 2, 5), DecodeConfig(128, 1, 8, 5)):

                def run(config: DecodeConfig = config, heads: int = heads, name: str = name) -> None:
                    plan = DecodePlan(len(lengths), heads, 8, 128, DEVICE, max_blocks=tables.shape[1], config=config)
                    plan.update(lens, slots, tables)
                    us = micros([lambda c=c: paged_decode(q, c, plan) for c in caches])  # type: ignore[misc]
                    report("decode", f"{name} heads {heads}/8", us, moved=sum(lengths) * 8 * 512.0, config=str(config)[12:])

                attempt("decode", f"{name} {config}", run)


SEVERAL = [
    *((32, 6, 2, 4), (32, 4, 2, 5), (32, 4, 4, 4), (32, 3, 4, 5), (32, 5, 2, 4), (32, 3, 2, 6), (64, 2, 4, 4), (64, 3, 4, 4)),
    *((64, 2, 4, 5), (64, 4, 4, 3), (64, 3, 2, 4), (64, 4, 4, 4), (64, 3, 4, 5), (64, 6, 4, 2), (64, 6, 2, 3), (128, 2, 4, 3)),
]
"""As :class:`DecodeConfig`."""


def several() -> None:
    """Launch shapes of decode attention for several tokens a row, and over an e4m3 cache."""
    loads = [(1, 690), (8, 690), (8, 2000), (24, 690), (64, 690), (256, 600)]
    kinds = [(2, False), (5, False), (9, False), (1, True), (5, True)]
    cases = [
        (heads, rows, length, queries, fp8)
        for heads, (rows, length), (queries, fp8) in itertools.product((16, 32), loads, kinds)
        if rows * queries <= 576
    ]

    def run(timed: Callable[[Sequence[Callable[[], object]]], float]) -> None:
        for heads, rows, length, queries, fp8 in cases:
            found, tables = paged([length] * rows, 8, 4 if rows < 32 else 1)
            caches = [cache.to(torch.float8_e4m3fn) if fp8 else cache for cache in found]
            scales = {"k_scale": torch.ones(8, device=DEVICE), "v_scale": torch.ones(8, device=DEVICE)} if fp8 else {}
            slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
            lens, q = torch.full_like(slots, length), bf16(rows * queries, heads, 128)
            options = {"queries": queries, "first_positions": lens - queries if queries > 1 else None, "pdl": True, **scales}
            shape = f"{rows}x{length} heads {heads}/8, {queries} tokens{', e4m3' if fp8 else ''}"
            for config in SEVERAL:
                plan = DecodePlan(
                    rows, heads, 8, 128, DEVICE, max_blocks=tables.shape[1], max_queries=9, config=DecodeConfig(*config)
                )
                plan.update(lens, slots, tables)

                def one() -> None:
                    us = timed([lambda c=c: paged_decode(q, c, plan, **options) for c in caches] * 2)  # type: ignore[misc]
                    if us:
                        moved = rows * length * 8 * (256.0 if fp8 else 512.0)
                        report("decode", shape, us, moved=moved, config=str(config))

                attempt("decode", f"{shape} {config}", one)

    def only_launched(calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return 0.0

    compile_together([lambda: run(only_launched)])
    run(micros)


def prefill() -> None:
    for name, rows, prefix, chunk in (
        ("8x4096", 8, 0, 4096),
        ("64x64 behind 4096", 64, 4096, 64),
        ("4x1024 behind 3072", 4, 3072, 1024),
    ):
        for heads in (16, 32):
            (cache,), tables = paged([prefix + chunk] * rows, 8, 1)
            q = bf16(rows * chunk, heads, 128)
            start = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * chunk
            computed = torch.full((rows,), prefix, dtype=torch.int32, device=DEVICE)
            slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
            flops = 4.0 * rows * heads * 128 * (chunk * prefix + chunk * (chunk + 1) / 2)
            for config in (
                PrefillConfig(),
                PrefillConfig(128, 64, 8, 3),
                PrefillConfig(128, 128, 8, 2),
                PrefillConfig(64, 64, 4, 3),
            ):

                def run(config: PrefillConfig = config, heads: int = heads, name: str = name) -> None:
                    us = micros([lambda: paged_prefill(q, cache, tables, slots, start, computed, config=config)])
                    report("prefill", f"{name} heads {heads}/8", us, flops=flops, config=str(config)[13:])

                attempt("prefill", f"{name} {config}", run)
            if not prefix:
                dense = [bf16(rows, heads, chunk, 128) for _ in range(3)]
                us = micros([lambda: F.scaled_dot_product_attention(*dense, is_causal=True)])
                report("sdpa", f"{name} heads {heads}", us, flops=flops)


def small() -> None:
    for tokens in (1, 256, 4096):
        for name, width, inter, heads in (("0.6B", 1024, 3072, 16), ("8B", 4096, 12288, 32)):
            x, residual, weight = bf16(tokens, width), bf16(tokens, width), bf16(width)
            us = micros([lambda: rms_norm(x, weight, 1e-6, residual)] * 8)
            report("rms_norm+residual", f"{name} {tokens}", us, moved=8.0 * tokens * width)
            gate_up = bf16(tokens, 2 * inter)
            report("silu_mul", f"{name} {tokens}", micros([lambda: silu_mul(gate_up)] * 8), moved=6.0 * tokens * inter)
            qkv = bf16(tokens, (heads + 16) * 128)
            (cache,), tables = paged([4096], 8, 1)
            positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
            slots, table, norm = torch.zeros_like(positions), rope_table(4096, 128, 1e6, DEVICE), bf16(128)
            us = micros(
                [lambda: qk_norm_rope(qkv, table, positions, slots, tables, cache, heads, q_weight=norm, k_weight=norm)] * 8
            )
            report("qk_norm_rope", f"{name} {tokens}", us, moved=4.0 * tokens * (heads + 16) * 128)


def sampling() -> None:
    for rows in (1, 64, 256):
        for scale in (0.3, 3.0):
            logits = bf16(rows, 151936) * scale
            integers = torch.arange(rows, dtype=torch.int32, device=DEVICE)
            temperature, seed = torch.full((rows,), 0.7, device=DEVICE), torch.arange(rows, device=DEVICE)
            workspace = SamplerWorkspace(rows, DEVICE)
            top_k, top_p = torch.full_like(integers, 50), torch.full_like(temperature, 0.9)
            off, none, zero = torch.zeros_like(integers), torch.ones_like(temperature), torch.zeros_like(temperature)
            for name, filters in {
                "plain": {},
                "top_k": {"top_k": top_k, "top_p": none, "min_p": zero},
                "top_p": {"top_k": off, "top_p": top_p, "min_p": zero},
            }.items():
                us = micros([lambda f=filters: sample(logits, integers, integers, temperature, seed, workspace, **f)] * 4)  # type: ignore[misc]
                report("sample", f"{rows} {name} spread {scale}", us, moved=rows * 151936 * 2.0)
            us = micros([lambda: token_logprobs(logits, integers, workspace)] * 4)
            report("logprobs", f"{rows}", us, moved=rows * 151936 * 2.0)


def joules(device: torch.device) -> Callable[[], float]:
    """A function to what the card has taken so far, as its driver counts: every 20 to 100 ms."""
    nvml, handle, spent = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        raise RuntimeError("the driver does not know this card")

    def read() -> float:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent)):
            raise RuntimeError("the card does not count its energy")
        return spent.value / 1000

    return read


def energy() -> None:
    """What kernels take that share the card's power; the clock follows from it."""
    read = joules(torch.device(DEVICE, torch.cuda.current_device()))

    def measure(kernel: str, shape: str, calls: Sequence[Callable[[], object]], seconds: float = 2.0) -> None:
        each = micros(calls) * 1e-6
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        replays = max(int(seconds / (each * len(calls))), 1)
        for warm in (True, False):  # its clock settles in the first
            torch.cuda.synchronize()
            before, start = read(), time.perf_counter()
            for _ in range(replays):
                graph.replay()
            torch.cuda.synchronize()
            spent, taken, launches = read() - before, time.perf_counter() - start, replays * len(calls)
            if not warm:
                report(kernel, shape, taken / launches * 1e6, mJ=round(spent / launches * 1e3, 1), W=round(spent / taken))

    for heads in (16, 32):
        caches, tables = paged([650] * 256, 8, 2)
        slots = torch.arange(256, dtype=torch.int32, device=DEVICE)
        q = bf16(256, heads, 128)
        for config in (DecodeConfig(), DecodeConfig(32, 6, 2, 4)):
            plan = DecodePlan(256, heads, 8, 128, DEVICE, max_blocks=tables.shape[1], config=config)
            plan.update(torch.full_like(slots, 650), slots, tables)
            calls = [lambda c=c: paged_decode(q, c, plan) for c in caches] * 4  # type: ignore[misc]
            measure("decode", f"256x650 heads {heads}/8, tiles of {config.tile}", calls)
        measure("sum of the cache", "256x650", [lambda c=c: c.view(torch.int32).amax() for c in caches] * 4)  # type: ignore[misc]
    for name, rows, n, k in (
        *(("8B lm_head", rows, 151936, 4096) for rows in (64, 256)),
        *(("8B gate_up", rows, 24576, 4096) for rows in (64, 256, 4096)),
    ):
        x, weights = bf16(rows, k), [bf16(n, k) * k**-0.5 for _ in range(1 if n > 100_000 else 4)]
        measure("cublas", f"{name} x{rows}", [lambda w=w: F.linear(x, w) for w in weights])  # type: ignore[misc]
    gate_up, x, residual, weight = bf16(4096, 24576), bf16(4096, 4096), bf16(4096, 4096), bf16(4096)
    measure("silu_mul", "8B 4096", [lambda: silu_mul(gate_up)] * 4)
    measure("rms_norm+residual", "8B 4096", [lambda: rms_norm(x, weight, 1e-6, residual)] * 4)


if __name__ == "__main__":
    parts = {"small": small, "sample": sampling, "decode": decode, "several": several, "prefill": prefill, "thin": thin}
    parts["energy"] = energy
    for chosen in sys.argv[1:] or parts:
        attempt(chosen, "all", parts[chosen])
