# mypy: disable-error-code="no-untyped-call"
"""Which launch shapes are fastest on this card for a model's sizes.

All that may be worth a try is compiled by several processes first, then timed in graphs.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from vllm_model.cuda.device import Device
from vllm_model.cuda.steps import MAX_DRAFT_TOKENS
from vllm_model.kernels.decode_plan import FEW_ROWS, DecodeConfig, DecodePlan, default_decode_config
from vllm_model.kernels.gemv import GemvConfig, default_gemv_config, thin_linear
from vllm_model.kernels.paged_decode import FULL_STAGE_ROWS, paged_decode
from vllm_model.kernels.paged_prefill import PrefillConfig, default_prefill_config, paged_prefill
from vllm_model.kernels.tuned import Ints
from vllm_model.model_config import ModelConfig

logger = logging.getLogger(__name__)

DECODE: list[Ints] = [
    *((64, 2, 4, 3), (64, 2, 4, 4), (64, 2, 4, 5), (64, 3, 4, 4), (64, 3, 4, 5), (64, 4, 4, 4), (64, 4, 2, 4), (64, 3, 2, 5)),
    *((32, 2, 4, 4), (32, 3, 4, 4), (32, 4, 4, 4), (32, 4, 4, 5), (32, 4, 2, 5), (32, 6, 2, 4), (32, 6, 4, 5), (32, 5, 1, 4)),
    *((16, 4, 4, 4), (16, 8, 1, 5), (128, 1, 8, 4), (128, 2, 4, 4), (128, 2, 4, 3), (64, 3, 2, 4)),
]
"""As :class:`DecodeConfig`."""
PREFILL = [
    *((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (128, 32, 4, 4)),
    *((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)),
]
"""As :class:`PrefillConfig`."""
THIN = [*product((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8))]
"""As :class:`GemvConfig`, but for those that :func:`_may_suit` leaves out."""
FEW_LOADS, MANY_LOADS = [(1, 256), (8, 2000)], [(64, 640), (256, 600)]
"""Rows and keys of each."""
SEVERAL = 5
"""Query tokens of a row that are timed where rows have several."""
CHUNKS = [(1, 0, 4096), (1, 4096, 512), (16, 0, 256)]
"""Rows, and of each the tokens cached and to run."""
MOST_COPIES = 128

Launch = Callable[[], object]
Load = Callable[[Ints], list[Launch]]
"""From a launch shape to launches that do the same with memory that the second-level cache no longer holds."""


@dataclass(frozen=True)
class Case:
    """A launch shape to be chosen; ``trials`` are not timed, but have to run with it too."""

    kind: str
    key: Ints
    default: Ints
    shapes: list[Ints]
    loads: list[Load]
    trials: list[Load]


@dataclass(frozen=True)
class Result:
    """The fastest launch shape of a case: microseconds of each load with it and with the default, None if that does not run."""

    kind: str
    key: Ints
    shape: Ints
    micros: list[float]
    default: list[float] | None

    @property
    def ratio(self) -> float:
        """Time as a part of the default's, loads alike."""
        return 0.0 if self.default is None else mean(a / b for a, b in zip(self.micros, self.default, strict=True))


def tune(config: ModelConfig, device: Device) -> Iterator[Result]:
    """Measure what a model of this shape launches."""
    cases = Cases(config, device)

    def launch_all() -> None:
        for case in cases:
            for load, shape in product(case.trials + case.loads, case.shapes):
                load(shape)[0]()

    device.compile(launch_all)
    for case in cases:
        times = {shape: found for shape in case.shapes if (found := _times(case, shape))}
        if not times:
            raise RuntimeError(f"no launch shape of {case.kind} {case.key} runs")
        least = [min(column) for column in zip(*times.values(), strict=True)]
        best = min(times, key=lambda shape: sum(a / b for a, b in zip(times[shape], least, strict=True)))
        again = {shape: _times(case, shape) for shape in (best, case.default)}  # who is first of many was lucky too
        yield Result(case.kind, case.key, best, again[best] or times[best], again[case.default] or times.get(case.default))


