"""Which launch shapes of our products are fastest for 16 to 256 rows, and what whole layers then take against the library's.

    python benchmarks/tune_linear.py [OUTPUT.json]

Kernels are compiled by several processes first, then timed by one: microseconds in a graph in which each kernel waits for the
one before it, over the weights of as many layers as the second-level cache does not hold. Layers are measured without
attention, with every choice of library and own products.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import bf16, micros

from vllm_model.cuda.residual_stream import ResidualStream
from vllm_model.decoder import Linear
from vllm_model.kernels._launch import with_room
from vllm_model.kernels.cluster_linear import ClusterConfig, shared_bytes
from vllm_model.kernels.linear import LinearConfig, LinearWorkspace, Scaled, linear, linear_residual
from vllm_model.kernels.linear_table import Config
from vllm_model.kernels.qk_norm_rope import qk_norm_rope

PROCESSES = 16
ROWS = (16, 64, 128, 192, 256)
MODELS = {"0.6B": (1024, 3072, 16), "8B": (4096, 12288, 32)}
"""Hidden size, width of the MLP, query heads; 8 KV heads of 128."""
SHARED = 227 * 1024
"""Bytes of shared memory of a multiprocessor."""

Choice = dict[tuple[int, int], Config]
"""Our products by outputs and inputs."""


def products(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    width, inner, heads = MODELS[model]
    return {"qkv": ((heads + 16) * 128, width), "o": (width, heads * 128), "gate_up": (inner, width), "down": (width, inner)}


def by_clusters(name: str, rows: int) -> Iterator[ClusterConfig]:
    """What may be worth a try, by clusters."""
    widths = (48, 64, 96, 192) if name == "gate_up" else (32, 48, 64, 96)
    depths = ((1, 4), (2, 2), (2, 3), (2, 4), (4, 2), (4, 3))
    for bm, bn, (chunks, stages), cluster in itertools.product((64, 128), widths, depths, (1, 2, 4, 8)):
        config = ClusterConfig(bm, bn, chunks, stages, cluster)
        whole = name not in ("o", "down") or bn in (32, 64)
        if whole and rows <= 128 and (bm == 64 or rows > 64) and shared_bytes(config) <= SHARED:
            yield config


def configs(name: str, rows: int, n: int, k: int) -> Iterator[Config]:
    """What may be worth a try."""
    yield from by_clusters(name, rows)
    halves = 2 if name == "gate_up" else 1
    for bm, bn, bk in itertools.product((64, 128, 256), (32, 64, 128, 256), (64, 128)):
        if bm >= 2 * rows and bm > 64:
            continue
        warps = 8 if bm >= 128 and bm * bn * halves >= 128 * 64 else 4
        if bm * bn * halves // (32 * warps) > 128:
            continue
        stage = (bm + bn * halves) * bk * 2
        depths = {min(SHARED // 2 // stage, 8), min(SHARED // stage, 8)}
        tiles = -(-rows // bm) * -(-n // bn)
        for stages, split in itertools.product(sorted(depths), (1, 2, 4, 8)):
            if stages < 2 or k // split < 2 * bk or tiles * split > (640 if split > 1 else 2000) or tiles * split < 40:
                continue
            if split > 1 and tiles * split > 300:
                continue
            yield LinearConfig(bm, bn, bk, warps, stages, split, 4 if k // split >= 1024 else 2 if k // split >= 512 else 1)


class Case:
    """One product with weights of several layers."""

    def __init__(self, name: str, rows: int, n: int, k: int, copies: int) -> None:
        self.name, self.rows = name, rows
        self.weights = [bf16(n * (2 if name == "gate_up" else 1), k) * k**-0.5 for _ in range(copies)]
        self.x = with_room(self.weights[0], rows, k).normal_()
        self.out, self.norm, self.residual = bf16(rows, n), bf16(n), bf16(rows, n)
        self.scaled = Scaled(self.x, torch.rand(rows, 32, device="cuda") * k / 16)
        self.workspace = LinearWorkspace(1 << 24, "cuda")

    def call(self, weight: torch.Tensor, config: Config, pdl: bool = True) -> None:
        if self.name in ("o", "down"):
            linear_residual(self.x, weight, self.residual, self.norm, config, workspace=self.workspace, pdl=pdl)
        else:
            silu = self.name == "gate_up"
            linear(self.scaled, weight, config, silu=silu, out=self.out, workspace=self.workspace, pdl=pdl)

    def time(self, config: Config, pdl: bool = True) -> float:
        return micros([lambda w=w: self.call(w, config, pdl) for w in self.weights], 9)  # type: ignore[misc]

    def library(self) -> float:
        return micros([lambda w=w: F.linear(self.x, w) for w in self.weights], 9)  # type: ignore[misc]


def compile_share(mine: int) -> None:
    """Run every kernel once that is this process's to compile."""
    seen: dict[tuple[str, Config], int] = {}
    for model in MODELS:
        for name, (n, k) in products(model).items():
            for rows in ROWS:
                for config in configs(name, rows, n, k):
                    kind = "o" if name == "down" else name
                    seen.setdefault((kind, config), len(seen))
    for (name, config), index in seen.items():
        if index % PROCESSES == mine:
            case = Case(name, 16, 256, 2048, 1)
            for pdl in (True,):
                with contextlib.suppress(Exception):  # what does not compile is a line of the table later
                    case.call(case.weights[0], config, pdl)


