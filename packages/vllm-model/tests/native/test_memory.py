"""What the compiled kernels keep between steps."""

import sys
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from vllm_model.native import PackedWeight

PAGE = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_memory_of_a_large_step_is_given_back(kernels: CDLL) -> None:
    weight, x = PackedWeight(kernels, torch.eye(64)[:2]), torch.randn(400_000, 64)
    first = weight(x, dot=False)
    held = resident_bytes()
    kernels.release()
    assert held - resident_bytes() > 0.9 * x.nbytes
    assert torch.equal(weight(x, dot=False), first)  # and is taken anew
    kernels.release()
