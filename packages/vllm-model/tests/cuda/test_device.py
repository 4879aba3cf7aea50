"""Graphs of a device, where another engine's are given up."""

import gc
from typing import Any

import pytest
import torch

from vllm_model.cuda.device import Device
from vllm_model.kernels.silu_mul import silu_mul


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


@pytest.mark.gpu
def test_what_cannot_be_recorded_yet_is_run_first() -> None:
    """As a kernel that waits for the device while it is loaded, on some driver."""
    device, loaded = Device(torch.device("cuda")), list[bool]()
    x = torch.ones(4, device="cuda")

    def run() -> torch.Tensor:
        if not loaded and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        loaded.append(True)
        return x + 1

    with device.running():
        first = device.capture(x, lambda: x * 2)
        second = device.capture(x, run, has_run=True)
        third = device.capture(x, lambda: x * 3, has_run=True)
        x += 1
        assert [graph.replay().tolist()[0] for graph in (first, second, third)] == [4.0, 3.0, 6.0]
    assert len(loaded) == 2
    device.forget_graphs()


@pytest.mark.gpu
def test_a_kernel_may_be_loaded_while_a_graph_is_recorded() -> None:
    """Triton's first launch of one, and a library's."""
    device = Device(torch.device("cuda"))
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    with device.running():
        graph = device.capture(x, lambda: silu_mul(x) @ x[:, :32].T, has_run=True)
        x.normal_()
        torch.testing.assert_close(graph.replay(), silu_mul(x) @ x[:, :32].T)