def fastest(times: list[tuple[float, Config]], kind: type[Config]) -> Config | None:
    """Of a kind; None: there is none."""
    return next((config for _, config in sorted(times, key=lambda each: each[0]) if isinstance(config, kind)), None)


class Layers:
    """Some layers without attention."""

    def __init__(self, model: str, rows: int) -> None:
        width, _, self.heads = MODELS[model]
        shapes = products(model)
        count = 16 if model == "0.6B" else 5
        self.layers = [
            {name: Linear(bf16(n * (2 if name == "gate_up" else 1), k) * k**-0.5) for name, (n, k) in shapes.items()}
            for _ in range(count)
        ]
        self.norm, self.head_norm = bf16(width), bf16(128)
        self.x = bf16(rows, width)
        self.cos_sin = torch.rand(64, 128, device="cuda")
        self.positions = torch.zeros(rows, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.tables = torch.arange(rows, dtype=torch.int32, device="cuda")[:, None].repeat(1, 4)
        self.cache = bf16(rows, 8, 2, 16, 128)
        self.workspace = LinearWorkspace(1 << 24, "cuda")

    def run(self, choice: Choice, pdl: bool) -> None:
        def choose(rows: int, n: int, k: int, silu: bool) -> Config | None:
            return choice.get((n, k))

        stream = ResidualStream(self.x, eps=1e-6, choose=choose, workspace=self.workspace, thin_rows=0, pdl=pdl)
        for layer in self.layers:
            qkv = stream.read(layer["qkv"], self.norm)
            q = qk_norm_rope(
                qkv,
                self.cos_sin,
                self.positions,
                self.slots,
                self.tables,
                self.cache,
                self.heads,
                q_weight=self.head_norm,
                k_weight=self.head_norm,
                pdl=pdl,
            )
            stream.add(q.view(len(q), -1), layer["o"], self.norm)
            inner = stream.read(layer["gate_up"], self.norm, silu=True)
            stream.add(inner, layer["down"], self.norm)

    def time(self, choice: Choice, pdl: bool = True) -> float:
        return micros([lambda: self.run(choice, pdl)], 9) / len(self.layers)


def main() -> None:
    """Compile as one of several processes, or have that done and measure."""
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]))
        return
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", str(index)]) for index in range(PROCESSES)]
    for worker in workers:
        worker.wait()
    found: dict[str, list[tuple[float, Config]]] = {}
    libraries: dict[str, float] = {}
    for model in MODELS:
        for name, (n, k) in products(model).items():
            moved = n * k * 2 * (2 if name == "gate_up" else 1)
            for rows in ROWS:
                case = Case(name, rows, n, k, max(2, min(24, int(1.6e8 / moved) + 1)))
                times = found.setdefault(f"{model} {name} {rows}", [])
                for config in configs(name, rows, n, k):
                    try:
                        times.append((case.time(config), config))
                    except Exception as error:
                        print(model, name, rows, config, str(error)[:80])
                times.sort(key=lambda each: each[0])
                library = libraries[f"{model} {name} {rows}"] = case.library()
                triton_best = fastest(times, LinearConfig)
                assert isinstance(triton_best, LinearConfig)
                print(
                    f"{model} {name} {rows} rows: library {library:.2f}, bytes {moved / 4.24e6:.2f}, best",
                    "  ".join(f"{us:.2f} {tuple(vars(c).values())}" for us, c in times[:5]),
                    "| Triton's with prefetch",
                    "  ".join(f"{f}: {case.time(replace(triton_best, prefetch=f)):.2f}" for f in (0, 1, 4, 8)),
                    f"| no pdl {case.time(times[0][1], False):.2f}",
                    flush=True,
                )
    if sys.argv[1:]:
        with Path(sys.argv[1]).open("w") as file:
            json.dump(
                {
                    "own": {k: [(us, list(vars(c).values())) for us, c in v[:40]] for k, v in found.items()},
                    "library": libraries,
                },
                file,
            )
    for model, rows in itertools.product(MODELS, ROWS):
        layers = Layers(model, rows)
        names = products(model)
        ways: list[list[Config | None]] = [
            [
                None,
                fastest(found[f"{model} {name} {rows}"], LinearConfig),
                fastest(found[f"{model} {name} {rows}"], ClusterConfig),
            ]
            for name in names
        ]
        times = []
        for ways_taken in itertools.product(*ways):
            choice = {shape: config for shape, config in zip(names.values(), ways_taken, strict=True) if config is not None}
            letters = "".join("L" if c is None else "T" if isinstance(c, LinearConfig) else "C" for c in ways_taken)
            times.append((layers.time(choice), letters))
        print(
            f"layer {model} {rows} rows: library {times[0][0]:.1f}; qkv o gate_up down of library, Triton, clusters:",
            "  ".join(f"{us:.1f} {letters}" for us, letters in sorted(times)[:8]),
            flush=True,
        )


if __name__ == "__main__":
    main()
