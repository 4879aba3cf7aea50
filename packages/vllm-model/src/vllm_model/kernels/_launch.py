# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, attr-defined, misc"
"""What every launch shares."""

from functools import lru_cache

import torch
import triton
import triton.language as tl


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
