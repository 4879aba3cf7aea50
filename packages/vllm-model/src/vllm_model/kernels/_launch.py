# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, attr-defined, misc"
"""What every launch shares."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

_COMPILING: ContextVar[bool] = ContextVar("_COMPILING", default=False)


@contextmanager
def compiled_together(workers: int = 16) -> Iterator[None]:
    """Within it kernels are not launched but compiled, several at once; it ends when all of them are."""
    token = _COMPILING.set(True)
    try:
        with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _COMPILING.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](...)``, or within :func:`compiled_together` only what that needs."""
    if _COMPILING.get():
        kernel.warmup(*args, grid=grid, **options)
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


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value`` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


@lru_cache(maxsize=16)
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 for the interpreter, so that split paths run there too."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