def _times(case: Case, shape: Ints) -> list[float] | None:
    """Of each load; None if the shape does not compile or does not fit."""
    try:
        for trial in case.trials:
            trial(shape)[0]()
        return [measure(load(shape)) for load in case.loads]
    except Exception as error:  # Triton's, its compilers' and the driver's have nothing else in common
        logger.debug("%s %s with %s: %s", case.kind, case.key, shape, error)
        return None


def measure(launches: list[Launch]) -> float:
    """Microseconds of one of them."""

    def run() -> None:
        for launch in launches:
            launch()

    torch.cuda.synchronize()  # it measures on a stream of its own
    return float(do_bench_cudagraph(run, rep=4, return_mode="median")) * 1000 / len(launches)


class Cases:
    """What a model of a shape launches on a device, made anew by each iteration: the memory of all is not there at once."""

    def __init__(self, config: ModelConfig, device: Device) -> None:
        self._config, self._device, self._pdl = config, device.device, device.pdl
        self._dtype = torch.float16 if config.dtype == "float16" else torch.bfloat16
        self._group = config.num_heads // config.num_kv_heads
        self._widest = min(1 + MAX_DRAFT_TOKENS, max(1, 128 // self._group))
        self._cached, self._memory, self._kv_dtypes = 0, 1 << 40, [self._dtype]
        if self._device.type == "cuda":
            card = torch.cuda.get_device_properties(self._device)
            self._cached, self._memory = card.L2_cache_size, card.total_memory
            if (card.major, card.minor) >= (8, 9):
                self._kv_dtypes.append(torch.float8_e4m3fn)

    def __iter__(self) -> Iterator[Case]:
        for most, loads in ((FEW_ROWS, FEW_LOADS), (FEW_ROWS + 1, MANY_LOADS)):
            several = (False, True) if self._widest > 1 else (False,)
            yield from (self._decode(most, loads, *kind) for kind in product(several, self._kv_dtypes))
        yield self._prefill()
        yield from self._thin()

    def _decode(self, most: int, loads: list[tuple[int, int]], several: bool, kv_dtype: torch.dtype) -> Case:
        head_dim, group, fp8 = self._config.head_dim, self._group, kv_dtype == torch.float8_e4m3fn
        default = astuple(default_decode_config(head_dim, most, self._device, several=several, fp8=fp8))
        # Whatever takes the most shared memory: the widest, and the widest with all stages.
        widths = sorted({max(2, min(FULL_STAGE_ROWS // group, self._widest)), self._widest}) if several else [1]
        trials = [self._decode_load(1, 64, width, kv_dtype, behind_prefix=not several) for width in widths]
        timed = [self._decode_load(*load, min(widths[-1], SEVERAL), kv_dtype) for load in loads]
        key = (head_dim, group, int(most <= FEW_ROWS), int(several), int(fp8))
        return Case("decode", key, default, _unique(default, DECODE), timed, trials)

    def _decode_load(self, rows: int, length: int, queries: int, kv_dtype: torch.dtype, *, behind_prefix: bool = False) -> Load:
        config = self._config
        caches, tables, slots, scales = self._paged(rows, length, kv_dtype)
        rows = len(slots)
        q = self._random(rows * queries, config.num_heads, config.head_dim)
        lens, out = torch.full_like(slots, length), torch.empty_like(q)
        options: dict[str, Any] = {"queries": queries, "out": out, "pdl": self._pdl, **scales}
        if queries > 1:
            options["first_positions"] = lens - queries
        if behind_prefix:
            options["lse"] = torch.empty(rows, config.num_heads, device=self._device)

        def load(shape: Ints) -> list[Launch]:
            plan = DecodePlan(
                *(rows, config.num_heads, config.num_kv_heads, config.head_dim, self._device),
                max_blocks=tables.shape[1],
                max_queries=queries,
                config=DecodeConfig(*shape),
            )
            plan.update(lens, slots, tables)
            return [partial(paged_decode, q, cache, plan, **options) for cache in caches]

        return load

    def _prefill(self) -> Case:
        head_dim = self._config.head_dim
        default = astuple(default_prefill_config(self._group))
        shapes = _unique(default, [shape for shape in PREFILL if shape[0] >= self._group])
        trials = [self._prefill_load(1, 0, 64, dtype) for dtype in self._kv_dtypes]
        loads = [self._prefill_load(*chunk, self._dtype) for chunk in CHUNKS]
        return Case("prefill", (head_dim, self._group), default, shapes, loads, trials)

    def _prefill_load(self, rows: int, cached: int, new: int, kv_dtype: torch.dtype) -> Load:
        caches, tables, slots, scales = self._paged(rows, cached + new, kv_dtype)
        starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=self._device) * new
        q = self._random(len(slots) * new, self._config.num_heads, self._config.head_dim)
        rest = (tables, slots, starts, torch.full_like(slots, cached))
        options: dict[str, Any] = {"out": torch.empty_like(q), **scales}

        def load(shape: Ints) -> list[Launch]:
            return [partial(paged_prefill, q, cache, *rest, config=PrefillConfig(*shape), **options) for cache in caches]

        return load

    def _thin(self) -> Iterator[Case]:
        config = self._config
        hidden, inner, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        layers = {
            (q + 2 * config.num_kv_heads * config.head_dim, hidden, 0): (config.qkv_bias, "norm"),
            (hidden, q, 0): (config.o_bias, "residual"),
            (inner, hidden, 1): (config.mlp_bias, "norm"),
            (hidden, inner, 0): (config.mlp_bias, "residual"),
            (config.vocab_size, hidden, 0): (False, ""),
        }
        for ((n, k, gated), (has_bias, more)), rows in product(layers.items(), (1, 2)):
            if not has_bias:  # or it is the library's
                default = default_gemv_config(rows, n, k, silu=bool(gated))
                shape = astuple(default)
                shapes = _unique(shape, [each for each in THIN if _may_suit(*each, k, gated)])
                yield Case("thin", (n, k, gated, rows), shape, shapes, [self._thin_load(n, k, gated, rows, more)], [])

    def _thin_load(self, n: int, k: int, gated: int, rows: int, more: str) -> Load:
        weights, x, out = self._copies(n * (1 + gated), k), self._random(rows, k), self._random(rows, n)
        options: dict[str, Any] = {"silu": bool(gated), "out": out, "pdl": self._pdl}
        if more:
            options |= {"norm_weight": self._random(k)} if more == "norm" else {"residual": torch.zeros_like(out)}

        def load(shape: Ints) -> list[Launch]:
            return [partial(thin_linear, x, weight, config=GemvConfig(*shape), **options) for weight in weights]

        return load

    def _paged(
        self, rows: int, length: int, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Caches with block tables in random order, slots, and scales; fewer rows where they take much of the memory."""
        heads, pages = self._config.num_kv_heads, -(-length // 16)
        shape = heads, 2, 16, self._config.head_dim
        rows = max(1, min(rows, self._memory // 8 // (pages * math.prod(shape) * dtype.itemsize)))
        caches = [cache.to(dtype) for cache in self._copies(rows * pages, *shape)]
        tables = torch.randperm(rows * pages, dtype=torch.int32, device=self._device).view(rows, pages)
        ones = torch.ones(heads, device=self._device)
        scales = {} if dtype == self._dtype else {"k_scale": ones, "v_scale": ones}
        return caches, tables, torch.arange(rows, dtype=torch.int32, device=self._device), scales

    def _copies(self, *shape: int) -> list[torch.Tensor]:
        """So many that the second-level cache holds none when its turn comes again."""
        size = math.prod(shape) * self._dtype.itemsize
        return [*self._random(min(1 + 4 * self._cached // size, MOST_COPIES), *shape)]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device)


def _unique(default: Ints, shapes: list[Ints]) -> list[Ints]:
    return [*dict.fromkeys([default, *shapes])]


def _may_suit(block_n: int, block_k: int, num_warps: int, k: int, gated: int) -> bool:
    """Whether a thread has enough weights under way, and not more than it has registers for."""
    per_thread = block_n * block_k * (1 + gated) // (32 * num_warps)
    sizes = [size for size in (256, 512, 1024, 2048, 4096) if size <= k][-3:]
    return block_k in sizes and 32 <= per_thread <= 128
