"""Which algorithms of cuBLASLt are faster than torch's choice, for the products of a model's layer.

    python benchmarks/tune_library.py MODEL ROWS... [--seconds 2.2] [--proposed]

MODEL is 0.6B or 8B. For each product and number of rows, what the library proposes is timed for a moment each, then what
differs in one setting from the best of that. The best are timed against torch's in turns, long enough for the card to lower its
clock under large products. The last lines printed are entries of ``library_table.ALGORITHMS``.
"""

import argparse
import ctypes
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench_kernels import bf16, micros
from tune_linear import MODELS, products

from vllm_model.kernels.library_linear import (
    ATTRIBUTES,
    SUMS,
    TYPES,
    WORKSPACE,
    Algorithm,
    Product,
    Result,
    check,
    has_algorithms,
    library,
    library_linear,
)

PROPOSALS, NEIGHBOURS, FINALISTS = 24, 32, 6
WORK = 0.06
"""Least seconds of a measurement of a finalist."""
LEAST_GAIN = 1.02
ERROR = 3e-3
"""Most relative difference to torch's result in float32: bfloat16 rounds by half of it."""
SUMMED_IN_FLOAT32 = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
TILES, CUSTOM_MOST, STAGES = 6, 7, 13  # cublasLtMatmulAlgoCapAttributes_t
CLUSTERS = range(17)

