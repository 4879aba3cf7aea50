"""Graphs of a device, where another engine's are given up."""

import gc
from typing import Any

import pytest
import torch

from vllm_model.cuda.device import Device


@pytest.mark.gpu
def test_garbage_of_another_engine_does_not_end_a_recording() -> None:
    """As when a program drops one engine, cycles and all, and starts the next."""
    others, device = Device(torch.device("cuda")), Device(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    with others.running():
        old = [others.capture(x, lambda: x * 2) for _ in range(2)]

    def run() -> torch.Tensor:
        cycle: list[Any] = [old.pop()]
        cycle.append(cycle)
        del cycle
        assert len([[] for _ in range(100_000)]) == 100_000  # the collector would come by
        return x + 1

    torch.cuda.synchronize()
    assert gc.isenabled()
    with device.running():
        graph = device.capture(x, run)
        x += 1
        assert graph.replay().tolist() == [3.0] * 4
    assert gc.isenabled()
