"""Graphs of a device, where another engine's are given up."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllm_model.cuda.device import Device, Parts
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
        gc.collect()
        return x + 1

    with device.running():
        graph = device.capture(x, run)
        x += 1
        assert graph.replay().tolist() == [3.0] * 4
    assert old == []


@pytest.mark.gpu
def test_kernels_may_be_loaded_while_a_graph_is_recorded() -> None:
    """Triton's, compiled before, and a library's; of sizes that nothing else has."""
    device, runs = Device(torch.device("cuda")), list[bool]()
    x = torch.randn(37, 4 * 97, device="cuda", dtype=torch.bfloat16)
    expected = F.silu(x[:, :194].float()) * x[:, 194:].float()

    def run() -> torch.Tensor:
        runs.append(torch.cuda.is_current_stream_capturing())
        return (
            silu_mul(x, torch.empty_strided((37, 194), (1000, 1), dtype=torch.float16, device="cuda")).float()
            @ x.float()[:, :194].T
        )

    device.compile(run)
    with device.running():
        graph = device.capture(x, run, has_run=True)
        torch.testing.assert_close(graph.replay(), expected.half().float() @ x.float()[:, :194].T, rtol=2e-2, atol=2e-1)
    assert runs == [False, True]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_sent_between_the_parts_of_a_step(device: str) -> None:
    """The second part has it, and what the first made; so does a step after another in the same memory."""
    mine, x, found = Device(torch.device(device)), torch.ones(1 << 20, device=device), torch.zeros(1, device=device)

    def run() -> Parts:
        doubled = x * 2
        yield
        return doubled + found

    def replay(value: float) -> float:
        return float(graph.replay(lambda: found.fill_(value)).unique().item())

    with mine.running():
        graph = mine.capture_parts(x, run)
        other = mine.capture(x, lambda: (x * 100 + x * 200) * 300)
        assert replay(5) == 7
        other.replay()
        x += 1
        assert replay(6) == 10
        assert float(graph.replay().unique().item()) == 10