Table = dict[tuple[int, int, int], Algorithm]


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """Outputs, gate and up counted each, and inputs."""
    return {name: (n * 2 if name == "gate_up" else n, k) for name, (n, k) in products(model).items()}


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that makes all of ``calls``."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def in_turns(graphs: Sequence[torch.cuda.CUDAGraph], seconds: float, rounds: int = 3) -> list[float]:
    """Microseconds of one replay of each, at work for ``seconds`` each time: the medians of some rounds."""

    def timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / replays

    counts = [math.ceil(seconds * 1e6 / timed(graph, 2)) for graph in graphs]
    times = [[timed(graph, count) for graph, count in zip(graphs, counts, strict=True)] for _ in range(rounds)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def read(lt: Any, result: Result) -> Algorithm:
    """The algorithm in a structure of the library's."""
    values = {}
    for name, (number, kind) in ATTRIBUTES.items():
        value, size = kind(), ctypes.c_size_t(ctypes.sizeof(kind))
        check(lt.cublasLtMatmulAlgoConfigGetAttribute(ctypes.byref(result.algo), number, ctypes.byref(value), size, None))
        values[name] = value.value
    return Algorithm(**values)


def proposals(product: Product) -> list[Algorithm]:
    """What the library proposes, of those that add up in float32 and take rows of whole 16 bytes."""
    lt, preference = product.lt, ctypes.c_void_p()
    check(lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    wanted = [(1, ctypes.c_uint64(WORKSPACE)), (3, ctypes.c_uint32(SUMMED_IN_FLOAT32))]
    for number, value in [*wanted, *((matrix, ctypes.c_uint32(16)) for matrix in (5, 6, 7, 8))]:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        check(lt.cublasLtMatmulPreferenceSetAttribute(preference, number, ctypes.byref(value), size))
    results, count = (Result * PROPOSALS)(), ctypes.c_int()
    check(lt.cublasLtMatmulAlgoGetHeuristic(*product.given, preference, PROPOSALS, results, ctypes.byref(count)))
    lt.cublasLtMatmulPreferenceDestroy(preference)
    return [read(lt, result) for result in results[: count.value] if result.state == 0]


def capability(lt: Any, result: Result, number: int) -> list[int]:
    """One number, or as many as there are."""
    size, algo = ctypes.c_size_t(), ctypes.byref(result.algo)
    if lt.cublasLtMatmulAlgoCapGetAttribute(algo, number, None, ctypes.c_size_t(), ctypes.byref(size)):
        return []
    values = (ctypes.c_uint32 * (size.value // 4))()
    check(lt.cublasLtMatmulAlgoCapGetAttribute(algo, number, values, size, ctypes.byref(size)))
    return list(values)


def all_ids(product: Product, dtype: torch.dtype) -> list[int]:
    """Of algorithms for these types."""
    ids, count = (ctypes.c_int * 256)(), ctypes.c_int()
    types = [TYPES[dtype]] * 4
    check(product.lt.cublasLtMatmulAlgoGetIds(product.given[0], *SUMS, *types, len(ids), ids, ctypes.byref(count)))
    return list(ids[: count.value])


def neighbours(product: Product, algorithm: Algorithm, dtype: torch.dtype) -> Iterator[Algorithm]:
    """What differs in one setting, in any order; not all of them are possible."""
    result = product.configured(algorithm)
    (most,) = capability(product.lt, result, CUSTOM_MOST) or [0]
    settings: dict[str, Sequence[int]] = {
        "tile": capability(product.lt, result, TILES),
        "stages": capability(product.lt, result, STAGES),
        "cluster_shape": CLUSTERS,
        "custom": range(min(most, 255) + 1),
        "swizzle": (0, 1),
        "split_k": (1, 2, 3, 4, 6, 8),
        "id": all_ids(product, dtype),
    }
    shuffled = [random.sample(values, len(values)) for values in settings.values()]
    for values in itertools.zip_longest(*shuffled):  # of each setting in turn: some have hundreds
        for name, value in zip(settings, values, strict=True):
            if value is not None and value != getattr(algorithm, name):
                other = algorithm._replace(**{name: value})
                yield other._replace(reduction=SUMMED_IN_FLOAT32 if other.split_k > 1 else 0)


class Case:
    """One product with weights of more layers than the second-level cache holds."""

    def __init__(self, rows: int, n: int, k: int) -> None:
        copies = max(2, min(24, int(1.6e8 / (n * k * 2)) + 1))
        self.weights = [bf16(n, k) * k**-0.5 for _ in range(copies)]
        self.x, self.out = bf16(rows, k), bf16(rows, n)
        self.product = Product(self.x.device, self.x.dtype, rows, n, k, k, n)
        self.expected = self.x.float() @ self.weights[0].float().T
        self.norm = self.expected.norm()

    def torchs(self) -> list[Callable[[], object]]:
        return [lambda w=w: torch.mm(self.x, w.t(), out=self.out) for w in self.weights]  # type: ignore[misc]

    def calls(self, algorithm: Algorithm) -> list[Callable[[], object]]:
        result = self.product.configured(algorithm)

        def call(weight: torch.Tensor) -> None:
            if not self.product.launch(result, self.x, weight, self.out):
                raise RuntimeError("cuBLASLt refused")

        return [lambda w=w: call(w) for w in self.weights]  # type: ignore[misc]

    def is_right(self, algorithm: Algorithm) -> bool:
        self.out.fill_(float("nan"))
        self.calls(algorithm)[0]()
        return bool((self.out.float() - self.expected).norm() <= ERROR * self.norm)

    def moment(self, algorithm: Algorithm) -> float | None:
        """Microseconds; None: it cannot be, or is wrong."""
        try:
            return micros(self.calls(algorithm), 5) if self.is_right(algorithm) else None
        except RuntimeError:
            return None

    def search(self, seconds: float, proposed: bool) -> list[Algorithm]:
        """The best of what could be tried in that time."""
        end = time.perf_counter() + seconds
        times: dict[Algorithm, float | None] = {}

        def found() -> list[Algorithm]:
            return sorted((each for each in times if times[each] is not None), key=lambda each: times[each] or 0.0)

        for algorithm in proposals(self.product):
            times[algorithm] = self.moment(algorithm)
        seen: set[Algorithm] = set()
        while not proposed and time.perf_counter() < end:
            base = next((each for each in found()[:FINALISTS] if each not in seen), None)
            if base is None:
                break
            seen.add(base)
            tried = 0
            for algorithm in neighbours(self.product, base, self.x.dtype):
                if tried == NEIGHBOURS or time.perf_counter() > end:
                    break
                if algorithm not in times:
                    times[algorithm] = self.moment(algorithm)
                    tried += times[algorithm] is not None
        print(f"    {len(found())} of {len(times)} algorithms possible and right", flush=True)
        return found()[:FINALISTS]

    def final(self, algorithms: list[Algorithm]) -> tuple[float, list[tuple[float, Algorithm]]]:
        """Microseconds of torch's, and of these with the fastest first."""
        ways = [self.torchs(), *(self.calls(each) for each in algorithms)]
        torchs, *ours = (us / len(self.weights) for us in in_turns([graph_of(way) for way in ways], WORK))
        return torchs, sorted((us, each) for us, each in zip(ours, algorithms, strict=True) if self.is_right(each))


def chain(model: str, rows: int, table: Table) -> tuple[float, float]:
    """Microseconds of a layer's four products in turn, by torch and by what was chosen."""
    sizes = shapes(model).values()
    count = 24 if model == "0.6B" else 4
    weights = [bf16(n, k) * k**-0.5 for _ in range(count) for n, k in sizes]
    x = {k: bf16(rows, k) for _, k in sizes}
    out = {n: bf16(rows, n) for n, _ in sizes}

    def product(w: torch.Tensor, chosen: Table) -> Callable[[], object]:
        n, k = w.shape
        return lambda: library_linear(x[k], w, chosen.get((rows, n, k)), out=out[n])

    choices: tuple[Table, Table] = ({}, table)
    torchs, ours = in_turns([graph_of([product(w, chosen) for w in weights]) for chosen in choices], 0.5)
    return torchs / count, ours / count


def main() -> None:
    """Measure, and print entries of the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=2.2, help="about so long for each product and number of rows")
    parser.add_argument("--proposed", action="store_true", help="only what the library proposes")
    given = parser.parse_args()
    random.seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    lt, _ = library(device)
    version = f"{torch.cuda.get_device_name()}, cuBLASLt {lt.cublasLtGetVersion()}, torch {torch.__version__}"
    print(version, "" if has_algorithms(device) else "(not the card of the table: products there stay torch's)", flush=True)
    table: Table = {}
    lines = []
    for rows, (name, (n, k)) in itertools.product(given.rows, shapes(given.model).items()):
        case = Case(rows, n, k)
        torchs, found = case.final(case.search(given.seconds - 3 * (FINALISTS + 1) * WORK, given.proposed))
        print(f"{name} {rows} rows: torch {torchs:.2f}", *(f"{us:.2f} {tuple(each)}" for us, each in found[:3]), flush=True)
        if found and torchs > LEAST_GAIN * found[0][0]:
            us, table[rows, n, k] = found[0]
            lines.append(f"    ({rows}, {n}, {k}): Algorithm{tuple(table[rows, n, k])},  # {name}: {torchs:.1f} to {us:.1f} us")
    for rows in given.rows:
        if rows >= 512 and any(entry[0] == rows for entry in table):
            torchs, ours = chain(given.model, rows, table)
            print(
                f"the four products, {rows} rows: torch {torchs:.1f}, chosen {ours:.1f} us ({torchs / ours - 1:+.1%})",
                flush=True,
            )
    print(f"# {version}", *lines, sep="\n")


if __name__ == "__main__":
    main()
