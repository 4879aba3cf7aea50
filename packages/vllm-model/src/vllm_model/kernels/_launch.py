# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, attr-defined, misc"
"""What every launch shares."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from vllm_model.kernels._compilers import Crew, Job, prepare


@dataclass(slots=True)
class TakenDown:
    """What would have been launched."""

    kernels: list[Any] = field(default_factory=list)
    """Triton's that are compiled."""
    others: dict[str, Callable[[], object]] = field(default_factory=dict)
    """What else takes its time, as to compile another kernel, by what it does."""


_TAKING_DOWN: ContextVar[TakenDown | None] = ContextVar("_TAKING_DOWN", default=None)


def compile_together(runs: Iterable[Callable[[], object]], later: Iterable[Callable[[], object]] = ()) -> None:
    """Compile in Triton's cache what these would launch, several kernels at once; no kernel of ours is launched.

    Args:
        runs: It returns when these need no compiler, and what they had taken down is done.
        later: Triton's kernels of these are compiled behind it.
    """
    prepared = prepare()
    prepared.keys.result()
    with Crew(prepared.target.result()) as crew:
        now, then = _taken_down(runs, crew.add), _taken_down(later, partial(crew.add, later=True))
        crew.add_others((now.others | then.others).values())


def _taken_down(runs: Iterable[Callable[[], object]], add: Callable[[Job, int], object]) -> TakenDown:
    """Take down what these launch, and add what of it Triton has not compiled in this process."""
    taken = TakenDown()
    token, other = _TAKING_DOWN.set(taken), knobs.runtime.jit_cache_hook

    def hook(**kernel: Any) -> Any:
        """Triton's, before it compiles: True keeps it from that."""
        if _TAKING_DOWN.get() is not taken:  # another thread
            return other and other(**kernel)
        function = kernel["fn"]
        add((function.module, function.name, kernel["compile"]["specialization_data"]), len(function.jit_function.src))
        return True

    knobs.runtime.jit_cache_hook = hook
    try:
        for run in runs:
            run()
    finally:
        knobs.runtime.jit_cache_hook = other
        _TAKING_DOWN.reset(token)
    return taken


def take_down(name: str, job: Callable[[], object]) -> bool:
    """Within :func:`compile_together`: have this done meanwhile, as to compile another kernel than Triton's, once a name."""
    taken = _TAKING_DOWN.get()
    if taken is not None:
        taken.others[name] = job
    return taken is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](...)``, or within :func:`compile_together` only what that needs."""
    taken = _TAKING_DOWN.get()
    if taken is not None:
        taken.kernels.append(kernel.warmup(*args, grid=grid, **options))
    else:
        kernel[grid](*args, **options)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):  # noqa: N803  constexpr arguments are upper case in Triton
    """Wait for the kernel before this one, then let the next one start: then what ran two kernels ago is always complete."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(pdl: bool) -> dict[str, bool]:
    """Launch keywords; Triton's interpreter knows no ``launch_pdl``, so it is named only where it is wanted."""
    return {"launch_pdl": True} if pdl else {}


ROOM = 64
"""Rows of whole tiles of the copy engine."""


def with_room(like: torch.Tensor, rows: int, *shape: int) -> torch.Tensor:
    """A new tensor ``[rows, *shape]`` in memory for whole tiles of rows: copies that pass an edge are slow on Hopper."""
    return like.new_empty(-(-rows // ROOM) * ROOM, *shape)[:rows]


def rows_with_room(x: torch.Tensor, tile: int) -> int:
    """Rows of the matrix ``x`` with those behind them in its memory, up to a whole tile; what stands there is anything."""
    whole = -(-len(x) // tile) * tile if x.is_cuda else len(x)  # the interpreter warns of what stands there
    end = x.storage_offset() + (whole - 1) * x.stride(0) + x.shape[1]
    return whole if end * x.element_size() <= x.untyped_storage().nbytes() else len(x)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value`` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


@lru_cache(maxsize=16)
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory of Hopper's, 228 KB; of many it has 100. True for the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 200 << 10


@lru_cache(maxsize=16)
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 for the interpreter, so that split paths run there too."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
